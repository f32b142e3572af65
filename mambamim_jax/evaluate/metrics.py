"""Overlap and surface distance of two masks, in mm, with stated rules for what is absent or missed.

    Dice = 2 |P ∩ L| / (|P| + |L|)        IoU = |P ∩ L| / |P ∪ L|
    HD95 = max of the 95th percentiles of the distances from P's surface to L's and back
    NSD  = share of both surfaces' voxels that lie within the tolerance of the other surface

A surface is the voxels of a mask that have a face neighbour outside of it (or outside of the image); distances are
between voxel centres in mm, on sheared grids too. These are MONAI's definitions (``compute_hausdorff_distance`` with
percentile 95, ``compute_surface_dice`` without sub-voxels).

Absent (neither has a voxel): every metric is NaN and the case is left out of means. Missed (the label has some, the
prediction none) and invented (the other way round): Dice, IoU and NSD are 0, HD95 is the image's diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from mambamim_jax.types import NumpyArray

METRICS = ("dice", "iou", "hd95", "nsd")
PERCENTILE, NAN = 95.0, float("nan")
SLACK = 1e-5
"""Share of the tolerance by which a distance may exceed it: headers hold affines in float32, in which a distance of so
many voxels as make the tolerance may come out above it."""


@dataclass(frozen=True)
class Scores:
    """One class of one case.

    Attributes:
      dice, iou, nsd: in [0, 1]. hd95: mm. All NaN where the class is absent.
      status: "ok", "absent", "missed" or "invented".
      predicted, labelled: volumes in ml.
    """

    dice: float
    iou: float
    hd95: float
    nsd: float
    status: str
    predicted: float
    labelled: float


def score(predicted: NumpyArray, labelled: NumpyArray, affine: NumpyArray, tolerance: float) -> Scores:
    """All metrics of two masks (i, j, k) on one grid.

    Args:
      predicted, labelled: bool, or numbers of which any but 0 is inside.
      affine: (3, 3) or (4, 4), voxel index → mm. tolerance: of NSD, mm.

    Raises: ValueError for masks of different or other than three-dimensional shapes, or with NaN, for another affine,
      and for a tolerance below zero.
    """
    matrix = _matrix(affine)
    if not tolerance >= 0:
        raise ValueError(f"tolerance: found {tolerance}, expected mm of zero or more")
    millilitres = abs(float(np.linalg.det(matrix))) / 1000
    both, either = union_box(predicted, labelled)
    sizes = [int(np.count_nonzero(mask)) for mask in both]
    predicted_ml, labelled_ml = (size * millilitres for size in sizes)
    if not any(sizes):
        return Scores(NAN, NAN, NAN, NAN, "absent", 0.0, 0.0)
    if not all(sizes):
        status = "missed" if sizes[1] else "invented"
        return Scores(0.0, 0.0, diagonal(either, matrix), 0.0, status, predicted_ml, labelled_ml)
    common = int(np.count_nonzero(both[0] & both[1]))
    to_label, to_prediction = surface_distances(*both, matrix)
    hd95 = max(float(np.percentile(distances, PERCENTILE)) for distances in (to_label, to_prediction))
    near = sum(
        np.count_nonzero(distances <= tolerance * (1 + SLACK)) for distances in (to_label, to_prediction)
    )
    nsd = near / (len(to_label) + len(to_prediction))
    dice, iou = 2 * common / sum(sizes), common / (sum(sizes) - common)
    return Scores(dice, iou, hd95, nsd, "ok", predicted_ml, labelled_ml)


def union_box(
    predicted: NumpyArray, labelled: NumpyArray
) -> tuple[tuple[NumpyArray, NumpyArray], tuple[int, ...]]:
    """Both masks as bool, cut to the smallest box that holds either, and the image's size; raises as ``score``."""
    masks = _masks(predicted, labelled)
    either = masks[0] | masks[1]
    box = []
    for axis in range(3):
        inside = np.flatnonzero(either.any(tuple(a for a in range(3) if a != axis)))
        box.append(slice(inside[0], inside[-1] + 1) if inside.size else slice(0))
    return (masks[0][tuple(box)], masks[1][tuple(box)]), either.shape


def diagonal(shape: Sequence[int], matrix: NumpyArray) -> float:
    """Length in mm of the longest way through the voxel centres of an image of shape (i, j, k)."""
    if len(shape) != 3:
        raise ValueError(f"shape: found {tuple(shape)}, expected (i, j, k)")
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij"), np.float64).reshape(3, -1)
    corners = (_matrix(matrix) @ ends).T
    return float(np.linalg.norm(corners[:, None] - corners[None], axis=-1).max())


def surface(mask: NumpyArray) -> NumpyArray:
    """Voxels of a mask with a face neighbour outside of it, (i, j, k) bool; the image's border is outside."""
    (mask,) = _masks(mask)
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(3):
        for step in (0, 2):
            index = [slice(1, -1)] * 3
            index[axis] = slice(step, step + mask.shape[axis])
            inner &= padded[tuple(index)]
    return mask & ~inner


def surface_distances(a: NumpyArray, b: NumpyArray, matrix: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
    """Distances in mm from each surface voxel of a to b's surface, and back.

    Raises: ValueError as ``score``, and for a mask without a voxel.

    By a tree of the surfaces' points: exact, and on large masks about ten times faster than distance transforms.
    """
    masks, matrix = _masks(a, b), _matrix(matrix)
    points = [np.argwhere(surface(mask)) @ matrix.T for mask in masks]
    if not all(map(len, points)):
        raise ValueError("masks: found one without a voxel, which has no surface")
    trees = [cKDTree(p, balanced_tree=False) for p in points]
    return trees[1].query(points[0])[0], trees[0].query(points[1])[0]


def _masks(*given: NumpyArray) -> list[NumpyArray]:
    """Masks as bool, of one three-dimensional shape; a shape that broadcasts would be scored without a word."""
    arrays = [np.asarray(mask) for mask in given]
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(
            f"masks: found {' and '.join(map(str, shapes))}, expected (i, j, k), the same for all"
        )
    if any(_has_nan(array) for array in arrays):
        raise ValueError("masks: found NaN, expected 0 outside and any other number inside")
    return [array.astype(bool, copy=False) for array in arrays]


def _has_nan(array: NumpyArray) -> bool:
    if array.dtype.kind in "biu":
        return False
    known = array if array.dtype.kind in "fc" else array.astype(np.float32)  # bfloat16
    return bool(np.isnan(known).any())


def _matrix(affine: NumpyArray) -> NumpyArray:
    """The (3, 3) part of an affine, float64."""
    matrix = np.asarray(affine, np.float64)
    if matrix.shape not in ((3, 3), (4, 4)) or not np.isfinite(matrix).all():
        found = matrix.shape if np.isfinite(matrix).all() else "numbers that are not finite"
        raise ValueError(f"affine: found {found}, expected (3, 3) or (4, 4), voxel index → mm")
    return matrix[:3, :3]
