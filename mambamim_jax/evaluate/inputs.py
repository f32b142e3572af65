"""Scans to predict: which files are one case, and the case on the network's grid."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambamim_jax.data import nifti
from mambamim_jax.data.datasets import ENDINGS, printable
from mambamim_jax.data.intensity import normalise
from mambamim_jax.data.volume import AIR, Volume, VolumeError, on_grid_of, resample, same_grid
from mambamim_jax.paths import home
from mambamim_jax.types import NumpyArray

CHANNEL = re.compile(r"(.+)_(\d{4})")


class InputError(ValueError):
    """What cannot be predicted or evaluated, in one line."""

    exit_code = 2


@dataclass(frozen=True)
class Scan:
    """A case on the network's grid, and the grid that it came in.

    Attributes:
      image: (h, w, d, c) float32, normalised. grid: (4, 4), its affine.
      shape, affine: of the first channel's file as stored.
    """

    image: NumpyArray
    grid: NumpyArray
    shape: tuple[int, ...]
    affine: NumpyArray


def find_cases(source: str | Path, channel_names: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Cases by name, each with one file per channel.

    Args:
      source: a file, or a folder of them. ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz`` … are the channels of CASE, as
        in nnU-Net's imagesTr and imagesTs; what has no ``_0000`` is a case of one channel.

    Raises: InputError where there is nothing, or a case has other channels than the model.
    """
    source = home(source)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; expected a NIfTI file or a folder of them")
    folder = source if source.is_dir() else source.parent
    named = {path: name for path in sorted(folder.iterdir()) if (name := stem(path)) and path.name[0] != "."}
    several = {
        match[1] for name in named.values() if (match := CHANNEL.fullmatch(name)) and match[2] == "0000"
    }
    found: dict[str, dict[int, Path]] = {}
    for path, name in named.items():
        match = CHANNEL.fullmatch(name)
        case, channel = (match[1], int(match[2])) if match and match[1] in several else (name, 0)
        if channel in found.setdefault(case, {}):
            twin = found[case][channel].name
            raise InputError(f"{path}: {twin} is the same channel of case {case}; keep one of them")
        found[case][channel] = path
    if source.is_file():
        found = {case: files for case, files in found.items() if source in files.values()}
    if not found:
        raise InputError(f"{source}: no .nii or .nii.gz {'file' if source.is_file() else 'files in it'}")
    wanted = ", ".join(f"_{n:04d} {name}" for n, name in enumerate(channel_names))
    for case, files in found.items():
        if sorted(files) != list(range(len(channel_names))):
            there = ", ".join(f"_{n:04d}" for n in sorted(files))
            raise InputError(
                f"{next(iter(files.values()))}: case {case} has {len(files)} channels ({there}), "
                f"the model takes {len(channel_names)} ({wanted})"
            )
    return {case: tuple(files[n] for n in sorted(files)) for case, files in found.items()}


def stem(path: Path) -> str | None:
    """The name without its ending, ``printable``; None if it is no NIfTI file's."""
    name = printable(path.name)
    return next((name[: -len(ending)] for ending in ENDINGS if name.endswith(ending)), None)


def read_scan(files: Sequence[Path], description: Mapping[str, Any]) -> Scan:
    """Reads a case, puts it on the network's RAS grid and normalises it, as training does.

    Raises: VolumeError for a file that cannot be used, InputError where channels lie on different grids.
    """
    spacing, rules = tuple(description["spacing"]), description["normalisation"]
    first: Volume | None = None
    channels = []
    for path, rule in zip(files, rules, strict=True):
        hu = rule["kind"] == "window"
        volume = nifti.read(path, hu=hu, low=rule.get("low", 0.0))
        if first is None:
            first = volume
        elif volume.voxels.shape != first.voxels.shape or not same_grid(volume, first):
            raise VolumeError(
                "label_grid", path, f"another grid than {files[0].name}'s; channels must lie on one grid"
            )
        volume = on_grid_of(volume, first)
        channels.append(
            resample(volume, spacing, dtype=np.int16 if hu else np.float32, outside=AIR if hu else 0.0)
        )
    assert first is not None
    image = normalise(np.stack([channel.voxels for channel in channels], axis=-1), rules)
    return Scan(image, channels[0].affine, first.voxels.shape, first.affine)


def foreground(image: NumpyArray, margin: int) -> NumpyArray:
    """Box (2, 3), first and one past the last, of the voxels (h, w, d, c) that are not 0, grown by a margin."""
    shape = np.array(image.shape[:3])
    box = np.zeros((2, 3), np.int64)
    for axis in range(3):
        others = tuple(a for a in range(4) if a != axis)
        inside = np.flatnonzero(np.logical_or(image.max(others) > 0, image.min(others) < 0))
        if not inside.size:
            return np.zeros((2, 3), np.int64)
        box[:, axis] = inside[0] - margin, inside[-1] + 1 + margin
    return np.stack([np.maximum(box[0], 0), np.minimum(box[1], shape)])
