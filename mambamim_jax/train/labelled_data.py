"""From the settings to the data of fine-tuning: cases found and checked, prepared, split; one line on what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mambamim_jax.checks import ConfigError
from mambamim_jax.data import datasets, nifti, phantom, store, volume
from mambamim_jax.data.augment import Augmentation
from mambamim_jax.data.datasets import Case, DatasetError
from mambamim_jax.data.labelled import LabelledLoader
from mambamim_jax.data.labels import SPLITS, LabelTable, Split, make_split, read_table, take_share
from mambamim_jax.data.store import Store
from mambamim_jax.paths import home
from mambamim_jax.settings import PHANTOMS
from mambamim_jax.settings_finetune import FinetuneConfig, FinetuneDataConfig
from mambamim_jax.train.progress import Terminal


@dataclass(frozen=True)
class LabelledData:
    """What a fine-tuning run reads.

    Attributes:
      table: classes and channels. normalisation: one rule per channel, see ``data.intensity.normalise``.
      train, held_out: stores of the two sides of the split.
    """

    table: LabelTable
    normalisation: tuple[dict[str, Any], ...]
    train: Store
    held_out: Store


def find_source(config: FinetuneConfig, workdir: Path) -> Path:
    """The data set, phantoms made where those are asked for.

    Raises: ConfigError for a store, which holds no label table.
    """
    data = config.data
    if data.source == PHANTOMS:
        return phantom.write_phantoms(workdir / "phantoms", seed=data.split_seed, count=data.phantoms)
    source = home(data.source)
    if store.is_store(source):
        advice = "name the data set itself, and this folder as config.data.store"
        raise ConfigError(
            "config.data.source", f"found a store at {source}", "an nnU-Net raw data set", advice
        )
    return source


def read_labels(config: FinetuneConfig, workdir: Path) -> LabelTable:
    """The data set's table.

    Raises: DatasetError, ConfigError: there is none, or it is not the one that the settings expect.
    """
    table = read_table(find_source(config, workdir))
    check_names(table, config.data)
    rules(table, config.data)
    return table


def prepare_labelled(
    config: FinetuneConfig, table: LabelTable, workdir: Path, terminal: Terminal, goes_on: bool = False
) -> LabelledData:
    """Finds, checks and prepares the cases of the split.

    Args:
      goes_on: the run is there, and keeps the label maps that it began with where they are of an earlier recipe.

    Raises:
      DatasetError, DataLossError, StoreError: one line on what is wrong.
    """
    data, source = config.data, find_source(config, workdir)
    normalisation = rules(table, data)
    cases = {case.id: case for case in datasets.discover(source, data.format) if case.label is not None}
    split = find_split(sorted(cases), source, data)
    chosen = [cases[name] for name in (*split.train, *split.held_out)]
    with terminal.counting("Checking cases") as progress:
        for n, case in enumerate(chosen):
            check_case(case, table)
            progress(n + 1, len(chosen), case.id)
    kept = "; the run goes on with them, a new --workdir makes them again" if goes_on else ""
    with terminal.counting("Preparing volumes") as progress:
        prepared = store.prepare(
            chosen,
            home(data.store) if data.store else workdir / "store",
            spacing=data.spacing,
            window=data.window,
            intensity="hu" if normalisation[0]["kind"] == "window" else "zscore",
            report_path=workdir / "data_report.jsonl",
            max_lost=data.max_lost,
            old_labels=goes_on,
            workers=data.workers or None,
            progress=progress,
            say=lambda line: terminal.say(line + kept),
        )
    terminal.say(prepared.summary)
    check_labels(prepared, table)
    there = {entry.id for entry in prepared.entries}
    sides = [[name for name in side if name in there] for side in (split.train, split.held_out)]
    if not all(sides):
        raise DatasetError(f"{source}: no usable case left on one side of the split; see data_report.jsonl")
    terminal.say(f"{len(sides[0])} cases train, {len(sides[1])} are held out")
    return LabelledData(table, normalisation, prepared.select(sides[0]), prepared.select(sides[1]))


def make_loader(config: FinetuneConfig, data: LabelledData, rows: range | None = None) -> LabelledLoader:
    """Augmented crops of the training cases; ``rows``: those of each batch that this process reads."""
    names = Augmentation.__dataclass_fields__
    return LabelledLoader(
        data.train,
        crop=config.data.crop,
        normalisation=data.normalisation,
        positive=config.data.positive,
        how=Augmentation(**{name: getattr(config.augment, name) for name in names}),
        crops_per_volume=config.data.crops_per_volume,
        volumes_per_batch=config.data.volumes_per_batch,
        seed=config.seed,
        rows=rows,
        threads=config.data.threads,
        workers=config.data.processes,
    )


def check_names(table: LabelTable, data: FinetuneDataConfig) -> None:
    """Raises ConfigError unless the data set's labels are those that the settings expect, if any."""
    found = table.foreground
    if data.labels and data.labels != found:
        expected = f"the labels of the data set, {', '.join(found)}"
        advice = "is it another data set? launch/prepare.py makes the one that a preset expects"
        raise ConfigError("config.data.labels", f"found {', '.join(data.labels)}", expected, advice)


