"""Benchmarks of CT and MRI segmentation: their labels and splits, and how each lays out its files.

``BENCHMARKS`` is the one table; ``prepare`` turns what a download holds into nnU-Net's raw format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambamim_jax.data.datasets import DatasetError, read_json


@dataclass(frozen=True)
class Item:
    """One labelled case of a download; ``held_out`` is None where the set itself has no split."""

    id: str
    images: tuple[Path, ...]
    label: Path
    held_out: bool | None = None


@dataclass(frozen=True)
class Benchmark:
    """A public data set.

    Attributes:
      title: for dataset.json. layout: source folder → its labelled cases.
      labels: as dataset.json has them. channels: in order. writes: which value each region writes (regions).
      relabel: label values to change when prepared. split: in words, which cases are held out.
    """

    title: str
    layout: Callable[[Path], Iterator[Item]]
    labels: dict[str, Any]
    split: str
    channels: tuple[str, ...] = ("CT",)
    writes: tuple[int, ...] = ()
    relabel: dict[int, int] = field(default_factory=dict)

    @property
    def foreground(self) -> tuple[str, ...]:
        """Names of what is segmented."""
        return tuple(name for name in self.labels if name != "background")


def numbered(*names: str) -> dict[str, Any]:
    """{"background": 0, first name: 1, …}."""
    return {name: value for value, name in enumerate(("background", *names))}


def find_folder(source: Path, inside: str, *places: str) -> Path:
    """The first of ``source`` and these folders below it that holds something matching ``inside``.

    Raises: DatasetError if there is none.
    """
    for place in (".", *places):
        folder = source / place
        if folder.is_dir() and any(folder.glob(inside)):
            return folder
    tried = ", ".join(("there", *places))
    raise DatasetError(f"{source}: found no {inside} ({tried}); give the folder of the extracted download")


def there(path: Path, advice: str = "is the download complete?") -> Path:
    """The path.

    Raises: DatasetError if there is no such file.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: no such file, which its case needs; {advice}")
    return path


def btcv(source: Path) -> Iterator[Item]:
    """``img/img0001.nii.gz`` and ``label/label0001.nii.gz``."""
    folder = find_folder(
        source, "img/img*.nii.gz", "Training", "RawData/Training", "Abdomen/RawData/Training"
    )
    for image in sorted((folder / "img").glob("img[0-9][0-9][0-9][0-9].nii.gz")):
        number = image.name[3:7]
        label = there(folder / "label" / f"label{number}.nii.gz")
        yield Item(f"btcv_{number}", (image,), label, 35 <= int(number) <= 40)


def amos22(source: Path) -> Iterator[Item]:
    """``dataset.json`` with lists "training" and "validation"; numbers up to 500 are CT, the others MRI."""
    folder = find_folder(source, "dataset.json", "amos22")
    for key, held_out in (("training", False), ("validation", True)):
        for image, label in json_pairs(folder, key):
            number = re.fullmatch(r"amos_(\d+)\.nii\.gz", image.name)
            if not number:
                raise DatasetError(f"{image}: expected a name such as amos_0001.nii.gz")
            if int(number[1]) <= 500:
                yield Item(image.name.removesuffix(".nii.gz"), (there(image),), there(label), held_out)


def ct_org(source: Path) -> Iterator[Item]:
    """``volume-0.nii.gz`` and ``labels-0.nii.gz``."""
    folder = find_folder(source, "volume-*.nii.gz", "OrganSegmentations", "CT-ORG")
    for image in sorted(folder.glob("volume-*.nii.gz")):
        number = int(image.name.removeprefix("volume-").removesuffix(".nii.gz"))
        label = there(folder / f"labels-{number}.nii.gz")
        yield Item(f"ct_org_{number:03d}", (image,), label, number <= 20)


def kits23(source: Path) -> Iterator[Item]:
    """``case_00000/imaging.nii.gz`` and ``segmentation.nii.gz``."""
    folder = find_folder(source, "case_*", "dataset")
    for case in sorted(folder.glob("case_[0-9][0-9][0-9][0-9][0-9]")):
        image = there(case / "imaging.nii.gz", "its repository fetches images with kits23_download_data")
        yield Item(f"kits_{case.name[5:]}", (image,), there(case / "segmentation.nii.gz"))


