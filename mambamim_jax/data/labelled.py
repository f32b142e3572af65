"""Batches of labelled crops for fine-tuning: a class in the middle of some, anywhere in the body of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mambamim_jax.data import arrays, augment
from mambamim_jax.data import crop as crops
from mambamim_jax.data.intensity import normalise
from mambamim_jax.data.store import Store
from mambamim_jax.data.stream import Loader
from mambamim_jax.types import NumpyArray, Size3


class LabelledLoader(Loader):
    """Crops with their labels; see ``stream.Loader`` for what it promises and its other arguments.

    A batch is ``{"image": float32 (b, h, w, d, c), "label": uint8 or uint16 (b, h, w, d), "index": int64
    (volumes,)}`` with ``b = volumes_per_batch * crops_per_volume``, or as many as ``rows``.

    Args:
        store: every volume with labels. crop: voxels (h, w, d).
        normalisation: one rule per channel, see ``intensity.normalise``.
        positive: share of the crops (drawn for each) centred on a voxel of a class other than 0: each class that
            the volume holds is equally likely, then each of its voxels. The others are centred on a voxel of the
            body. A crop is moved to lie within the body's box where it fits.
        how: augmentation; ``augment.NONE`` for none.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        store: Store,
        *,
        crop: Size3,
        normalisation: Sequence[Mapping[str, Any]],
        positive: float = 0.5,
        how: augment.Augmentation = augment.NONE,
        **options: Any,
    ) -> None:
        super().__init__(store, **options)
        self.crop, self.positive, self.how = crop, positive, how
        self.normalisation = tuple(dict(rule) for rule in normalisation)
        self.low = float(self.normalisation[0].get("low", 0.0))
        widest = max(max(line["label_values"]) for line in store.volumes)
        self.dtype = np.uint8 if widest < 256 else np.uint16

    @property
    def sampling(self) -> str:
        """See ``Loader``."""
        volumes = [entry.folder for entry in self.store.entries]  # they carry a digest of the labels
        return f"labelled {volumes} {self.crop} {self.normalisation} {self.positive} {self.how}"

    def batch(self, number: int) -> dict[str, NumpyArray]:
        """See ``Loader``."""
        samples, count = self.samples(number), self.crops_per_volume
        shape = (len(samples) * count, *self.crop)
        image = np.empty((*shape, len(self.normalisation)), np.float32)
        label = np.empty(shape, self.dtype)
        for n, index in enumerate(samples):
            rng, volume = self.generator(index), self.volume_of(index)
            for row in range(n * count, (n + 1) * count):
                image[row], label[row] = self._draw(rng, volume)
        return {
            "image": image,
            "label": label,
            "index": np.array([self.volume_of(i) for i in samples], np.int64),
        }

    def _draw(self, rng: np.random.Generator, volume: int) -> tuple[NumpyArray, NumpyArray]:
        """One crop: (h, w, d, c) and (h, w, d)."""
        image, label = self.store.image(volume), self.store.label(volume)
        where = augment.draw_placement(rng, self.how, self.crop)
        box, _ = self.store.foreground(volume, self.low)
        centre = self._centre(rng, volume, image, label)
        # a label may lie in the air beyond the body
        box = np.stack([np.minimum(box[0], centre), np.maximum(box[1], centre + 1)])
        start = crops.crop_start(centre, where.extent, box)
        fill = 0 if self.store.normalised else math.floor(self.low)
        raw = crops.take(image, start, where.extent, fill)
        known = crops.take(label, start, where.extent, 0)
        placed = augment.place(prepared(raw, self.store, self.normalisation), where)
        changed = augment.change_intensities(rng, placed, self.how)
        return changed, augment.place(known, where, label=True)

    def _centre(self, rng: np.random.Generator, volume: int, image: Any, label: Any) -> NumpyArray:
        wanted, choice = rng.random() < self.positive, rng.random()
        classes = class_counts(self.store.path(volume, "label"))
        if wanted and classes:
            value = sorted(classes)[int(choice * len(classes))]
            inside: Any = Blocks(lambda at: label[at] == value)
            return crops.draw_foreground(rng, inside, classes[value], 0)
        _, counts = self.store.foreground(volume, self.low)
        body: Any = Blocks(lambda at: (image[at] != 0).any(-1)) if self.store.normalised else image
        return crops.draw_foreground(rng, body, counts, 0 if self.store.normalised else self.low)


def prepared(raw: NumpyArray, store: Store, normalisation: Sequence[Mapping[str, Any]]) -> NumpyArray:
    """A piece of a store's image, (h, w, d) HU or (h, w, d, c) normalised when stored, as the network gets it."""
    if store.normalised:
        return raw.astype(np.float32)
    return normalise(raw[..., None] if raw.ndim == 3 else raw, normalisation)


@dataclass(frozen=True)
class Blocks:
    """A boolean volume of which only the blocks asked for are computed, as ``crop.draw_foreground`` reads them."""

    inside: Callable[[tuple[slice, ...]], NumpyArray]

    def __getitem__(self, at: tuple[slice, ...]) -> NumpyArray:
        return self.inside(at).view(np.uint8)


@lru_cache(maxsize=4096)
def class_counts(path: str) -> dict[int, NumpyArray]:
    """{value: ``crop.block_counts`` of its voxels} for every value but 0 of a stored label map."""
    label = arrays.open_array(path)[:]
    values = [int(value) for value in np.unique(label) if value]
    return {value: crops.block_counts((label == value).view(np.uint8), 0) for value in values}
