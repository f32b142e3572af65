"""Organ volumes that survive the resampling of a label map.

The nearest voxel keeps an organ's volume only on average: from 4 to 1.5 mm every stored voxel becomes two or three
along each axis, by where it lies, and from 3 to 1.5 mm one or three; small organs come out up to a quarter too small or
too large, lesions several times. Where that is more than a tolerance, voxels on the border between the label and what
surrounds it change sides, those that trilinear interpolation is least sure of first, until the volume is right. The
smallest label is the first, and what is right is no longer taken from or given to: a lesion exchanges with the organ
around it, the organ then with the background. All else stays the nearest voxel's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from mambamim_jax.data.volume import Volume, straight_axes
from mambamim_jax.types import NumpyArray

TOLERANCE = 0.005
"""Share of an organ's volume that nearest-voxel resampling may change before it is put right."""


def keep_volumes(resampled: Volume, stored: Volume, tolerance: float = TOLERANCE) -> None:
    """Put right, in place, the volume of every label that resampling changed by more than ``tolerance``.

    A label's volume is that of its voxels in the stored map, mm³, the outermost ones counted by as much of them as
    the resampled grid has: it leaves out most of the outer half of a thick end slice, and an organ that goes on beyond
    the scan must not be widened to make up for that. Only voxels less than a stored voxel from the label's border with
    the background or a larger label change; one that has too little of that stays as it is nearest.

    Args:
        resampled: (h, w, d) unsigned integers, on any grid; changed. stored: the map that it was made of.
    """
    voxels, source = resampled.voxels, stored.labels()
    share = abs(np.linalg.det(stored.affine[:3, :3]) / np.linalg.det(resampled.affine[:3, :3]))
    expected = _counts(source, _parts_within(stored, resampled)) * share
    found = _counts(voxels, [np.ones(n) for n in voxels.shape], len(expected))
    there = ndimage.find_objects(source)
    to_stored = np.linalg.inv(stored.affine) @ resampled.affine
    # beyond the last centres a straight grid goes on as at its edge; a tilted scan has nothing to give or take
    beyond = "nearest" if straight_axes(stored.affine, source.shape) else "constant"
    free = np.ones(len(expected), bool)
    for label in np.argsort(expected, kind="stable"):
        if label == 0 or expected[label] == 0:
            continue
        free[label] = False
        missing = round(expected[label]) - int(found[label])
        if abs(missing) > tolerance * expected[label]:
            before, after = _exchange(
                voxels, source, int(label), missing, there[label - 1], to_stored, beyond, free
            )
            found += np.bincount(after, minlength=len(found)) - np.bincount(before, minlength=len(found))


def _parts_within(stored: Volume, resampled: Volume) -> list[NumpyArray]:
    """For each stored axis, how many times its own width a voxel takes up in the resampled grid: 1 but at the ends.

    A straight grid repeats the edge to its own end, which may be more; a tilted scan ends at its last centres.
    """
    shape, straight = stored.voxels.shape, straight_axes(stored.affine, stored.voxels.shape)
    borders = [np.arange(n + 1) - 0.5 for n in shape]
    for axis, border in enumerate(borders):
        border[0], border[-1] = 0.0, shape[axis] - 1.0
    for r, (axis, backwards) in enumerate(zip(*straight)) if straight else ():
        step = resampled.spacing[r] / abs(stored.affine[r, axis])
        ends = -0.5 * step, (resampled.voxels.shape[r] - 0.5) * step
        borders[axis][[0, -1]] = [shape[axis] - 1.0 - end for end in ends[::-1]] if backwards else ends
    return [np.diff(border) for border in borders]


def _counts(labels: NumpyArray, weights: Sequence[NumpyArray], at_least: int = 0) -> NumpyArray:
    """Voxels of each value, for ``at_least`` so many, each counted by the product of its axes' weights.

    A slice at a time, to save memory.
    """
    count = np.zeros(max(int(labels.max(initial=0)) + 1, at_least))
    outer = int(np.argmax(labels.strides))
    rows, columns = (weights[axis] for axis in range(3) if axis != outer)
    plane = np.outer(rows, columns).ravel()
    for part, weight in zip(np.moveaxis(labels, outer, 0), weights[outer]):
        few = np.bincount(part.ravel(), plane)
        count[: len(few)] += weight * few
    return count


def _exchange(
    voxels: NumpyArray,
    source: NumpyArray,
    label: int,
    missing: int,
    box: tuple[slice, ...],
    to_stored: NumpyArray,
    beyond: str,
    free: NumpyArray,
) -> tuple[NumpyArray, NumpyArray]:
    """Give ``missing`` voxels of the ``free`` labels to the one in ``box`` of ``source``, or take as many from it.

    Returns: the labels of the changed voxels, before and after.
    """
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
            inside.astype(np.float32),
            to_stored[:3, :3],
            offset,
            part.shape,
            order=1,
            mode=beyond,
        )

    organ, around = membership(piece == label), membership(free[piece])
    border = (organ > 1e-3) & (around > 1e-3) & ((part != label) if missing > 0 else (part == label))
    candidates = np.flatnonzero(border)
    if missing > 0:
        candidates = candidates[free[part[border]]]
    sure = (organ - around).ravel()[candidates]
    # equal ones are taken from all over the border, in an order that is always the same
    scattered = (candidates.astype(np.uint64) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    order = np.lexsort((scattered, -sure if missing > 0 else sure))
    chosen = np.unravel_index(candidates[order[: abs(missing)]], part.shape)
    before = part[chosen]
    if missing > 0:
        part[chosen] = label
    else:
        part[chosen] = _likeliest(piece, to_stored[:3, :3] @ np.array(chosen) + offset[:, None], free)
    return before, part[chosen]


def _likeliest(labels: NumpyArray, positions: NumpyArray, free: NumpyArray) -> NumpyArray:
    """The ``free`` label that trilinear interpolation has most of at (3, n) ``positions``; of equal ones the lowest."""
    last = np.array(labels.shape)[:, None] - 1
    positions = np.clip(positions, 0, last)
    low = np.floor(positions).astype(int)
    values, weights = [], []
    for step in np.ndindex(2, 2, 2):
        corner = low + np.array(step)[:, None]
        values.append(labels[tuple(np.minimum(corner, last))].astype(int))
        weights.append((1 - np.abs(positions - corner)).prod(0))
    value, weight = np.array(values), np.array(weights)
    most = np.array([np.where(value == one, weight, 0).sum(0) for one in value])
    most[~free[value]] = -1
    return np.where(most >= most.max(0) - 1e-6, value, np.iinfo(np.uint16).max).min(0)
