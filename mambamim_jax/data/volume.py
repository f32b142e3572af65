"""A CT volume in memory: geometry, resampling to axis-aligned RAS, HU window and foreground.

Axes of a resampled volume are ``h w d`` = right, anterior, superior (RAS): index 0 is leftmost, most
posterior and lowest. Affines map voxel indices to millimetres in RAS+, as NIfTI does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from nibabel import orientations

from mambamim_jax.data import planes
from mambamim_jax.types import NumpyArray, Size3, Spacing

AIR = -1024.0
"""HU given to places outside the scanned box when a tilted volume is put on straight axes."""
STRAIGHT_TOLERANCE = 0.1
"""mm: an affine is axis-aligned if treating it as such moves no voxel by more than this."""

REASONS = {
    "missing": "the file is not there or can't be opened",
    "not_nifti": "no NIfTI-1 or NIfTI-2 single-file header",
    "bad_header": "the header contradicts itself",
    "truncated": "the gzip stream or the file ends early",
    "bad_gzip": "the gzip stream is corrupt",
    "bad_crc": "the gzip checksum does not match",
    "short_data": "fewer voxels than the header promises",
    "excess_data": "more bytes than the header promises, or than the gzip stream has",
    "rgb": "colour voxels",
    "complex": "complex voxels",
    "dtype": "a voxel type that is not a number CT can be stored in",
    "not_3d": "two dimensions, or a real fourth one",
    "no_geometry": "neither sform nor qform is set",
    "bad_affine": "NaN, zero or singular affine",
    "zero_spacing": "a spacing of zero, or not a number",
    "absurd_spacing": "a spacing or extent no CT has",
    "geometry_conflict": "sform, qform and pixdim tell different stories",
    "bad_scaling": "slope without a usable intercept",
    "non_finite": "NaN or infinite voxels",
    "air_only": "nothing above the window's low end",
    "not_hu": "intensities that can't be HU",
    "not_labels": "label values that are not whole numbers from 0 to 65535",
    "label_grid": "label and image lie on different grids",
    "several_channels": "more than one image channel",
    "channel_grid": "channels of one case lie on different grids",
    "duplicate": "the same voxels as another case",
    "worker_died": "the worker process ended while it held this volume",
}
"""Reason codes of refusals, as they appear in ``data_report.jsonl``."""


class VolumeError(ValueError):
    """A volume that can't be used: ``code`` is a key of ``REASONS``; the message is one line naming the
    file.
    """

    def __init__(self, code: str, path: str | Path, message: str) -> None:
        assert code in REASONS, code
        self.code, self.path, self.message = code, str(path), " ".join(str(message).split())
        super().__init__(f"{self.path}: {self.message} [{code}]")

    def __reduce__(self) -> tuple:
        return VolumeError, (self.code, self.path, self.message)


@dataclass(frozen=True)
class Volume:
    """Voxels (i, j, k) as stored, any number type; their value is ``slope * voxel + intercept``, HU for CT."""

    voxels: NumpyArray
    affine: NumpyArray
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def spacing(self) -> Spacing:
        """Distance in mm between neighbours along each stored axis."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def plain(self) -> bool:
        """Whether the stored voxels are the values."""
        return self.slope == 1 and self.intercept == 0

    def values(self) -> NumpyArray:
        """All voxels with slope and intercept applied, float32 (i, j, k)."""
        return self.voxels.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept)

    def labels(self) -> NumpyArray:
        """All values of a label map, whole numbers from 0 to 65535: integers (i, j, k), as stored where they can be."""
        if self.plain and self.voxels.dtype.kind in "iu":
            return self.voxels
        return np.rint(self.values()).astype(np.uint16)


# ------------------------------------------------------------------------------------------------ geometry


