"""A benchmark's download → nnU-Net's raw format, which fine-tuning reads: links (or copies), labels, split."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from mambamim_jax.data import nifti
from mambamim_jax.data.benchmarks import BENCHMARKS, Benchmark, Item
from mambamim_jax.data.datasets import DatasetError
from mambamim_jax.data.labels import SPLITS
from mambamim_jax.data.volume import VolumeError
from mambamim_jax.paths import home

FOLDS = 5


def prepare(
    name: str,
    source: str | Path,
    output: str | Path,
    *,
    copy: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> str:
    """Makes ``output``, whole or not at all: imagesTr, labelsTr, dataset.json and splits_final.json.

    Images and labels are links to the download, or copies; labels with other values than nnU-Net wants are written
    anew.

    Args:
        name: one of ``benchmarks.BENCHMARKS``. source: the extracted download. output: a new folder.

    Returns:
        One line on what was made.

    Raises:
        DatasetError: a layout other than the set's own, or an output that is there.
    """
    benchmark = BENCHMARKS[name]
    source, output = home(source).resolve(), home(output)
    if not source.is_dir():
        raise DatasetError(f"{source}: no such folder; give the extracted download of {benchmark.title}")
    if output.exists() and any(output.iterdir()):
        raise DatasetError(f"{output}: exists and is not empty; name a new folder")
    items = sorted(benchmark.layout(source), key=lambda item: item.id)
    if len(items) < 2:
        raise DatasetError(f"{source}: {len(items)} labelled cases of {benchmark.title}, expected 2 or more")
    partial = output.with_name(f".partial-{os.getpid()}-{output.name}")
    try:
        for folder in ("imagesTr", "labelsTr"):
            (partial / folder).mkdir(parents=True)
        for n, item in enumerate(items):
            _put(item, partial, benchmark, copy)
            if progress:
                progress(n + 1, len(items), item.id)
        _dump(partial / "dataset.json", _description(benchmark, len(items)))
        folds = make_folds(items)
        _dump(partial / SPLITS, folds)
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    except OSError as error:
        raise DatasetError(f"{output}: can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sizes = f"fold 0: {len(folds[0]['train'])} train, {len(folds[0]['val'])} held out"
    return f"{len(items)} cases of {benchmark.title} in {output}; {sizes} ({benchmark.split})"


def make_folds(items: Sequence[Item]) -> list[dict[str, list[str]]]:
    """The set's own split as one fold, or five seeded random ones (fewer for fewer cases)."""
    ids = [item.id for item in items]
    if items[0].held_out is not None:
        sides = {item.id: item.held_out for item in items}
        held = [{name for name, held_out in sides.items() if held_out}]
    else:
        order = [ids[n] for n in np.random.default_rng(0).permutation(len(ids))]
        held = [set(order[k::FOLDS]) for k in range(min(FOLDS, len(ids)))]
    folds = [
        {"train": [name for name in ids if name not in out], "val": [name for name in ids if name in out]}
        for out in held
    ]
    if not all(fold["train"] and fold["val"] for fold in folds):
        raise DatasetError(f"{len(ids)} cases, but none on one side of the set's own split; is it all there?")
    return folds


def _put(item: Item, output: Path, benchmark: Benchmark, copy: bool) -> None:
    for channel, image in enumerate(item.images):
        _link(image, output / "imagesTr" / f"{item.id}_{channel:04d}.nii.gz", copy)
    label = output / "labelsTr" / f"{item.id}.nii.gz"
    if benchmark.relabel:
        _relabel(item.label, label, benchmark)
    else:
        _link(item.label, label, copy)


def _link(path: Path, link: Path, copy: bool) -> None:
    shutil.copyfile(path, link) if copy else link.symlink_to(path.resolve())


def _relabel(path: Path, output: Path, benchmark: Benchmark) -> None:
    """Writes a label map with its values changed, as uint8.

    Raises: DatasetError for a damaged file or a value that the set does not have.
    """
    try:
        voxels = nifti.read(path, label=True).labels()
    except VolumeError as error:
        raise DatasetError(str(error)) from None
    kept = {value for inside in benchmark.labels.values() for value in np.atleast_1d(inside).tolist()}
    table = {value: value for value in kept if value not in benchmark.relabel.values()} | benchmark.relabel
    found = np.unique(voxels).tolist()
    unknown = [value for value in found if value not in table]
    if unknown:
        raise DatasetError(f"{path}: label value {unknown[0]}, expected {', '.join(map(str, sorted(table)))}")
    changed = np.zeros(voxels.shape, np.uint8)
    for value in found:
        changed[voxels == value] = table[value]
    image: Any = nibabel.load(path)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(changed, image.affine, header), output)


def _description(benchmark: Benchmark, count: int) -> dict[str, Any]:
    described = {
        "name": benchmark.title,
        "channel_names": {str(n): name for n, name in enumerate(benchmark.channels)},
        "labels": benchmark.labels,
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    return described | ({"regions_class_order": list(benchmark.writes)} if benchmark.writes else {})


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