def rules(table: LabelTable, data: FinetuneDataConfig) -> tuple[dict[str, Any], ...]:
    """How each channel is normalised.

    Raises: DatasetError where "auto" would give CT and other channels of one data set different rules.
    """
    kinds = [data.normalisation] * len(table.channels)
    if data.normalisation == "auto":
        kinds = ["window" if name.upper().startswith("CT") else "zscore" for name in table.channels]
    if len(set(kinds)) > 1:
        channels = ", ".join(table.channels)
        raise DatasetError(f"channels {channels}: CT beside others; set config.data.normalisation for all")
    if kinds[0] == "window" and len(kinds) > 1:
        channels = ", ".join(table.channels)
        raise DatasetError(
            f"channels {channels}: CT has one; set config.data.normalisation=zscore for several"
        )
    low, high = data.window
    return tuple(
        {"kind": "window", "low": low, "high": high} if kind == "window" else {"kind": kind} for kind in kinds
    )


def find_split(ids: Sequence[str], source: Path, data: FinetuneDataConfig) -> Split:
    """The split that the settings mean, its training side reduced to ``label_fraction``.

    Raises: DatasetError if it does not fit the cases.
    """
    own = (source if source.is_dir() else source.parent) / SPLITS
    file = home(data.splits) if data.splits else own if own.is_file() else None
    split = make_split(ids, file, fold=data.fold, held_out=data.held_out, seed=data.split_seed)
    return replace(split, train=take_share(split.train, data.label_fraction, data.split_seed))


def check_case(case: Case, table: LabelTable) -> None:
    """Raises DatasetError unless a case has every channel, and its label lies on the image's grid; reads headers."""
    assert case.label is not None
    if len(case.images) != len(table.channels):
        expected = f"expected {len(table.channels)} ({', '.join(table.channels)}; dataset.json)"
        raise DatasetError(f"case {case.id!r}: {len(case.images)} channels, {expected}")
    try:
        first, *others = [nifti.read_grid(path) for path in (*case.images, case.label)]
    except volume.VolumeError as error:
        raise DatasetError(str(error)) from None
    for other, path in zip(others, (*case.images[1:], case.label)):
        if not volume.same_grid(first, other):
            sizes = ["x".join(map(str, v.voxels.shape)) for v in (other, first)]
            place = (
                f"grid {sizes[0]} does not cover that of {case.images[0].name}, {sizes[1]}, in the same place"
            )
            raise DatasetError(f"{path}: {place}")


def check_labels(prepared: Store, table: LabelTable) -> None:
    """Raises DatasetError for the first case whose label map cannot be used or has a value beyond the table."""
    for line in prepared.report:
        if line["status"] == "used" and line["label_status"] != "ok":
            raise DatasetError(f"case {line['id']!r}: its label can't be used: {line['label_status']}")
        if line["status"] == "duplicate":
            raise DatasetError(f"case {line['id']!r}: {line['message']}; leave one of them out of the split")
    for record in prepared.volumes:
        if max(record["label_values"]) >= len(table.names):
            found = (
                f"label value {max(record['label_values'])}, dataset.json knows 0 to {len(table.names) - 1}"
            )
            raise DatasetError(f"case {record['id']!r}: {found}; correct the label map or dataset.json")
