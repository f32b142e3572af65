"""Writing what was predicted: NIfTI files with the geometry of the scan's own header, to the bit."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip  # type: ignore[attr-defined]

from mambamim_jax.data import nifti
from mambamim_jax.evaluate.painter import SCALE
from mambamim_jax.types import NumpyArray

LACKING = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""What a file system answers that cannot reserve space."""
PIECE = 2**22
"""Bytes written at once."""


def write_labels(labels: NumpyArray, like: Path, target: Path) -> None:
    """Writes a label map (i, j, k) as ``.nii.gz``, aside first, then renamed.

    Args:
      like: the NIfTI file whose sform, qform, their codes and units it gets.
    """
    header = _header(like, labels.shape, labels.dtype)
    with aside(target) as partial, partial.open("wb") as raw, _zipped(raw) as file:
        file.write(header)
        for plane in labels.astype(labels.dtype.newbyteorder("<"), copy=False).transpose(2, 1, 0):
            file.write(np.ascontiguousarray(plane).data)


def _zipped(raw: Any) -> Any:
    """A gzip stream without name and time: the same labels make the same file."""
    return igzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0)


@contextlib.contextmanager
def probability_file(like: Path, target: Path, classes: int) -> Iterator[NumpyArray]:
    """An array (classes, k, j, i) on disk to fill with probabilities times ``SCALE``; a ``.nii`` when done.

    Raises: OSError where there is no room for all of it, before the array is handed out.
    """
    i, j, k = (int(n) for n in nifti.read_header(like)["dim"][1:4])
    header = _header(like, (i, j, k, classes), np.dtype("<u2"), slope=1 / SCALE)
    with aside(target) as partial:
        with partial.open("wb") as file:
            file.write(header)
            file.flush()
            _reserve(file, len(header), 2 * classes * k * j * i)
        array = np.memmap(partial, "<u2", "r+", offset=len(header), shape=(classes, k, j, i))
        yield array
        array.flush()


def _reserve(file: Any, start: int, count: int) -> None:
    """Makes room for ``count`` zeros from ``start``, the file's end: a full disk ends a process that writes to a map.

    Raises: OSError where there is not so much.
    """
    try:
        os.posix_fallocate(file.fileno(), start, count)
    except (AttributeError, OSError) as error:  # macOS and some file systems lack it
        if isinstance(error, OSError) and error.errno not in LACKING:
            raise
        for begin in range(0, count, PIECE):
            file.write(bytes(min(PIECE, count - begin)))


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A path to write to; becomes ``target`` if all goes well, else nothing."""
    partial = partial_of(target)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(target: Path) -> Path:
    """Where a file is written before it gets its name; what a killed run leaves behind."""
    return target.with_name(f".{target.name}.partial")


def _header(like: Path, shape: Sequence[int], dtype: np.dtype, slope: float = 1.0) -> bytes:
    """Everything before the voxels of a single-file NIfTI, little-endian."""
    header: Any = nifti.read_header(like).as_byteswapped("<")
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header["scl_slope"], header["scl_inter"] = slope, 0
    header["cal_min"], header["cal_max"] = 0, 1 if len(shape) == 4 else 0
    header["descrip"], header["aux_file"], header["intent_code"] = b"mambamim_jax", b"", 0
    size = int(header["sizeof_hdr"])
    header["vox_offset"] = size + 4
    return header.binaryblock + b"\0\0\0\0"  # no extensions
