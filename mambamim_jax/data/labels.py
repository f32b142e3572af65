"""What the values of a data set's label maps mean, and which cases train and which are held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambamim_jax.data.datasets import DatasetError

SPLITS = "splits_final.json"


@dataclass(frozen=True)
class Region:
    """A union of labels that is segmented as one (BraTS): its name, the values inside, the value that it writes.

    In a prediction, regions are written in their order, later ones over earlier ones.
    """

    name: str
    labels: tuple[int, ...]
    writes: int


@dataclass(frozen=True)
class LabelTable:
    """``names[v]`` says what value ``v`` is, 0 the background; ``regions`` where labels overlap."""

    names: tuple[str, ...]
    regions: tuple[Region, ...]
    channels: tuple[str, ...]

    @property
    def classes(self) -> int:
        """Output channels of the network: one per value, background too; or one per region."""
        return len(self.regions) or len(self.names)

    @property
    def foreground(self) -> tuple[str, ...]:
        """What is measured: regions, or names but for the background."""
        return tuple(region.name for region in self.regions) or self.names[1:]


def read_table(source: Path) -> LabelTable:
    """The labels and channels of a data set, from its ``dataset.json`` (nnU-Net raw or Decathlon).

    Raises:
        DatasetError: no such file, or a table that can't be used.
    """
    path = source if source.suffix == ".json" else source / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = content["labels"]
        channels = content.get("channel_names") or content["modality"]
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; fine-tuning needs its label table (nnU-Net raw)") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path}: expected labels and channel_names ({type(error).__name__} {error})"
        ) from None
    names, regions = _labels(labels, content.get("regions_class_order"), path)
    if not isinstance(channels, dict) or not all(str(key).isdecimal() for key in channels):
        raise DatasetError(f"{path}: channel_names {channels!r}, expected such as {{'0': 'CT'}}")
    ordered = sorted(channels.items(), key=lambda item: int(item[0]))
    return LabelTable(names, regions, tuple(str(name) for _, name in ordered))


def _labels(labels: Any, order: Any, path: Path) -> tuple[tuple[str, ...], tuple[Region, ...]]:
    """Names by value, and regions: {"liver": 1}, {"1": "liver"} (Decathlon) or {"tumour": [1, 2]}."""
    expected = "expected such as {'background': 0, 'liver': 1}, values 0, 1, 2 … without a gap"
    if not isinstance(labels, dict) or not labels:
        raise DatasetError(f"{path}: labels {labels!r}, {expected}")
    if "ignore" in labels:
        raise DatasetError(f"{path}: an 'ignore' label, which is not supported; leave such cases out")
    by_value = all(isinstance(name, str) for name in labels.values())
    try:
        pairs = [(name, value) if by_value else (value, name) for value, name in labels.items()]
        values = {name: label_values(value) for name, value in pairs}
    except ValueError:
        raise DatasetError(f"{path}: labels {labels}, {expected}") from None
    known = sorted({value for inside in values.values() for value in inside})
    if known != list(range(len(known))) or len(known) < 2:
        raise DatasetError(f"{path}: label values {known}, {expected}")
    single = {inside[0]: name for name, inside in values.items() if len(inside) == 1}
    names = tuple(single.get(value, f"label_{value}") for value in known)
    if all(len(inside) == 1 for inside in values.values()):
        return names, ()
    inside = {name: found for name, found in values.items() if found != (0,)}
    fits = isinstance(order, list) and len(order) == len(inside) and all(w in known[1:] for w in order)
    if not fits or len(set(order)) < len(order):
        raise DatasetError(
            f"{path}: regions_class_order {order!r}, expected the value that each of {', '.join(inside)} writes, "
            "not 0 and none twice"
        )
    return names, tuple(Region(name, found, int(w)) for (name, found), w in zip(inside.items(), order))


def label_values(value: Any) -> tuple[int, ...]:
    """The values that an entry of a label table stands for: one, or those of a list.

    Raises: ValueError for what is no whole number, and for a list of none.
    """
    found = value if isinstance(value, list) else [value]
    if not found or not all(str(v).removesuffix(".0").removeprefix("-").isdecimal() for v in found):
        raise ValueError(f"value {value!r}, expected a whole number or a list of them")
    return tuple(int(float(v)) for v in found)


@dataclass(frozen=True)
class Split:
    """Ids of the cases that train and of those held out, sorted."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def make_split(
    ids: Sequence[str], file: Path | None, *, fold: int = 0, held_out: float = 0.2, seed: int = 0
) -> Split:
    """The split of a file such as nnU-Net's ``splits_final.json``, or a seeded random one.

    Args:
        ids: of the labelled cases that there are. file: None for a random split. fold: which entry of the file.
        held_out: share of the cases, at least one, in a random split; seed: of its draw.

    Raises:
        DatasetError: an unreadable file, no such fold, or a case that is not there, on both sides or there twice.
    """
    if file is None:
        order = np.random.default_rng((seed, len(ids))).permutation(len(ids))
        count = min(max(1, round(held_out * len(ids))), len(ids) - 1)
        if count < 1:
            raise DatasetError(f"{len(ids)} labelled cases, expected at least 2: one to train, one held out")
        chosen = [sorted(ids)[n] for n in order]
        return Split(tuple(sorted(chosen[count:])), tuple(sorted(chosen[:count])))
    try:
        folds = json.loads(file.read_text(encoding="utf-8"))
        entry = {name: tuple(sorted(map(str, folds[fold][name]))) for name in ("train", "val")}
    except IndexError:
        raise DatasetError(f"{file}: no fold {fold}, it has {len(folds)}, counted from 0") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DatasetError(f"{file}: expected a list of {{'train': ids, 'val': ids}} ({reason})") from None
    missing = [name for side in entry.values() for name in side if name not in set(ids)]
    if missing:
        raise DatasetError(
            f"{file}: fold {fold} names {len(missing)} cases without an image and a label, first "
            f"{missing[0]!r}; add them or change the split"
        )
    twice = [name for side in entry.values() for name, count in Counter(side).items() if count > 1]
    if twice:
        raise DatasetError(f"{file}: fold {fold} names case {twice[0]!r} twice on one side; keep one of them")
    both = sorted(set(entry["train"]) & set(entry["val"]))
    if both or not all(entry.values()):
        found = f"case {both[0]!r} in both train and val" if both else "an empty train or val"
        raise DatasetError(f"{file}: fold {fold} has {found}")
    return Split(entry["train"], entry["val"])


def take_share(ids: Sequence[str], share: float, seed: int) -> tuple[str, ...]:
    """A seeded random share of the cases, at least one, sorted; a smaller share is part of a larger one."""
    count = max(1, round(share * len(ids)))
    order = np.random.default_rng((seed, len(ids))).permutation(len(ids))
    return tuple(sorted(sorted(ids)[n] for n in order[:count]))