def straight_axes(
    affine: NumpyArray, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[bool, ...]] | None:
    """Which stored axis runs along R, A and S, and which of them backwards; None if the affine is tilted.

    Args:
        affine: (4, 4), mm. shape: stored size.
    """
    matrix = affine[:3, :3]
    axes = tuple(int(a) for a in np.argmax(np.abs(matrix), axis=1))
    if sorted(axes) != [0, 1, 2]:
        return None
    rest = matrix.copy()
    rest[range(3), axes] = 0.0
    # what the neglected entries move the farthest voxel by
    if (np.abs(rest) @ (np.asarray(shape[:3]) - 1.0)).max() > STRAIGHT_TOLERANCE:
        return None
    return axes, tuple(bool(matrix[r, a] < 0) for r, a in enumerate(axes))


def same_grid(a: Volume, b: Volume, tolerance: float = 0.5) -> bool:
    """Whether two volumes cover the same voxels in space, in whatever order and direction they are stored.

    ``tolerance`` is in mm, at the farthest corner.
    """
    (size_a, affine_a), (size_b, affine_b) = _canonical(a), _canonical(b)
    if size_a != size_b:
        return False
    corners = _corners(size_a)
    return bool(np.abs((affine_a - affine_b) @ corners).max() <= tolerance)


def on_grid_of(volume: Volume, other: Volume) -> Volume:
    """A volume on the ``same_grid`` as another with just the other's geometry, its voxels stored as they were.

    Half a millimetre decides over the size that resampling gives, and over whether a scan counts as tilted: what has
    to come out on the other's grid is resampled by the other's affine.
    """
    turns = [orientations.io_orientation(v.affine) for v in (other, volume)]
    back = [orientations.inv_ornt_aff(t, v.voxels.shape) for t, v in zip(turns, (other, volume), strict=True)]
    return replace(volume, affine=other.affine @ np.rint(back[0] @ np.linalg.inv(back[1])))


def _canonical(volume: Volume) -> tuple[tuple[int, ...], NumpyArray]:
    """Size and affine after permuting and mirroring axes to come closest to RAS."""
    turn = orientations.io_orientation(volume.affine)
    shape = volume.voxels.shape
    size = [0, 0, 0]
    for stored, axis in enumerate(turn[:, 0].astype(int)):
        size[axis] = shape[stored]
    return tuple(size), volume.affine @ orientations.inv_ornt_aff(turn, shape)


def _corners(shape: tuple[int, ...]) -> NumpyArray:
    """Homogeneous indices (4, 8) of a volume's corner voxels."""
    return np.array(np.meshgrid(*[(0, n - 1) for n in shape], (1,), indexing="ij"), np.float64).reshape(4, -1)


def _straight_grid(volume: Volume) -> tuple[Size3, NumpyArray, NumpyArray] | None:
    """Size, first voxel's position and spacing in RAS order, or None if tilted."""
    found = straight_axes(volume.affine, volume.voxels.shape)
    if found is None:
        return None
    axes, backwards = found
    size = tuple(volume.voxels.shape[a] for a in axes)
    step = np.abs(volume.affine[range(3), axes])
    corner = np.zeros(4)
    corner[3] = 1.0
    for axis, back, n in zip(axes, backwards, size, strict=True):
        corner[axis] = n - 1.0 if back else 0.0
    return size, (volume.affine @ corner)[:3], step  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ resampling


def resample(
    volume: Volume, spacing: Spacing, *, label: bool = False, dtype: type = np.float32, outside: float = AIR
) -> Volume:
    """Put a volume on an axis-aligned RAS grid of the given spacing.

    Straight volumes keep their first RAS voxel's centre, and get MONAI's size ``round((n - 1) s / spacing +
    1)`` per axis; beyond the last centre the edge is repeated. Tilted, sheared and oblique ones fill their
    bounding box, with ``outside`` (labels: 0) where there was no scan. Images are interpolated trilinearly,
    labels take the nearest voxel.

    Args:
        volume: as read. spacing: mm along R, A, S. dtype: of the result; integers are rounded and clipped to
            range. outside: a tilted scan's value where it has none; 0 for MRI.

    Returns:
        Volume (h, w, d), C-contiguous, slope 1 and intercept 0.
    """
    grid = _straight_grid(volume)
    if grid is None:
        return _resample_tilted(volume, spacing, label, dtype, outside)
    size, first, step = grid
    axes, backwards = straight_axes(volume.affine, volume.voxels.shape)  # type: ignore[misc]
    positions: list[NumpyArray] = [np.empty(0)] * 3  # per stored axis, in stored index units
    for r, axis in enumerate(axes):
        count = int(np.round((size[r] - 1) * step[r] / spacing[r] + 1.0))
        where = np.minimum(np.arange(count) * (spacing[r] / step[r]), size[r] - 1.0)
        if label:
            where = planes.nearest(where)
        positions[axis] = size[r] - 1.0 - where if backwards[r] else where
    turn = np.argsort(axes)  # of the result's axes, in stored order
    out: NumpyArray = np.empty([len(positions[a]) for a in axes], dtype)
    scale = (volume.slope, volume.intercept)
    planes.fill(volume.voxels, scale, positions, label, out.transpose(turn).transpose(2, 1, 0))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = first
    return Volume(out, affine)