def brats21(source: Path) -> Iterator[Item]:
    """``BraTS2021_00000/BraTS2021_00000_t1.nii.gz`` and _t1ce, _t2, _flair, _seg."""
    folder = find_folder(source, "BraTS2021_*/", "BraTS2021_Training_Data")
    for case in sorted(path for path in folder.glob("BraTS2021_[0-9]*") if path.is_dir()):
        files = [there(case / f"{case.name}_{name}.nii.gz") for name in ("t1", "t1ce", "t2", "flair", "seg")]
        yield Item(case.name, tuple(files[:4]), files[4])


def decathlon(task: str, *names: str) -> Callable[[Path], Iterator[Item]]:
    """``dataset.json`` with a list "training" and these label names, in a folder named for the task."""

    def layout(source: Path) -> Iterator[Item]:
        folder = find_folder(source, "dataset.json", task)
        found = read_json(folder / "dataset.json").get("labels")
        ours = {str(value): name for value, name in enumerate(("background", *names))}
        if not isinstance(found, dict) or {k: str(v).lower() for k, v in found.items()} != ours:
            raise DatasetError(f"{folder / 'dataset.json'}: labels {found}, expected those of {task}, {ours}")
        for image, label in json_pairs(folder, "training"):
            yield Item(image.name.removesuffix(".nii.gz"), (there(image),), there(label))

    return layout


def msd(task: str, title: str, *names: str) -> Benchmark:
    """A task of the Medical Segmentation Decathlon."""
    return Benchmark(f"MSD {title}", decathlon(task, *names), numbered(*names), FIVE_FOLDS)


def json_pairs(folder: Path, key: str) -> Iterator[tuple[Path, Path]]:
    """Image and label of each entry of a list in dataset.json."""
    path = folder / "dataset.json"
    entries = read_json(path).get(key)
    if not isinstance(entries, list):
        raise DatasetError(f"{path}: no list {key!r} of {{'image': path, 'label': path}}")
    for n, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("image", "label")):
            raise DatasetError(f"{path}: {key}[{n}] is {entry!r}, expected {{'image': path, 'label': path}}")
        yield folder / entry["image"], folder / entry["label"]


FIVE_FOLDS = "five seeded random folds; the set has no split of its own with public labels"
ABDOMEN = ("spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta")
BENCHMARKS: dict[str, Benchmark] = {
    "btcv": Benchmark(
        "BTCV (Synapse multi-atlas abdomen)",
        btcv,
        numbered(*ABDOMEN, "inferior_vena_cava", "portal_and_splenic_veins", "pancreas", "right_adrenal_gland",
                 "left_adrenal_gland"),
        "img0035 to img0040, as in MONAI's tutorials (24 train, 6 held out)",
    ),
    "amos22": Benchmark(
        "AMOS22, CT part (task 1)",
        amos22,
        numbered(*ABDOMEN, "postcava", "pancreas", "right_adrenal_gland", "left_adrenal_gland", "duodenum",
                 "bladder", "prostate_or_uterus"),
        "the set's own validation cases",
    ),
    "ct_org": Benchmark(
        "CT-ORG",
        ct_org,
        numbered("liver", "bladder", "lungs", "kidneys", "bone", "brain"),
        "the set's own test volumes, 0 to 20 (119 train, 21 held out)",
    ),
    "kits23": Benchmark("KiTS23", kits23, numbered("kidney", "tumor", "cyst"), FIVE_FOLDS),
    "brats21": Benchmark(
        "BraTS 2021",
        brats21,
        {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [1, 3], "enhancing_tumor": [3]},
        FIVE_FOLDS,
        channels=("T1", "T1ce", "T2", "FLAIR"),
        writes=(2, 1, 3),
        relabel={4: 3},
    ),
    "msd_lung": msd("Task06_Lung", "Lung", "cancer"),
    "msd_pancreas": msd("Task07_Pancreas", "Pancreas", "pancreas", "cancer"),
    "msd_hepatic_vessel": msd("Task08_HepaticVessel", "HepaticVessel", "vessel", "tumour"),
    "msd_spleen": msd("Task09_Spleen", "Spleen", "spleen"),
}  # fmt: skip
