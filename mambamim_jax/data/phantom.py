"""Deterministic labelled CT phantoms of the trunk as NIfTI, so that everything runs without any data.

Each phantom is a different patient (see ``anatomy``): build, fat, contrast phase, position of the scan along the
body, spacing, size and stored orientation vary with (seed, number).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
from isal import igzip  # type: ignore[attr-defined]

from mambamim_jax.data import builder
from mambamim_jax.data.anatomy import LABELS, draw_phantom
from mambamim_jax.data.datasets import DatasetError
from mambamim_jax.types import NumpyArray

VERSION = 1
# per phantom: spacing (mm), first and last mm of the scan along z, stored orientation, how voxels are stored
_SCANS = (
    ((2.2, 2.2, 3.0), (70, 250), "LPS", "int16"),
    ((2.6, 2.6, 2.0), (150, 330), "RAS", "int16"),
    ((1.9, 1.9, 5.0), (30, 230), "LPS", "uint16 with intercept"),
    ((2.4, 2.4, 2.5), (10, 190), "LAS", "int16"),
    ((3.0, 3.0, 3.0), (20, 335), "PLI", "float32"),
    ((2.0, 2.0, 4.0), (110, 300), "RPI", "int16"),
)


def write_phantoms(folder: str | Path, *, seed: int = 0, count: int = 6) -> Path:
    """Write ``count`` phantoms as an nnU-Net raw folder with labels, once; the same arguments give the same
    bytes.

    Args:
        folder: made as a whole or not at all. seed, count: which phantoms.

    Returns:
        The folder.

    Raises:
        DatasetError: the folder holds something other than phantoms, or cannot be written.
    """
    folder = Path(folder)
    wanted = {"seed": seed, "count": count, "version": VERSION}
    if folder.exists():
        try:
            found = json.loads((folder / "dataset.json").read_bytes()).get("phantoms")
        except (OSError, json.JSONDecodeError, AttributeError):
            found = None
        if found == wanted:
            return folder
        if found is None and any(folder.iterdir()):
            raise DatasetError(f"{folder}: holds something other than phantoms; name an empty or new folder")
    partial = folder.with_name(f".partial-{os.getpid()}-{folder.name}")
    try:
        for name in ("imagesTr", "labelsTr"):
            (partial / name).mkdir(parents=True)
        for number in range(count):
            _write(partial, seed, number)
        description = {
            "channel_names": {"0": "CT"},
            "labels": LABELS,
            "numTraining": count,
            "file_ending": ".nii.gz",
        }
        description |= {"name": "CT phantoms", "licence": "Apache-2.0", "phantoms": wanted}
        (partial / "dataset.json").write_text(json.dumps(description, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise DatasetError(builder.explain(error, folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder: Path, seed: int, number: int) -> None:
    spacing, reach, orientation, storage = _SCANS[number % len(_SCANS)]
    hu, label = draw_phantom(np.random.default_rng((seed, number)), spacing, reach)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -180.0, -140.0, reach[0]
    name = f"phantom_{number:03d}"
    _save(folder / "imagesTr" / f"{name}_0000.nii.gz", hu, affine, orientation, storage)
    _save(folder / "labelsTr" / f"{name}.nii.gz", label, affine, orientation, "uint8")


def _save(path: Path, voxels: NumpyArray, affine: NumpyArray, orientation: str, storage: str) -> None:
    """Store a RAS array in another orientation, as nearly every scanner does."""
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(orientation)
    )
    stored = nibabel.orientations.apply_orientation(voxels, turn)
    affine = affine @ nibabel.orientations.inv_ornt_aff(turn, voxels.shape)
    offset = storage == "uint16 with intercept"
    stored = (stored + 1024).astype(np.uint16) if offset else stored.astype(storage)
    image = nibabel.Nifti1Image(stored, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    content = bytearray(image.to_bytes())
    if offset:  # nibabel writes no intercept of its own for integers
        content[112:120] = np.array([1.0, -1024.0], "<f4").tobytes()
    path.write_bytes(igzip.compress(bytes(content), compresslevel=1, mtime=0))
