"""From probabilities on the network's grid to labels on the grid a scan came in, whatever its orientation.

A label is the decision on trilinearly interpolated probabilities. Where the eight neighbours of a voxel decide alike,
so does any mean of them; only the voxels at borders between labels are interpolated. Probabilities come in slabs and
a voxel is painted when the slab with its neighbours is there, so that memory stays bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mambamim_jax.data.volume import straight_axes
from mambamim_jax.evaluate.labels import Regions, decide, label_dtype
from mambamim_jax.types import NumpyArray

POINTS = 2**18
"""Voxels interpolated at once."""
SCALE = 65535
"""Probability 1 as it is stored."""
ROUNDING = 1e-6
"""Indices this close to the edge are on it."""


@dataclass(frozen=True)
class Placement:
    """Where a box of the network's grid lies on the grid of the scan.

    Attributes:
      to_box: (4, 4), index on the scan's grid → index in the box.
      size: of the box, (h, w, d).
      beyond: for each axis whether past the box's (first, last) voxel the edge is repeated, since the network's grid
        ends there too; elsewhere what lies beyond is background.
    """

    to_box: NumpyArray
    size: tuple[int, ...]
    beyond: tuple[tuple[bool, bool], ...]


def place(
    affine: NumpyArray,
    shape: Sequence[int],
    grid_affine: NumpyArray,
    grid_shape: Sequence[int],
    box: NumpyArray,
) -> Placement:
    """The placement of a box, (2, 3) first and one past the last, of the network's grid.

    Args:
      affine, shape: of the scan as stored. grid_affine, grid_shape: of the network's RAS grid.
    """
    to_grid = np.linalg.inv(grid_affine) @ affine
    found = straight_axes(affine, tuple(shape))
    if found:  # what resampling neglects is neglected here too
        kept = np.zeros((3, 3), bool)
        kept[range(3), found[0]] = True
        to_grid[:3, :3] *= kept
    to_grid[:3, 3] -= box[0]
    ends = tuple((int(low) == 0, int(high) == n) for low, high, n in zip(*box, grid_shape))
    return Placement(to_grid, tuple(int(n) for n in box[1] - box[0]), ends)


class Painter:
    """Paints a label map, and probabilities if asked, as slabs come.

    Args:
      shape: (i, j, k) of the scan. placement: of the slabs' box on it. axis: along which slabs follow each other.
      probabilities: None, or an array (classes, k, j, i) of zeros to fill, a memory map for instance.

    Attributes:
      labels: (k, j, i), as NIfTI stores them.
    """

    def __init__(
        self,
        shape: Sequence[int],
        placement: Placement,
        axis: int,
        classes: int,
        regions: Regions = None,
        probabilities: Any = None,
    ):
        self.dtype = label_dtype(classes, regions)
        self.labels: NumpyArray = np.zeros(tuple(shape)[::-1], self.dtype)
        self.placement, self.axis, self.regions, self.probabilities = placement, axis, regions, probabilities
        if probabilities is not None and not regions:
            probabilities[0] = SCALE  # background wherever no slab comes
        self.mixed = np.iinfo(self.dtype).max
        self.kept: NumpyArray | None = None

    def add(self, start: int, values: NumpyArray) -> None:
        """Takes the slab (h, w, d, classes) that begins at this index of the box along the axis."""
        if self.kept is not None:  # the last slice of the slab before, so that no gap is left between them
            start, values = start - 1, np.concatenate([self.kept, values], self.axis)
        length = values.shape[self.axis]
        last = start + length == self.placement.size[self.axis]
        self.kept = np.take(values, [length - 1], self.axis)
        decided = decide(values, self.regions)
        cells = self._cells(decided, last)
        stop = start + cells.shape[self.axis]
        flat_cells, strides = cells.reshape(-1), (cells.shape[1] * cells.shape[2], cells.shape[2], 1)
        for k, plane in enumerate(self.labels):
            where, low, fraction = self._voxels(k, start, stop)
            if where is None:
                continue
            found = flat_cells[sum(index * stride for index, stride in zip(low, strides))]
            at = np.nonzero(found == self.mixed) if self.probabilities is None else np.nonzero(found >= 0)
            for begin in range(0, len(at[0]), POINTS):
                some = tuple(index[begin : begin + POINTS] for index in at)
                points = [
                    [np.broadcast_to(part, found.shape)[some] for part in parts] for parts in (low, fraction)
                ]
                mixture = mix(values, *points)
                found[some] = decide(mixture, self.regions)
                if self.probabilities is not None:
                    self._keep(k, where, some, mixture)
            plane[where] = found

    def _keep(self, k: int, where: tuple, some: tuple, mixture: NumpyArray) -> None:
        """Puts interpolated probabilities of some of the voxels into their place."""
        if isinstance(where[0], slice):
            rows, columns = some[0] + where[0].start, some[1] + where[1].start
        else:
            rows, columns = where[0][some], where[1][some]
        for channel in range(mixture.shape[-1]):
            self.probabilities[channel, k][rows, columns] = np.rint(mixture[:, channel] * SCALE)

    def _cells(self, labels: NumpyArray, last: bool) -> NumpyArray:
        """For each voxel of a slab the label that its eight upper neighbours share, or ``mixed``.

        Beyond the end of an axis the edge is repeated; along the slabs' axis only after the last of them.
        """
        ends = [(0, int(axis != self.axis or last)) for axis in range(3)]
        low = high = np.pad(labels, ends, mode="edge")
        for axis in range(3):
            before, after = (np.arange(low.shape[axis] - 1) + n for n in (0, 1))
            low = np.minimum(low.take(before, axis), low.take(after, axis))
            high = np.maximum(high.take(before, axis), high.take(after, axis))
        return np.ascontiguousarray(np.where(low == high, low, self.dtype(self.mixed)))

    def _voxels(self, k: int, start: int, stop: int) -> tuple[tuple | None, list, list]:
        """Voxels of plane k whose lower neighbour along the axis is in [start, stop).

        Returns:
          Their index in a (j, i) plane, None if there are none; by box axis, arrays that broadcast together, the
          lower neighbour, counted from the slab's start along the axis, and the way from it to the upper one.
        """
        rows, columns = np.arange(self.labels.shape[1])[:, None], np.arange(self.labels.shape[2])[None]
        inside = [self._inside(a, self._position(a, k, rows, columns), start, stop) for a in range(3)]
        if any(min(part.shape) > 1 for part in inside):
            where: tuple = np.nonzero(inside[0] & inside[1] & inside[2])
            rows, columns = where
        else:  # each axis of the box goes with one stored axis, along which what is inside is an interval
            parts = [[p[:, 0] for p in inside if p.shape[1] == 1], [p[0] for p in inside if p.shape[1] > 1]]
            found = [np.flatnonzero(np.logical_and.reduce(np.broadcast_arrays(np.ones(n, bool), *some)))
                     for n, some in zip(self.labels.shape[1:], parts)]  # fmt: skip
            where = tuple(
                slice(*(indices[[0, -1]] + (0, 1))) if indices.size else slice(0) for indices in found
            )
            rows, columns = rows[where[0]], columns[:, where[1]]
        if not rows.size or not columns.size:
            return None, [], []
        low, fraction = [], []
        for axis in range(3):
            position = np.clip(self._position(axis, k, rows, columns), 0, self.placement.size[axis] - 1)
            floor = np.floor(position)
            low.append(floor.astype(np.intp) - (start if axis == self.axis else 0))
            fraction.append((position - floor).astype(np.float32))
        return where, low, fraction

    def _position(self, axis: int, k: int, rows: NumpyArray, columns: NumpyArray) -> NumpyArray:
        """Index along an axis of the box, of the shape that rows and columns make where it depends on them."""
        i, j, per_k, first = self.placement.to_box[axis]
        position = np.full((1,) * rows.ndim, per_k * k + first)
        position = position + i * columns if i else position
        return position + j * rows if j else position

    def _inside(self, axis: int, position: NumpyArray, start: int, stop: int) -> NumpyArray:
        """Whether voxels lie in the box, or beyond an end where the edge is repeated, and in this slab."""
        end = self.placement.size[axis] - 1
        low_open, high_open = self.placement.beyond[axis]
        inside = (low_open | (position >= -ROUNDING)) & (high_open | (position <= end + ROUNDING))
        if axis == self.axis:
            floor = np.floor(np.clip(position, 0, end))
            inside &= (floor >= start) & (floor < stop)
        return inside


def mix(values: NumpyArray, low: Sequence[NumpyArray], fraction: Sequence[NumpyArray]) -> NumpyArray:
    """Trilinear interpolation of (h, w, d, c) at m points, each low + fraction; beyond the end the edge; (m, c)."""
    total = np.zeros((len(low[0]), values.shape[-1]), np.float32)
    high = [np.minimum(index + 1, n - 1) for index, n in zip(low, values.shape)]
    for corner in itertools.product((0, 1), repeat=3):
        share = np.ones(len(low[0]), np.float32)
        for upper, part in zip(corner, fraction):
            share = share * (part if upper else 1 - part)
        index = tuple(h if upper else l for upper, l, h in zip(corner, low, high))
        total += values[index] * share[:, None]
    return total
