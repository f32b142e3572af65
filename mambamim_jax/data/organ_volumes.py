"""Organ volumes that survive the resampling of a label map.

The nearest voxel keeps an organ's volume only on average: from 4 to 1.5 mm every stored voxel becomes two or three
along each axis, by where it lies, and small organs come out up to a quarter too small or too large. Where that is more
than a tolerance, voxels on the border between the organ and the background change sides, those that trilinear
interpolation is least sure of first, until the volume is right. All else stays the nearest voxel's.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from mambamim_jax.data.volume import Volume
from mambamim_jax.types import NumpyArray

TOLERANCE = 0.005
"""Share of an organ's volume that nearest-voxel resampling may change before it is put right."""


def keep_volumes(resampled: Volume, stored: Volume, tolerance: float = TOLERANCE) -> None:
    """Put right, in place, the volume of every label that resampling changed by more than ``tolerance``.

    A label's volume is that of its voxels in the whole stored map, mm³. Only voxels less than a stored voxel from
    the organ's border with the background change; an organ that has too little of that stays as it is nearest.

    Args:
        resampled: (h, w, d) unsigned integers, on any grid; changed. stored: the map that it was made of.
    """
    voxels, source = resampled.voxels, stored.voxels
    if not stored.plain or source.dtype.kind not in "iu":
        source = stored.values().astype(voxels.dtype)
    share = abs(np.linalg.det(stored.affine[:3, :3]) / np.linalg.det(resampled.affine[:3, :3]))
    expected, found = _counts(source) * share, _counts(voxels)
    there = ndimage.find_objects(source)
    to_stored = np.linalg.inv(stored.affine) @ resampled.affine
    for label in np.flatnonzero(expected[1:]) + 1:
        missing = round(expected[label]) - int(found[label] if label < len(found) else 0)
        if abs(missing) > tolerance * expected[label]:
            _exchange(voxels, source, int(label), missing, there[label - 1], to_stored)


def _counts(labels: NumpyArray) -> NumpyArray:
    """Voxels of each value; a slice at a time, for bincount widens what it counts to int64."""
    count = np.zeros(int(labels.max(initial=0)) + 1, np.int64)
    for part in np.moveaxis(labels, int(np.argmax(labels.strides)), 0):
        few = np.bincount(part.ravel())
        count[: len(few)] += few
    return count


def _exchange(
    voxels: NumpyArray,
    source: NumpyArray,
    label: int,
    missing: int,
    box: tuple[slice, ...],
    to_stored: NumpyArray,
) -> None:
    """Give ``missing`` voxels of the background to the organ in ``box`` of ``source``, or take as many from it."""
    low = np.maximum([at.start - 2 for at in box], 0)
    high = np.minimum([at.stop + 2 for at in box], source.shape)
    piece = source[tuple(map(slice, low, high))]
    corners = np.array(np.meshgrid(*zip(low - 0.5, high - 0.5), (1,), indexing="ij")).reshape(4, -1)
    reach = (np.linalg.inv(to_stored) @ corners)[:3]
    first = np.clip(np.floor(reach.min(1)).astype(int), 0, voxels.shape)
    last = np.clip(np.ceil(reach.max(1)).astype(int) + 1, 0, voxels.shape)
    part = voxels[tuple(map(slice, first, last))]
    offset = to_stored[:3, :3] @ first + to_stored[:3, 3] - low

    def membership(inside: NumpyArray) -> NumpyArray:
        return ndimage.affine_transform(
            inside.astype(np.float32), to_stored[:3, :3], offset, part.shape, order=1, mode="nearest"
        )

    organ, background = membership(piece == label), membership(piece == 0)
    border = (organ > 1e-3) & (background > 1e-3) & (part == (0 if missing > 0 else label))
    candidates = np.flatnonzero(border)
    sure = (organ - background).ravel()[candidates]
    # equal ones are taken from all over the border, in an order that is always the same
    scattered = (candidates.astype(np.uint64) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    order = np.lexsort((scattered, -sure if missing > 0 else sure))
    chosen = candidates[order[: abs(missing)]]
    part[np.unravel_index(chosen, part.shape)] = label if missing > 0 else 0
