"""Prediction files against label files: one row of scores per case and class."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import orientations

from mambamim_jax.data import nifti
from mambamim_jax.data.volume import same_grid
from mambamim_jax.data.worker import deaf_children
from mambamim_jax.evaluate.inputs import InputError, stem
from mambamim_jax.evaluate.metrics import score
from mambamim_jax.evaluate.tables import Table
from mambamim_jax.types import NumpyArray


@dataclass(frozen=True)
class Pair:
    """One case's two files."""

    case: str
    prediction: Path
    label: Path


def find_pairs(predictions: Path, labels: Path) -> tuple[list[Pair], list[str]]:
    """Predictions and their labels by file name, and the labelled cases without a prediction.

    Raises: InputError where a folder is not there or empty, holds two files of a case, or a prediction has no label.
    """
    predicted, labelled = label_maps(predictions), label_maps(labels)
    lost = sorted(predicted.keys() - labelled.keys())
    if lost:
        raise InputError(
            f"{predicted[lost[0]]}: no label {lost[0]} in {labels} ({len(lost)} predictions have none)"
        )
    pairs = [Pair(case, path, labelled[case]) for case, path in predicted.items()]
    return pairs, sorted(labelled.keys() - predicted.keys())


def label_maps(folder: Path) -> dict[str, Path]:
    """Case → file, of a folder of label maps; raises InputError if there are none, or two of one case."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with label maps, CASE.nii.gz")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.name[0] != "."):
        name = stem(path)
        if not name or name.endswith("_probabilities"):
            continue
        if twin := found.get(name):
            raise InputError(f"{path}: {twin.name} is the same case; keep one of them")
        found[name] = path
    if not found:
        raise InputError(f"{folder}: no .nii or .nii.gz label maps in it")
    return found


def read_pair(pair: Pair) -> tuple[NumpyArray, NumpyArray, NumpyArray]:
    """Prediction and label (i, j, k), both as the label is stored, and the label's affine.

    Raises: InputError or VolumeError where a file cannot be used or they lie on different grids.
    """
    predicted, labelled = (nifti.read(path, label=True) for path in (pair.prediction, pair.label))
    if not same_grid(predicted, labelled):
        sizes = ["x".join(map(str, v.voxels.shape)) for v in (predicted, labelled)]
        spacings = [", ".join(f"{mm:.3g}" for mm in v.spacing) for v in (predicted, labelled)]
        found = f"{sizes[0]} voxels of ({spacings[0]}) mm, the label {sizes[1]} of ({spacings[1]}) mm"
        raise InputError(f"{pair.prediction}: another grid than {pair.label}: {found}, or elsewhere in space")
    turn = orientations.ornt_transform(
        *(orientations.io_orientation(v.affine) for v in (predicted, labelled))
    )
    return orientations.apply_orientation(predicted.labels(), turn), labelled.labels(), labelled.affine


def score_pair(pair: Pair, table: Table, tolerance: float) -> list[dict[str, Any]]:
    """Rows of one case, one per class: case, class and the fields of ``metrics.Scores``.

    Raises: InputError or VolumeError as ``read_pair``, and where a value is not in the table.
    """
    predicted, labelled, affine = read_pair(pair)
    for path, voxels in ((pair.prediction, predicted), (pair.label, labelled)):
        strange = sorted({int(v) for v in np.unique(voxels)} - table.known)
        if strange:
            known = ", ".join(map(str, sorted(table.known)))
            raise InputError(
                f"{path}: label values {strange} are not in the table of {table.source} ({known})"
            )
    if table.ignored is not None:
        inside = labelled != table.ignored
        predicted, labelled = predicted * inside, labelled * inside
    rows = []
    for name, values in table.classes.items():
        masks = (np.isin(predicted, values), np.isin(labelled, values))
        rows.append(
            {"case": pair.case, "class": name, **dataclasses.asdict(score(*masks, affine, tolerance))}
        )
    return rows


def values_of(pairs: list[Pair]) -> set[int]:
    """Every value that the labels hold."""
    found: set[int] = set()
    for pair in pairs:
        found |= {int(v) for v in np.unique(nifti.read(pair.label, label=True).labels())}
    return found


def score_all(
    pairs: list[Pair], table: Table, tolerance: float, workers: int, progress: Callable[[int, int, str], None]
) -> list[dict[str, Any]]:
    """Rows of all cases, in their order, computed by so many processes.

    Raises: InputError or VolumeError for the first case that cannot be scored.
    """
    rows = []
    for done, (pair, found) in enumerate(zip(pairs, _scores(pairs, table, tolerance, workers)), start=1):
        rows += found
        progress(done, len(pairs), pair.case)
    return rows


def _scores(
    pairs: list[Pair], table: Table, tolerance: float, workers: int
) -> Iterator[list[dict[str, Any]]]:
    if workers <= 1 or len(pairs) < 2:
        yield from (score_pair(pair, table, tolerance) for pair in pairs)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        with deaf_children():
            futures = [pool.submit(score_pair, pair, table, tolerance) for pair in pairs]
        yield from (future.result() for future in futures)
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
