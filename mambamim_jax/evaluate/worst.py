"""The worst cases of an evaluation, as slices to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambamim_jax.data import nifti
from mambamim_jax.data.datasets import ENDINGS
from mambamim_jax.data.volume import Volume, VolumeError, resample, same_grid, window_intensity
from mambamim_jax.evaluate.figure import Overlay
from mambamim_jax.evaluate.scoring import Pair, read_pair
from mambamim_jax.evaluate.tables import Table
from mambamim_jax.types import NumpyArray

WINDOW = (-160.0, 240.0)
MARGIN_MM = 25.0


def find_image(pair: Pair, images: Path | None) -> Path | None:
    """The scan of a case: in the folder given, or in nnU-Net's images folder beside its labels folder."""
    beside = pair.label.parent
    folders = [images] if images else [beside.with_name(beside.name.replace("labels", "images", 1))]
    for folder in folders:
        for ending in ENDINGS:
            for name in (f"{pair.case}_0000{ending}", f"{pair.case}{ending}"):
                if folder != beside and (folder / name).is_file():
                    return folder / name
    return None


def worst_rows(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The rows of lowest Dice, one per case as long as there are cases."""
    scored = sorted((row for row in rows if row["status"] != "absent"), key=lambda row: row["dice"])
    first: dict[str, Mapping[str, Any]] = {}
    for row in scored:
        first.setdefault(row["case"], row)
    chosen = list(first.values())[:count]
    return [*chosen, *[row for row in scored if row not in chosen][: count - len(chosen)]]


def overlay(row: Mapping[str, Any], pair: Pair, table: Table, images: Path | None) -> Overlay:
    """The axial slice where prediction and label of the row's class differ most, cut to what there is of it."""
    predicted, labelled, affine = read_pair(pair)
    values = table.classes[row["class"]]
    finest = float(np.clip(np.linalg.norm(affine[:3, :3], axis=0).min(), 0.5, 3.0))
    grid = (finest,) * 3
    masks = [resample(Volume(np.isin(part, values).astype(np.uint8), affine), grid, label=True, dtype=np.uint8)
             for part in (labelled, predicted)]  # fmt: skip
    label, prediction = (mask.voxels > 0 for mask in masks)
    differing = (label ^ prediction).sum((0, 1))
    level = int(differing.argmax()) if differing.any() else int(label.sum((0, 1)).argmax())
    image = _slice_of_image(find_image(pair, images), affine, labelled.shape, grid, level)
    box = _square((label | prediction)[:, :, level], round(MARGIN_MM / finest))
    shown = None if image is None else _upright(image[box])
    outlines = [_upright(mask[:, :, level][box]) for mask in (label, prediction)]
    what = row["status"] if row["status"] != "ok" else f"Dice {row['dice']:.3f}"
    note = f"{what}, HD95 {row['hd95']:.1f} mm\n{row['labelled']:.1f} ml labelled, {row['predicted']:.1f} ml predicted"
    return Overlay(f"{row['case']}: {row['class']}", note, shown, outlines[0], outlines[1], 1.0)


def _slice_of_image(
    path: Path | None, affine: NumpyArray, shape: tuple[int, ...], grid: tuple[float, ...], level: int
) -> NumpyArray | None:
    """The scan's axial slice in [0, 1] where it is there and on the labels' grid."""
    if path is None:
        return None
    try:
        image = nifti.read(path, hu=False)
    except VolumeError:
        return None
    if not same_grid(image, Volume(np.empty(shape, np.uint8), affine)):
        return None
    moved = resample(image, grid).voxels[:, :, level]  # type: ignore[arg-type]
    if image.values().min() < -200:  # a CT
        return window_intensity(moved, WINDOW)
    low, high = np.quantile(moved, [0.01, 0.99])
    return np.clip((moved - low) / max(high - low, 1e-6), 0, 1)


def _square(mask: NumpyArray, margin: int) -> tuple[slice, slice]:
    """A square around what is in a slice, with a margin, within the slice."""
    ends = [np.flatnonzero(mask.any(1 - axis)) for axis in (0, 1)]
    if not ends[0].size:
        return slice(None), slice(None)
    side = max(int(e[-1] - e[0]) + 1 for e in ends) + 2 * margin
    box = []
    for e, size in zip(ends, mask.shape):
        start = int(np.clip((e[0] + e[-1]) // 2 - side // 2, 0, max(size - side, 0)))
        box.append(slice(start, min(start + side, size)))
    return box[0], box[1]


def _upright(part: NumpyArray) -> NumpyArray:
    """(h, w) as a radiologist looks at an axial slice: anterior up, the patient's right on the left."""
    return part[::-1, ::-1].T
