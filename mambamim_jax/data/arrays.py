"""The two ways a store keeps an array on disk, both readable by others: ``npy`` fast, ``blosc2`` compact.

``npy``: NumPy's own file, memory-mapped; a 96³ crop is copied at memory speed while the set fits the page
cache. ``blosc2``: ``.b2nd`` as nnU-Net has it, 64³ chunks of 32³ blocks, LZ4: about half of the bytes of a CT
with its noise, a tenth or less of labels and of a CT whose background was emptied, for sets that don't fit.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from mambamim_jax.types import NumpyArray, Size3

ENCODINGS = {"npy": ".npy", "blosc2": ".b2nd"}
CHUNK, BLOCK = 64, 32
ADVICE = "copy the store again, or preprocess again"


class StoreError(RuntimeError):
    """A store that can't be opened, read or written; the message is one line."""

    exit_code = 2


def require(encoding: str) -> None:
    """Check that an encoding exists and its library is installed.

    Raises:
        StoreError: one line that says what to do.
    """
    if encoding not in ENCODINGS:
        raise StoreError(f"encoding {encoding!r}, expected one of {', '.join(ENCODINGS)}")
    if encoding == "blosc2":
        _blosc2()


def write(stem: Path, array: NumpyArray, encoding: str) -> None:
    """Write ``stem`` plus the encoding's ending, and see it to the disk. Equal arrays give equal bytes."""
    array = np.ascontiguousarray(array)
    with open(stem.with_name(stem.name + ENCODINGS[encoding]), "wb") as file:
        if encoding == "blosc2":
            file.write(_compress(array))
        else:
            # np.save would lose the reason of a failure to write, such as a full disk
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(memoryview(array).cast("B"))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


def open_array(stem: str) -> Any:
    """What ``write`` wrote, whichever way: has ``shape`` and ``dtype``, and gives a NumPy array when sliced.

    The 256 last used files stay open.

    Raises:
        StoreError: it is not there, or not whole.
    """
    return _open(stem, os.getpid())


@lru_cache(maxsize=256)
def _open(stem: str, process: int) -> Any:  # a forked process must not share open files
    blosc2 = None if os.path.exists(stem + ".npy") else _blosc2()
    try:
        if blosc2 is None:
            # a plain array slices faster than a memmap
            return np.asarray(np.load(stem + ".npy", mmap_mode="r"))
        # mapped: one block costs no system call; one thread: the loader has its own
        return blosc2.open(stem + ".b2nd", mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
    except (OSError, ValueError, RuntimeError) as error:
        raise StoreError(damage(stem) or f"{stem}: can't be read ({error}); {ADVICE}") from error


def damage(stem: str) -> str | None:
    """What is wrong with an array's file by its header and its size, in one line; None where nothing is."""
    for encoding, ending in ENCODINGS.items():
        try:
            with open(stem + ending, "rb") as file:
                expected, found = _size(file, encoding), os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return f"{stem}{ending}: can't be read ({error}); {ADVICE}"
        if found != expected:
            return f"{stem}{ending}: found {found} bytes, expected {expected}; {ADVICE}"
        return None
    return f"{stem}{ENCODINGS['npy']}: no such file; {ADVICE}"


def _size(file: IO[bytes], encoding: str) -> int:
    """The bytes of a file of which this is the beginning."""
    if encoding == "npy":
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return file.tell() + math.prod(shape) * dtype.itemsize
    head = file.read(24)
    if head[2:9] != b"b2frame" or len(head) < 24:
        raise ValueError("not a frame of blosc2")
    return int.from_bytes(head[16:24], "big")


def hasten(stem: str, limit: int) -> None:
    """Have the system begin to read an array of at most ``limit`` bytes on disk, whole, ahead of its use.

    What is mapped is otherwise read page by page as it is touched, and nothing is done meanwhile.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for ending in ENCODINGS.values():
        with suppress(OSError):  # the other encoding; whatever else is wrong shows when it is opened
            descriptor = os.open(stem + ending, os.O_RDONLY)
            try:
                if os.fstat(descriptor).st_size <= limit:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def around(array: Any, starts: Sequence[NumpyArray], size: Size3) -> tuple[Any, NumpyArray]:
    """What boxes of ``size`` from ``starts`` (3,) need of a volume (h, w, d), and where it begins: int64 (3,).

    If the boxes of a compact array overlap so much that unpacking what surrounds them all once is less than
    unpacking each, that part, unpacked; otherwise the array itself.
    """
    here = np.zeros(3, np.int64)
    if isinstance(array, np.ndarray):
        return array, here
    shape = np.asarray(array.shape[:3], np.int64)
    first = np.clip(starts, 0, shape)
    stop = np.clip(np.asarray(starts) + size, 0, shape)
    low, high = first.min(0), stop.max(0)
    if np.prod(high - low) >= np.prod(stop - first, axis=1).sum():
        return array, here
    return array[tuple(map(slice, low.tolist(), high.tolist()))], low


def _compress(array: NumpyArray) -> bytes:
    blosc2 = _blosc2()
    how = blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=5, filters=[blosc2.Filter.BITSHUFFLE], nthreads=1)
    sides = [tuple(min(side, n) for n in array.shape) for side in (CHUNK, BLOCK)]
    return blosc2.asarray(array, chunks=sides[0], blocks=sides[1], cparams=how).to_cframe()


def _blosc2() -> Any:
    try:
        import blosc2
    except ImportError:
        python = Path(sys.executable).name
        raise StoreError(f"encoding 'blosc2' needs its library: {python} -m pip install blosc2") from None
    return blosc2