def _resample_tilted(volume: Volume, spacing: Spacing, label: bool, dtype: type, outside: float) -> Volume:
    shape = volume.voxels.shape
    world = (volume.affine @ _corners(shape))[:3]
    low, high = world.min(axis=1), world.max(axis=1)
    size = tuple(int(n) for n in np.round((high - low) / spacing + 1.0))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = low
    if label:
        # halfway between two voxels the order decides, which must not be that of the file
        turned = orientations.apply_orientation(volume.labels(), orientations.io_orientation(volume.affine))
        to_index = np.linalg.inv(_canonical(volume)[1]) @ affine
        return Volume(planes.cast(_nearest_tilted(turned, to_index, size), dtype), affine)
    to_index = np.linalg.inv(volume.affine) @ affine
    from scipy import ndimage  # slow to import, rarely needed

    # drawn in by a hair, so that rounding does not put the outermost voxels outside
    middle = (np.array(shape) - 1) / 2
    to_index[:3] *= 1 - 1e-9
    to_index[:3, 3] += 1e-9 * middle
    moved = ndimage.affine_transform(
        volume.values(), to_index, output_shape=size, order=1, mode="constant", cval=outside
    )
    return Volume(np.ascontiguousarray(planes.cast(moved, dtype)), affine)


def _nearest_tilted(labels: NumpyArray, to_index: NumpyArray, size: tuple[int, ...]) -> NumpyArray:
    """Labels (i, j, k) at the voxels (h, w, d) that ``to_index`` leads from, 0 beyond the first and last centres."""
    out = np.zeros(size, labels.dtype)
    grid = np.ogrid[: size[1], : size[2]]
    for h, plane in enumerate(out):
        where = [
            np.round(row[0] * h + row[1] * grid[0] + row[2] * grid[1] + row[3], 3) for row in to_index[:3]
        ]
        inside = np.logical_and.reduce([(w >= 0) & (w <= n - 1) for w, n in zip(where, labels.shape)])
        at = [planes.nearest(w[inside]).astype(np.intp) for w in where]
        plane[inside] = labels[tuple(at)]
    return out


# ------------------------------------------------------------------------------------------------ intensities


def window_intensity(
    hu: NumpyArray, window: tuple[float, float], out: NumpyArray | None = None
) -> NumpyArray:
    """HU clipped to the window and scaled to [0, 1], float32, any shape."""
    low, high = window
    out = np.empty(hu.shape, np.float32) if out is None else out
    np.copyto(out, hu, casting="unsafe")
    out -= np.float32(low)
    out *= np.float32(1.0 / (high - low))
    return np.clip(out, 0.0, 1.0, out=out)


def foreground_box(hu: NumpyArray, low: float) -> NumpyArray | None:
    """Smallest box holding every voxel above ``low`` HU: int64 (2, 3), first and one past the last; or None."""
    over_d = hu.max(axis=2)
    reach = (over_d.max(axis=1), over_d.max(axis=0), hu.max(axis=(0, 1)))
    inside = [np.flatnonzero(values > low) for values in reach]
    if len(inside[0]) == 0:
        return None
    return np.array([[w[0] for w in inside], [w[-1] + 1 for w in inside]], np.int64)
