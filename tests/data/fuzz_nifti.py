"""Mutate headers and bytes of NIfTI files; whatever is read must be what an independent reading of the bytes
says.

    python -m tests.data.fuzz_nifti 20000

Each mutant either raises a ``VolumeError`` or gives exactly the voxels, scaling and affine that this file
works out on its own from the header's bytes, with shape, spacing and orientation consistent with each other.
"""

from __future__ import annotations

import gzip
import struct
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np

from mambamim_jax.data import nifti, volume
from tests.data import ct_files

_TYPES = {
    2: "u1",
    4: "i2",
    8: "i4",
    16: "f4",
    64: "f8",
    256: "i1",
    512: "u2",
    768: "u4",
    1024: "i8",
    1280: "u8",
}
# offset and format of the NIfTI-1 fields a mutation goes for
_FIELDS = [(0, "i")] + [(40 + 2 * n, "h") for n in range(8)] + [(70, "h"), (72, "h"), (123, "B"), (252, "h")]
_FIELDS += [
    (254, "h"),
    (344, "4s"),
    *((76 + 4 * n, "f") for n in range(8)),
    (108, "f"),
    (112, "f"),
    (116, "f"),
]
_FIELDS += [(256 + 4 * n, "f") for n in range(18)]
_ODD = {
    "f": [0.0, -1.0, 1.0, 1e-30, 1e30, np.nan, np.inf, -np.inf, 0.5, 352.0, 1e6, -0.0, 3.4e38],
    "h": [0, 1, 2, 3, 4, 5, 7, 8, -1, 32767, -32768, 16, 64, 128, 512, 1536, 256, 32, 60],
    "i": [0, 348, 540, 1543569408, -1],
    "B": [0, 1, 2, 3, 8, 10, 255],
    "4s": [b"n+1\0", b"ni1\0", b"n+2\0", b"\0\0\0\0"],
}


def seeds(folder: Path) -> list[bytes]:
    """Uncompressed contents of good files of several kinds."""
    body = ct_files.body((12, 11, 10))
    tilted = ct_files.affine_of("LPS")
    tilted[:3, :3] = ct_files.rotation(12) @ tilted[:3, :3]
    made = [
        ct_files.write(folder / "a.nii", body),
        ct_files.write(folder / "b.nii", body.astype("<f4"), ct_files.affine_of("PLI"), codes=(0, 1)),
        ct_files.write(folder / "c.nii", (body + 1100).astype("<u2"), tilted, slope=(1.0, -1100.0)),
        ct_files.write(folder / "d.nii", body.astype(">i4"), codes=(1, 0)),
    ]
    return [path.read_bytes() for path in made]


def mutate(rng: np.random.Generator, content: bytes) -> bytes:
    """One to three mutations of fields, bytes or length, then perhaps gzip, then perhaps damage to that."""
    data = bytearray(content)
    order = "<" if data[:4] == struct.pack("<i", 348) else ">"
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.random()
        if kind < 0.55:
            at, form = _FIELDS[int(rng.integers(len(_FIELDS)))]
            odd = _ODD[form][int(rng.integers(len(_ODD[form])))]
            if form == "f" and rng.random() < 0.4:
                odd = struct.unpack_from(f"{order}f", data, at)[0] * rng.choice([-1, 2, 0.1, 1.01, 1000])
            with np.errstate(over="ignore"):
                odd = np.float32(odd) if form == "f" else odd
            struct.pack_into(f"{order}{form}", data, at, odd)
        elif kind < 0.75:
            data[int(rng.integers(348))] ^= 1 << int(rng.integers(8))
        elif kind < 0.85:
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        elif kind < 0.95:
            del data[int(rng.integers(len(data))) :]
            data = data or bytearray(b"\0")
            data.extend(bytes(max(0, 348 - len(data))) if rng.random() < 0.5 else b"")
            if len(data) < 348:
                break
        else:
            data.extend(rng.bytes(int(rng.integers(1, 600))))
    if rng.random() < 0.5:
        return bytes(data)
    zipped = bytearray(gzip.compress(bytes(data), 1, mtime=0))
    if rng.random() < 0.5:
        spot = int(rng.integers(len(zipped)))
        if rng.random() < 0.5:
            zipped[spot] ^= 1 << int(rng.integers(8))
        else:
            del zipped[spot:]
    return bytes(zipped)


