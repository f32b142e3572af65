"""Read one NIfTI file completely and distrustfully: a ``Volume``, or a ``VolumeError`` with its reason.

Everything a header or a gzip stream can get wrong without a word from the usual readers is checked here:
checksum, byte count, geometry, scaling, voxel type, finiteness and the range of HU.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
from isal import igzip  # type: ignore[attr-defined]
from nibabel.spatialimages import HeaderDataError

from mambamim_jax.data.gzipped import MAGIC, ZLIB_ERROR, readable
from mambamim_jax.data.volume import Volume, VolumeError
from mambamim_jax.types import NumpyArray

SPACING_RANGE = (0.05, 20.0)
"""mm between voxels; clinical CT has 0.1 to 10."""
EXTENT_RANGE = (5.0, 4000.0)
"""mm covered by an axis."""
HU_CEILING = 32767.0
HU_AIR = -200.0
"""A CT of any body part has some voxel below this (air, or fat's lower tail): what has none is not in HU."""
LABEL_TOLERANCE = 1e-3
"""How far a label's value may lie from a whole number; in integer voxels with a slope below a half, which hold what was
written as floats, as far as they round it: by half a slope.
"""
_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
_GZIP_MAX_RATIO = 1100  # deflate can't expand more than 1032-fold


@np.errstate(all="ignore")  # headers and voxels may hold anything; all of it is checked
def read(
    path: str | Path,
    *,
    label: bool = False,
    hu: bool = True,
    low: float = -175.0,
    content: bytes | None = None,
) -> Volume:
    """Read a CT (or, with ``label``, its label map) from ``.nii`` or ``.nii.gz``.

    Args:
        path: file. label: expect whole numbers from 0 to 65535 in place of HU. hu: without it, any finite
            intensities pass, as MRI has them. low: HU above which a voxel counts as body. content: the file's
            bytes where the caller already has them.

    Returns:
        Volume as stored, 3D, geometry validated, slope and intercept not yet applied to ``voxels``.

    Raises:
        VolumeError: with one of ``volume.REASONS``.
    """
    path = Path(path)
    if content is None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise VolumeError("missing", path, f"can't be opened: {error.strerror or error}") from None
    zipped = content[:2] == MAGIC
    stream: BinaryIO = igzip.GzipFile(fileobj=io.BytesIO(content)) if zipped else io.BytesIO(content)  # type: ignore
    with readable(path, content):
        header = _header(stream, path)
        affine = _geometry(header, path)
        slope, intercept = _scaling(header, path)
        voxels = _voxels(stream, header, path, len(content) * (_GZIP_MAX_RATIO if zipped else 1))
    volume = Volume(voxels, affine, slope, intercept)
    if label:
        _check_labels(volume, path)
    elif hu:
        _check_hu(volume, path, low)
    else:
        _range(volume, path)
    return volume


@np.errstate(all="ignore")
def read_grid(path: str | Path) -> Volume:
    """Shape and geometry alone, from the first bytes of a file; all voxels are 0 and take no memory.

    Raises:
        VolumeError: with one of ``volume.REASONS``.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise VolumeError("missing", path, f"can't be opened: {error.strerror or error}") from None
    with file, readable(path):
        zipped = file.read(2) == MAGIC
        file.seek(0)
        header = _header(igzip.GzipFile(fileobj=file) if zipped else file, path)  # type: ignore
        shape = [int(n) for n in header["dim"][1:4]]
        return Volume(np.broadcast_to(np.int8(0), shape), _geometry(header, path))


def read_header(path: str | Path) -> Any:
    """The header of a file that ``read`` takes, as nibabel's ``Nifti1Header`` or ``Nifti2Header``.

    Raises: VolumeError as ``read`` does.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == MAGIC
            file.seek(0)
            return _header(igzip.GzipFile(fileobj=file) if zipped else file, path)  # type: ignore[arg-type]
    except (OSError, EOFError, ZLIB_ERROR) as error:
        raise VolumeError("missing", path, f"can't be opened: {error}") from None


def _header(stream: BinaryIO, path: Path) -> Any:
    """The parsed header of NIfTI-1 or -2, either byte order; voxel type and shape checked."""
    start = stream.read(540)
    if len(start) < 348:
        raise VolumeError("not_nifti", path, f"{len(start)} bytes are too few for a NIfTI header (348)")
    for kind, length, magics in (
        (nibabel.Nifti1Header, 348, (b"n+1\0",)),
        (nibabel.Nifti2Header, 540, (b"n+2\0",)),
    ):
        for order in "<>":
            if int(np.frombuffer(start[:4], f"{order}i4")[0]) == length:
                magic = start[344:348] if length == 348 else start[4:8]
                if magic not in magics:
                    raise VolumeError(
                        "not_nifti", path, f"magic {magic!r}, expected {magics[0]!r} (single file)"
                    )
                if len(start) < length:
                    raise VolumeError(
                        "not_nifti", path, f"{len(start)} bytes are too few for its header ({length})"
                    )
                header = kind(start[:length], order, check=False)
                _check_layout(header, path, length + 4)
                return header
    raise VolumeError("not_nifti", path, "neither a NIfTI-1 nor a NIfTI-2 header at its start")


def _check_layout(header: Any, path: Path, first: int) -> None:
    """Voxel type, dimensions and offset of the data."""
    code = int(header["datatype"])
    if code in (128, 2304):
        raise VolumeError(
            "rgb", path, "colour (RGB) voxels, expected HU; export the CT itself, not a screenshot"
        )
    if code in (32, 1792, 2048):
        raise VolumeError("complex", path, "complex voxels, expected HU")
    try:
        dtype = np.dtype(header.get_data_dtype())
    except (HeaderDataError, KeyError):
        raise VolumeError("dtype", path, f"unknown NIfTI datatype code {code}") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise VolumeError("dtype", path, f"voxels of type {dtype}, expected integers or floats up to 64 bits")
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        raise VolumeError("bad_header", path, f"bitpix {int(header['bitpix'])} does not fit datatype {dtype}")
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7 or any(n < 1 for n in dim[1 : dim[0] + 1]):
        raise VolumeError("bad_header", path, f"impossible dimensions {dim}")
    shape = dim[1 : dim[0] + 1]
    if len(shape) < 3 or min(shape[:3]) < 2 or any(n != 1 for n in shape[3:]):
        raise VolumeError("not_3d", path, f"shape {'x'.join(map(str, shape))}, expected one 3D volume")
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or offset != int(offset) or offset < first:
        raise VolumeError(
            "bad_header", path, f"voxels said to start at byte {offset:g}, expected {first} or later"
        )


def _geometry(header: Any, path: Path) -> NumpyArray:
    """The affine in mm: sform, else qform; checked against pixdim and each other."""
    unit = _UNIT_MM.get(int(header["xyzt_units"]) & 7)
    if unit is None:
        raise VolumeError("bad_header", path, f"unknown unit code {int(header['xyzt_units'])}")
    pixdim = np.asarray(header["pixdim"][1:4], np.float64)
    if not np.isfinite(pixdim).all() or (pixdim == 0).any():
        raise VolumeError(
            "zero_spacing", path, f"pixdim {_row(pixdim)}, expected three positive spacings in mm"
        )
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform <= 0 and qform <= 0:
        raise VolumeError(
            "no_geometry", path, "sform and qform codes are both 0: orientation and spacing unknown"
        )
    affines = {}
    try:
        if sform > 0:
            affines["sform"] = np.asarray(header.get_sform(), np.float64)
        if qform > 0:
            affines["qform"] = np.asarray(header.get_qform(), np.float64)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        raise VolumeError("bad_affine", path, f"unreadable qform: {error}") from None
    for name, affine in affines.items():
        _check_affine(affine, pixdim, name, path)
    codes = {name: nibabel.aff2axcodes(affine) for name, affine in affines.items()}
    if len(set(codes.values())) > 1:
        raise VolumeError(
            "geometry_conflict", path, f"sform says axes {codes['sform']}, qform {codes['qform']}"
        )
    affine = next(iter(affines.values())).copy()
    affine[:3] *= unit
    _check_scale(affine, header["dim"][1:4], path)
    return affine


def _check_affine(affine: NumpyArray, pixdim: NumpyArray, name: str, path: Path) -> None:
    matrix = affine[:3, :3]
    columns = np.linalg.norm(matrix, axis=0)
    if not np.isfinite(affine).all() or (columns == 0).any():
        raise VolumeError(
            "bad_affine", path, f"{name} has zero or non-finite entries: {_row(affine[:3].ravel())}"
        )
    if abs(np.linalg.det(matrix / columns)) < 0.2:
        raise VolumeError("bad_affine", path, f"{name} is singular: {_row(matrix.ravel())}")
    if not np.allclose(columns, np.abs(pixdim), rtol=0.02, atol=1e-3):
        raise VolumeError(
            "geometry_conflict", path, f"{name} says spacing {_row(columns)}, pixdim {_row(np.abs(pixdim))}"
        )


def _check_scale(affine: NumpyArray, shape: NumpyArray, path: Path) -> None:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    extent = spacing * np.asarray(shape, np.float64)
    if spacing.min() < SPACING_RANGE[0] or spacing.max() > SPACING_RANGE[1]:
        raise VolumeError("absurd_spacing", path, f"spacing {_row(spacing)} mm, expected {SPACING_RANGE} mm")
    if extent.min() < EXTENT_RANGE[0] or extent.max() > EXTENT_RANGE[1]:
        raise VolumeError("absurd_spacing", path, f"extent {_row(extent)} mm, expected {EXTENT_RANGE} mm")
    if np.abs(affine[:3, 3]).max() > 1e5:
        raise VolumeError("bad_affine", path, f"first voxel {_row(affine[:3, 3])} mm away from the origin")


def _scaling(header: Any, path: Path) -> tuple[float, float]:
    """Slope and intercept; (1, 0) where the slope is 0 or not a number, as the standard says."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    if not np.isfinite(intercept):
        raise VolumeError("bad_scaling", path, f"scl_slope {slope:g} with scl_inter {intercept}")
    return slope, intercept


def _voxels(stream: BinaryIO, header: Any, path: Path, available: int) -> NumpyArray:
    """Exactly the voxels the header promises, (i, j, k); reads to the end so that the checksum is
    verified.
    """
    shape = [int(n) for n in header["dim"][1:4]]
    dtype = np.dtype(header.get_data_dtype())
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    promised = f"{'x'.join(map(str, shape))} {dtype.name} voxels need {size} bytes"
    offset = int(header["vox_offset"])
    if size + offset > available:
        raise VolumeError("short_data", path, f"{promised}, the file can't hold that many")
    stream.seek(offset)
    buffer = np.empty(size, np.uint8)
    view, filled = memoryview(buffer), 0  # type: ignore[arg-type]
    while filled < size:
        got = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not got:
            raise VolumeError("short_data", path, f"{promised}, found {filled}")
        filled += got
    if stream.read(1):
        raise VolumeError(
            "excess_data", path, f"{promised}, but the file goes on: wrong header or two files in one"
        )
    return buffer.view(dtype).reshape(shape[::-1]).transpose(2, 1, 0)


def _check_hu(volume: Volume, path: Path, low: float) -> None:
    lowest, highest = _range(volume, path)
    if highest <= low:
        raise VolumeError("air_only", path, f"nothing above {low:g} HU (highest voxel {highest:g})")
    if lowest > HU_AIR:
        raise VolumeError(
            "not_hu", path, f"lowest voxel {lowest:g}, but a CT in HU has air (below {HU_AIR:g})"
        )
    if highest > HU_CEILING or lowest < -HU_CEILING - 1:
        raise VolumeError("not_hu", path, f"voxels from {lowest:g} to {highest:g}, beyond what HU can be")


def _check_labels(volume: Volume, path: Path) -> None:
    lowest, highest = _range(volume, path)
    integers, slope, off = volume.voxels.dtype.kind in "iu", abs(volume.slope), 0.0
    if not (volume.plain and integers):
        values = volume.values()
        off = float(np.abs(values - np.rint(values)).max())
    tolerance = max(LABEL_TOLERANCE, 0.51 * slope if integers and slope < 0.5 else 0.0)
    if round(lowest) < 0 or round(highest) > 65535 or off > tolerance:
        far = f", up to {off:.2g} off whole numbers" if off > tolerance else ""
        raise VolumeError(
            "not_labels", path, f"values from {lowest:g} to {highest:g}{far}, expected whole 0 to 65535"
        )


def _range(volume: Volume, path: Path) -> tuple[float, float]:
    """Lowest and highest value after scaling; refuses NaN and infinity."""
    slices = volume.voxels.transpose(2, 1, 0)
    ends = np.array([float(slices.min()), float(slices.max())]) * volume.slope + volume.intercept
    if not np.isfinite(ends).all():
        raise VolumeError("non_finite", path, "NaN or infinite voxels; repair or leave out this scan")
    return float(ends.min()), float(ends.max())


def _row(values: NumpyArray) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in np.asarray(values, np.float64)) + ")"
