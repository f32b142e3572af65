"""A stored volume at the product of positions along its axes, read and written a plane at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mambamim_jax.types import NumpyArray

SLAB = 32
"""Slices interpolated before they are written: transposing many at once keeps to the cache's lines."""


def nearest(positions: NumpyArray) -> NumpyArray:
    """The whole numbers next to positions in voxels; halfway between two, the even one.

    Always taking the upper one would move labels against the image: at 3 mm every second voxel of a 1.5 mm grid lies
    halfway. A spacing that single precision has rounded is halfway too.
    """
    return np.rint(np.round(positions, 3))


def fill(
    voxels: NumpyArray,
    scale: tuple[float, float],
    positions: list[NumpyArray],
    label: bool,
    out: NumpyArray,
) -> None:
    """Write ``out`` (k, j, i), any strides: the volume at the product of ``positions`` (i, j, k).

    NIfTI stores i fastest, so slices of k are contiguous; one is read at a time, so memory stays bounded.
    Neighbours are gathered and mixed, axis by axis: faster than matrix products with the banded weights, and
    free of BLAS threads that fight over busy cores.

    Args:
        voxels: (i, j, k), any number type. scale: slope and intercept that make them values.
        positions: of the results along each stored axis, within the volume; whole numbers with ``label``.
    """
    whole = scale == (1, 0) and all((p == np.rint(p)).all() for p in positions)
    planes = (_nearest if label or whole else _mixed)(voxels, scale, positions)
    slab: NumpyArray = np.empty((SLAB, *out.shape[1:]), out.dtype)
    for start in range(0, len(out), SLAB):
        stop = min(start + SLAB, len(out))
        for n in range(stop - start):
            slab[n] = cast(next(planes), out.dtype.type)
        out[start:stop] = slab[: stop - start]


def _mixed(
    voxels: NumpyArray, scale: tuple[float, float], positions: list[NumpyArray]
) -> Iterator[NumpyArray]:
    """Trilinear planes (j, i), float32, one per position along k."""
    slices = voxels.transpose(2, 1, 0)
    (i0, i1, it), (j0, j1, jt), (k0, k1, kt) = (_neighbours(p, n) for p, n in zip(positions, voxels.shape))
    plane = np.empty(slices.shape[1:], np.float32)
    slope, intercept = map(np.float32, scale)
    same_rows, same_columns = (np.array_equal(positions[a], np.arange(voxels.shape[a])) for a in (1, 0))

    def in_plane(k: int) -> NumpyArray:
        np.copyto(plane, slices[k], casting="unsafe")
        if slope != 1:
            np.multiply(plane, slope, out=plane)
        if intercept != 0:
            np.add(plane, intercept, out=plane)
        rows = plane if same_rows else plane[j0] * (1 - jt[:, None]) + plane[j1] * jt[:, None]
        return rows.copy() if same_columns else rows.take(i0, 1) * (1 - it) + rows.take(i1, 1) * it

    kept: dict[int, NumpyArray] = {}
    for low, high, t in zip(k0.tolist(), k1.tolist(), kt):
        kept = {k: kept[k] if k in kept else in_plane(k) for k in dict.fromkeys((low, high))}
        yield kept[low] if t == 0 else kept[low] * (1 - t) + kept[high] * t


def _nearest(
    voxels: NumpyArray, scale: tuple[float, float], positions: list[NumpyArray]
) -> Iterator[NumpyArray]:
    """Planes (j, i) of single voxels, one per position (whole numbers) along k."""
    slices = voxels.transpose(2, 1, 0)
    i, j, k = (p.astype(np.intp) for p in positions)
    seen, plane = -1, np.empty(0)
    for n in k.tolist():
        if n != seen:
            plane = slices[n].take(j, 0).take(i, 1)
            plane = plane if scale == (1, 0) else plane * scale[0] + scale[1]
            seen = n
        yield plane


def _neighbours(positions: NumpyArray, size: int) -> tuple[NumpyArray, NumpyArray, NumpyArray]:
    low = np.clip(np.floor(positions).astype(np.intp), 0, size - 1)
    return low, np.minimum(low + 1, size - 1), (positions - low).astype(np.float32)


def cast(values: NumpyArray, dtype: type) -> NumpyArray:
    """Values as ``dtype``: integers are rounded and clipped to its range."""
    if not np.issubdtype(dtype, np.integer):
        return values.astype(dtype, copy=False)
    limits: Any = np.iinfo(dtype)
    if values.dtype.kind in "iu":
        return np.clip(values, limits.min, limits.max).astype(dtype)
    values = np.rint(values)
    return np.clip(values, limits.min, limits.max, out=values).astype(dtype)
