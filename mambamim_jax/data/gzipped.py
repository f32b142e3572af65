"""What is wrong with a damaged gzip file, as a reason."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isal import isal_zlib

from mambamim_jax.data.volume import VolumeError

ZLIB_ERROR: type[Exception] = isal_zlib.error  # type: ignore[assignment]
MAGIC = b"\x1f\x8b"
_PIECE = 2**16


@contextmanager
def readable(path: Path, content: bytes = b"") -> Iterator[None]:
    """Turns what a damaged stream raises into its reason.

    Args:
        content: the whole file where it was read, which tells bytes behind the stream from a stream that ends early.

    Raises: VolumeError.
    """
    again = "copy or download it again"
    try:
        yield
    except (EOFError, gzip.BadGzipFile) as error:
        if extra := bytes_behind(content):
            text = f"the gzip stream is whole, but {extra} bytes that are not gzip follow it; {again}"
            raise VolumeError("excess_data", path, text) from None
        if isinstance(error, EOFError):
            raise VolumeError("truncated", path, f"the gzip stream ends early; {again}") from None
        code = "bad_crc" if "CRC" in str(error) or "length" in str(error) else "bad_gzip"
        raise VolumeError(code, path, f"corrupt gzip: {error}; {again}") from None
    except (ZLIB_ERROR, OSError) as error:
        raise VolumeError("bad_gzip", path, f"corrupt gzip: {error}; {again}") from None


def bytes_behind(content: bytes) -> int:
    """How many bytes follow the whole gzip streams that a file begins with; 0 where one is not whole."""
    rest = memoryview(content)
    while rest[:2] == MAGIC:
        stream, end = zlib.decompressobj(zlib.MAX_WBITS | 16), 0
        while not stream.eof:
            piece = rest[end : end + _PIECE]
            end += len(piece)
            try:
                stream.decompress(piece)
            except zlib.error:
                return 0
            if not piece:
                return 0
        rest = rest[end - len(stream.unused_data) :]
    return len(rest)
