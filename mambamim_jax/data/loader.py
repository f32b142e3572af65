"""Batches of random crops for pre-training: a foreground voxel in each, flips, HU or windowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mambamim_jax.data import arrays
from mambamim_jax.data import crop as crops
from mambamim_jax.data.store import Store
from mambamim_jax.data.stream import Loader
from mambamim_jax.data.volume import window_intensity
from mambamim_jax.types import NumpyArray, Size3


class PretrainLoader(Loader):
    """Crops centred on foreground; see ``stream.Loader`` for what it promises and its other arguments.

    A batch is ``{"image": (b, h, w, d, 1), "index": int64 (volumes,)}`` with
    ``b = volumes_per_batch * crops_per_volume`` or as many as ``rows``; ``index`` says which volumes of the
    store they are of.

    Args:
        store: what to read. crop: voxels (h, w, d). crops_per_volume: random crops of a volume.
        volumes_per_batch: over all processes. flip: probability of mirroring h, w and d.
        window: HU shown as 0 and 1. dtype: of the images: ``float32`` in [0, 1], or ``int16`` for HU before
            the window, half the bytes, windowed on the device (``train.feed.window``).

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        store: Store,
        *,
        crop: Size3 = (96, 96, 96),
        crops_per_volume: int = 4,
        volumes_per_batch: int = 4,
        flip: tuple[float, float, float] = (0.2, 0.2, 0.1),
        window: tuple[float, float] = (-175.0, 250.0),
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        super().__init__(
            store, crops_per_volume=crops_per_volume, volumes_per_batch=volumes_per_batch, **options
        )
        if dtype not in ("float32", "int16"):
            raise ValueError(f"dtype {dtype!r}, expected float32 (windowed) or int16 (HU)")
        self.crop, self.flip, self.window, self.dtype = crop, flip, window, np.dtype(dtype)

    @property
    def sampling(self) -> str:
        """See ``Loader``."""
        return f"{self.crop} {self.flip} {self.window}"

    def batch(self, number: int) -> dict[str, NumpyArray]:
        """See ``Loader``."""
        samples, count = self.samples(number), self.crops_per_volume
        image = np.empty((len(samples) * count, *self.crop, 1), self.dtype)
        for index in samples:  # what is smaller than its crops
            arrays.hasten(self.store.path(self.volume_of(index), "image"), 2 * count * math.prod(self.crop))
        for n, index in enumerate(samples):
            self._fill(index, image[n * count : (n + 1) * count, ..., 0])
        return {"image": image, "index": np.array([self.volume_of(index) for index in samples], np.int64)}

    def _fill(self, index: int, out: NumpyArray) -> None:
        """Write the crops (n, h, w, d) of sample ``index``."""
        rng, which, low = self.generator(index), self.volume_of(index), self.window[0]
        hu = self.store.image(which)
        box, counts = self.store.foreground(which, low)
        starts, flips = [], []
        for _ in out:
            starts.append(crops.crop_start(crops.draw_foreground(rng, hu, counts, low), self.crop, box))
            flips.append(crops.draw_flips(rng, self.flip))
        hu, origin = arrays.around(hu, starts, self.crop)
        for piece, start, mirrored in zip(out, starts, flips, strict=True):
            if self.dtype == np.int16:
                into = crops.flip(piece, mirrored)
                crops.take(hu, start - origin, self.crop, math.floor(low), out=into)
            else:
                raw = crops.take(hu, start - origin, self.crop, math.floor(low))
                window_intensity(crops.flip(raw, mirrored), self.window, out=piece)
