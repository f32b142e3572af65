"""Random crops and flips: pure functions of a NumPy generator. A crop is an array (h, w, d) in RAS order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mambamim_jax.types import NumpyArray, Size3

BLOCK = 16
"""Side in voxels of a block of the foreground index."""


def block_counts(hu: NumpyArray, low: float) -> NumpyArray:
    """Foreground voxels (above ``low`` HU) in each ``BLOCK``³ block of a volume (h, w, d): uint16 (⌈h/16⌉,
    …).
    """
    count = (hu > low).view(np.uint8)
    for axis, dtype in ((2, np.uint8), (1, np.uint16), (0, np.uint16)):  # 16, 256 and 4096 at most
        count = np.add.reduceat(count, np.arange(0, hu.shape[axis], BLOCK), axis=axis, dtype=dtype)
    return count


def draw_foreground(rng: np.random.Generator, hu: NumpyArray, counts: NumpyArray, low: float) -> NumpyArray:
    """One foreground voxel of a volume, each equally likely: int64 (3,).

    Only one block of the volume is read. ``counts`` are its ``block_counts`` for the same ``low``.

    Raises:
        ValueError: no foreground at all.
    """
    reach = np.cumsum(counts.ravel(), dtype=np.int64)
    if reach[-1] == 0:
        raise ValueError(f"no voxel above {low:g} HU to centre a crop on")
    rank = int(rng.integers(reach[-1]))
    block = int(reach.searchsorted(rank, side="right"))
    i, j, k = (BLOCK * n for n in _place(block, counts.shape))
    piece = hu[i : i + BLOCK, j : j + BLOCK, k : k + BLOCK]
    inside = (piece > low).ravel().nonzero()[0]
    within = inside[rank - (int(reach[block - 1]) if block else 0)]
    a, b, c = _place(int(within), piece.shape)
    return np.array((i + a, j + b, k + c), np.int64)


def _place(flat: int, shape: Sequence[int]) -> tuple[int, int, int]:
    """Index (3,) of the element number ``flat``; some tenfold faster than NumPy's for one."""
    rest, k = divmod(flat, shape[2])
    return *divmod(rest, shape[1]), k


def crop_start(center: NumpyArray, crop: Size3, box: NumpyArray) -> NumpyArray:
    """First voxel of a crop centred on ``center`` and moved to lie inside ``box``: int64 (3,), may be
    negative.

    Along an axis where the box is smaller than the crop, the box comes to lie in the crop's middle.
    """
    start = []
    # plain integers: for three of them NumPy's overhead is that of a quarter of the copying
    for middle, size, first, stop in zip(center.tolist(), crop, *box.tolist(), strict=True):
        room = size - (stop - first)
        start.append(first - room // 2 if room > 0 else min(max(middle - size // 2, first), stop - size))
    return np.array(start, np.int64)


def take(
    hu: NumpyArray, start: NumpyArray, crop: Size3, fill: float, out: NumpyArray | None = None
) -> NumpyArray:
    """The crop (h, w, d, …) of a volume from ``start``; what lies beyond the volume is ``fill``. dtype of the
    volume.
    """
    out = np.empty((*crop, *hu.shape[3:]), hu.dtype) if out is None else out
    stop = [min(s + n, size) for s, n, size in zip(start, crop, hu.shape[:3], strict=True)]
    first = [max(int(s), 0) for s in start]
    inside = tuple(slice(f - s, e - s) for f, s, e in zip(first, start, stop, strict=True))
    if any(e - f != n for f, e, n in zip(first, stop, crop, strict=True)):
        out[...] = fill
    if all(e > f for f, e in zip(first, stop, strict=True)):
        out[inside] = hu[tuple(slice(f, e) for f, e in zip(first, stop, strict=True))]
    return out


def draw_flips(rng: np.random.Generator, probability: Sequence[float]) -> tuple[bool, bool, bool]:
    """Whether to mirror each of h, w and d. Three numbers are always drawn, so later draws don't depend on
    them.
    """
    h, w, d = (bool(draw < p) for draw, p in zip(rng.random(3), probability, strict=True))
    return h, w, d


def flip(array: NumpyArray, flips: Sequence[bool]) -> NumpyArray:
    """A view of (h, w, d, …) mirrored along the axes asked for."""
    return array[tuple(slice(None, None, -1 if mirrored else 1) for mirrored in flips)]