def expected(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine (mm) by the standard, from the bytes alone, for what can be read at all."""
    if content[:2] == b"\x1f\x8b":
        engine = zlib.decompressobj(31)
        plain = engine.decompress(content) + engine.flush()
        assert engine.eof, "an unfinished gzip stream was read"
        content = plain
    order = "<" if content[:4] == struct.pack("<i", 348) else ">"
    get = lambda form, at: struct.unpack_from(order + form, content, at)  # noqa: E731
    dim = get("8h", 40)
    shape = dim[1:4]
    assert all(n == 1 for n in dim[4 : dim[0] + 1])
    dtype = np.dtype(order + _TYPES[get("h", 70)[0]])
    offset = int(get("f", 108)[0])
    assert len(content) == offset + int(np.prod(shape)) * dtype.itemsize, "not all bytes are voxels"
    values = np.frombuffer(content, dtype, offset=offset).reshape(shape, order="F").astype(np.float64)
    slope, intercept = get("2f", 112)
    if slope != 0 and np.isfinite(slope):
        values = values * slope + intercept
    qform, sform = get("2h", 252)
    if sform > 0:
        affine = np.array([*get("12f", 280), 0, 0, 0, 1], float).reshape(4, 4)
    else:
        assert qform > 0
        pixdim = get("8f", 76)
        b, c, d, x, y, z = get("6f", 256)
        turn = nibabel.quaternions.quat2mat([np.sqrt(max(0.0, 1 - (b * b + c * c + d * d))), b, c, d])
        affine = np.eye(4)
        affine[:3, :3] = turn * [pixdim[1], pixdim[2], pixdim[3] * (-1 if pixdim[0] < 0 else 1)]
        affine[:3, 3] = x, y, z
    affine[:3] *= {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}[content[123] & 7]
    return values, affine


def check(content: bytes) -> str:
    """The reason code, or "read" after everything about it was found right."""
    try:
        read = nifti.read("mutant.nii", content=content)
    except volume.VolumeError as error:
        return error.code if "\n" not in str(error) else "several lines"
    values, affine = expected(content)
    got = read.values()
    assert got.shape == values.shape
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, values, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(read.affine, affine, rtol=1e-4, atol=5e-3)  # quaternions are float32
    assert values.min() <= nifti.HU_AIR
    assert values.max() > -175
    assert (np.array(read.spacing) >= nifti.SPACING_RANGE[0] * 0.999).all()
    assert (np.array(read.spacing) <= nifti.SPACING_RANGE[1] * 1.001).all()
    out = volume.resample(read, (4.0, 4.0, 4.0), dtype=np.int16)
    corners = (affine @ volume._corners(values.shape))[:3]
    box = (out.affine @ volume._corners(out.voxels.shape))[:3]
    assert np.abs(box.min(axis=1) - corners.min(axis=1)).max() < 0.2
    assert np.abs(box.max(axis=1) - corners.max(axis=1)).max() < 2.2
    return "read"


def run(folder: Path, count: int, seed: int = 0, slowest: float = 5.0) -> Counter:
    """Check ``count`` mutants; the tally of outcomes. A mutant that fails is kept in ``folder``."""
    rng = np.random.default_rng(seed)
    good = seeds(folder)
    assert [check(content) for content in good] == ["read"] * len(good)
    tally: Counter = Counter()
    for number in range(count):
        mutant = mutate(rng, good[number % len(good)])
        start = time.monotonic()
        try:
            tally[check(mutant)] += 1
        except BaseException:
            (folder / "failed.nii").write_bytes(mutant)
            raise
        assert not tally["several lines"]
        tally["slow"] += time.monotonic() - start > slowest
    return tally


if __name__ == "__main__":
    import tempfile
    import warnings

    warnings.simplefilter("error")
    found = run(Path(tempfile.mkdtemp()), int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print("\n".join(f"{count:6d} {code}" for code, count in found.most_common()))
