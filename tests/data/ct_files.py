"""Small NIfTI files for the tests, and where the shared real ones are."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("MAMBAMIM_SHARED", REPO.parent / "shared")) / "data"
needs_shared = pytest.mark.skipif(
    not (SHARED / "ct").is_dir(), reason="real CT volumes not there; set MAMBAMIM_SHARED to their folder"
)


def affine_of(codes: str, spacing=(2.0, 2.0, 3.0), origin=(-20.0, 10.0, 300.0)) -> np.ndarray:
    """Affine of a volume stored along ``codes`` (e.g. LPS), ``spacing`` per stored axis."""
    affine = np.zeros((4, 4))
    for stored, code in enumerate(codes):
        world = next(n for n, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[world, stored] = spacing[stored] * (1 if code in "RAS" else -1)
    affine[:3, 3], affine[3, 3] = origin, 1.0
    return affine


def rotation(degrees: float, axis: int = 0) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(3)
    a, b = [n for n in range(3) if n != axis]
    turn[a, a] = turn[b, b] = c
    turn[a, b], turn[b, a] = -s, s
    return turn


def ramp(shape, affine) -> np.ndarray:
    """HU that rise linearly through space, from about -900 to 900: linear interpolation keeps them
    exactly.
    """
    index = np.indices(shape).reshape(3, -1)
    world = affine[:3, :3] @ index + affine[:3, 3:]
    slope = np.array([1.7, -2.3, 1.1])
    value = slope @ (world - world.mean(axis=1, keepdims=True))
    return (value * 900 / np.abs(value).max()).reshape(shape)


def body(shape=(24, 20, 16), seed=0) -> np.ndarray:
    """HU int16: an ellipsoid of soft tissue with texture, in air."""
    grid = np.indices(shape).reshape(3, -1).T / (np.array(shape) - 1) * 2 - 1
    inside = ((grid / (0.8, 0.7, 1.5)) ** 2).sum(axis=1).reshape(shape) < 1
    noise = np.random.default_rng(seed).normal(0, 20, shape)
    return np.where(inside, 40, -1000).astype(np.int16) + noise.astype(np.int16)


def write(path: Path, voxels, affine=None, *, codes=(1, 1), kind=nibabel.Nifti1Image, slope=None) -> Path:
    """Write a NIfTI with sform and qform codes as given (a sheared affine can't be a qform: pass (1, 0))."""
    affine = affine_of("LPS") if affine is None else affine
    image = kind(voxels, affine)
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine if codes[1] else None, code=codes[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    if slope is not None:
        image.header.set_slope_inter(*slope)
        content = bytearray(image.to_bytes())
        content[112:120] = np.array(slope, "<f4").tobytes()
        path.write_bytes(content)
    else:
        nibabel.save(image, path)
    return path


def dataset(folder: Path, count: int = 5, **options) -> Path:
    """A folder of different small CTs."""
    for n in range(count):
        shape = (20 + 2 * n, 22, 14 + n)
        write(folder / f"case_{n}.nii.gz", body(shape, seed=n), **options)
    return folder
