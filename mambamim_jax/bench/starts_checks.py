"""What a comparison of starts checks before its first stage: settings, data, and what its folder holds already."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mambamim_jax.bench.stages import ROOT, StageError, gpu_names
from mambamim_jax.checks import ConfigError
from mambamim_jax.config import parse_command_line
from mambamim_jax.data.datasets import DatasetError, discover
from mambamim_jax.data.labels import SPLITS, LabelTable, make_split
from mambamim_jax.evaluate.label_files import write_text
from mambamim_jax.paths import home
from mambamim_jax.settings import PretrainConfig, RunConfig, flat
from mambamim_jax.settings_finetune import FinetuneConfig, FinetuneDataConfig
from mambamim_jax.train.labelled_data import check_case, read_labels
from mambamim_jax.train.workdir import unwritable

C = TypeVar("C", bound=RunConfig)
SETTINGS = "settings.json"
OURS: Mapping[str, Sequence[str]] = {
    "pretrain": ("data.source",),
    "finetune": ("data.source", "data.store", "data.label_fraction", "data.split_seed", "seed", "init"),
}
"""Keys of the stages that the comparison sets itself."""
FREE = (
    *("log", "checkpoint", "mesh", "distributed", "remat", "model.scan", "validation.batch"),
    *("data.source", "data.workers", "data.threads", "data.processes"),
)
"""Keys and sections of the stages that change nothing in the table, and the source, which is compared by itself."""


def prepare(options: argparse.Namespace) -> None:
    """Checks everything that can be known before the first stage; then writes settings.json and the links to scans.

    Args:
      options: of ``launch/compare.py``; paths absolute, ``pretrain`` and ``finetune`` as ``find_config`` gives them.

    Raises: ConfigError, StageError, DatasetError, in one line; but for a disk that fails nothing is written then.
    """
    workdir: Path = options.workdir
    if not options.source.is_dir():
        raise ConfigError("--source", f"found no folder {options.source}", "an nnU-Net raw data set")
    pretrain = _parsed("pretrain", options, PretrainConfig)
    finetune = _parsed("finetune", options, FinetuneConfig)
    _check_encoder(pretrain, finetune)
    named = vars(options) | {"pretrain_settings": flat(pretrain), "finetune_settings": flat(finetune)}
    settings = json.loads(json.dumps(named, default=str))
    gpu_names(options.gpus)
    if workdir.exists() and not workdir.is_dir():
        expected = "a folder, new or of an earlier comparison"
        raise ConfigError("--workdir", f"found a file at {workdir}", expected)
    _check_settings(workdir, settings)
    links = links_of(options.source, finetune.data, read_labels(finetune, workdir))
    check_links(workdir / "data", links)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / SETTINGS, json.dumps(settings, indent=1) + "\n")
        make_links(workdir / "data", links)
    except OSError as error:
        raise unwritable(workdir, error) from None


def find_config(spec: str) -> str:
    """FILE[:PRESET], the file being looked for here and then beside ``launch``."""
    file, colon, preset = spec.partition(":")
    here, ours = home(file), ROOT / file
    return f"{ours}{colon}{preset}" if ours.is_file() and not here.is_file() else spec


def _parsed(script: str, options: argparse.Namespace, kind: type[C]) -> C:
    """The settings of a stage, as its own command line gives them.

    Raises: StageError.
    """
    flags: Sequence[str] = getattr(options, f"{script}_flag")
    try:
        for key in (flag.partition("=")[0] for flag in flags):
            if key in OURS[script]:
                expected = "a key that the comparison does not set itself"
                raise ConfigError(f"config.{key}", f"set by --{script}-flag", expected)
        arguments = [f"--config={getattr(options, script)}", *(f"--config.{flag}" for flag in flags)]
        arguments += [f"--config.data.source={options.source}", f"--workdir={options.workdir / script}"]
        return parse_command_line(arguments, kind, "")[0]
    except ConfigError as error:
        raise StageError(f"{script}: {error}") from None


def _check_encoder(pretrain: PretrainConfig, finetune: FinetuneConfig) -> None:
    """Raises ConfigError unless fine-tuning can start both from the pre-trained encoder and from scratch."""
    if finetune.init:
        found = f"{finetune.init!r} in the config of fine-tuning"
        raise ConfigError("config.init", f"found {found}", "nothing: one of the starts is from scratch")
    if finetune.init_partial:
        return
    before, after = (
        {"encoder": model.encoder, **dataclasses.asdict(getattr(model, model.encoder))}
        for model in (pretrain.model, finetune.model)
    )
    for key, value in before.items():
        if after.get(key) != value and key != "feature_depths":
            where = f"config.model.{key if key == 'encoder' else f'{pretrain.model.encoder}.{key}'}"
            found = f"found {after.get(key)!r} in fine-tuning"
            expected = f"that of pre-training, {value!r}, whose encoder it starts from"
            raise ConfigError(where, found, expected, "see --pretrain, --finetune and their flags")


def _check_settings(workdir: Path, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError if the folder holds a comparison whose runs these settings would not give."""
    path = workdir / SETTINGS
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = _changes(before, settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{path} is not readable ({type(error).__name__}: {error})"
        raise ConfigError("--workdir", found, "that of a comparison", "take another --workdir") from None
    if changed:
        advice = "take those, or another --workdir for a new one; only --seeds and --shares may grow"
        found = f"found {', '.join(changed)}"
        raise ConfigError("--workdir", found, f"the settings of the comparison in {workdir}", advice)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, but for --jobs, --gpus, further seeds and further shares."""
    pairs = {key: (before[key], now[key]) for key in ("source", "overlap")}
    kinds: Mapping[str, type[RunConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    for script, kind in kinds.items():
        old = before.get(f"{script}_settings")
        if old is None:  # of a version that kept the flags alone
            pairs[script] = find_config(before[script]), now[script]
            pairs[f"{script}_flag"] = before[f"{script}_flag"], now[f"{script}_flag"]
        else:
            new = now[f"{script}_settings"]
            default = json.loads(json.dumps(flat(kind()), default=str))  # for keys of later versions
            keys = [key for key in new if not any(f"{key}.".startswith(f"{name}.") for name in FREE)]
            pairs |= {f"{script}.{key}": (old.get(key, default.get(key)), new[key]) for key in keys}
    if now["seeds"] < before["seeds"]:
        pairs["seeds"] = before["seeds"], now["seeds"]
    if not {*before["shares"]} <= {*now["shares"]}:
        pairs["shares"] = before["shares"], now["shares"]
    return [f"{key} {new!r} (was {old!r})" for key, (old, new) in pairs.items() if old != new]


def links_of(source: Path, data: FinetuneDataConfig, table: LabelTable) -> dict[str, Path]:
    """Name → file of what ``train`` (scans), ``held_out`` (scans) and ``held_out_labels`` hold, by the set's own split.

    Raises: DatasetError if the data set or its split cannot be used.
    """
    cases = {case.id: case for case in discover(source, data.format) if case.label is not None}
    # Never a random split, which would be another one for every seed.
    split = make_split(sorted(cases), home(data.splits or source / SPLITS), fold=data.fold)
    pairs = [("held_out_labels/dataset.json", source / "dataset.json")]
    for side, ids in (("train", split.train), ("held_out", split.held_out)):
        for case in (cases[name] for name in ids):
            check_case(case, table)
            assert case.label is not None
            pairs += [(f"{side}/{path.name}", path) for path in case.images]
            pairs += [(f"held_out_labels/{case.label.name}", case.label)] if side == "held_out" else []
    links = dict(pairs)
    for name, path in pairs:
        if links[name] != path:
            raise DatasetError(f"{path}: found {links[name]}, too; expected names of scans that differ")
    return {name: path.resolve() for name, path in links.items()}


def check_links(folder: Path, links: Mapping[str, Path]) -> None:
    """Raises DatasetError if the folder holds anything but (some of) these links."""
    for path in sorted(folder.glob("*/*")):
        wanted = links.get(f"{path.parent.name}/{path.name}")
        if wanted is None or not path.is_symlink() or os.readlink(path) != str(wanted):
            expected = f"a link to {wanted}" if wanted else "only scans of --source and its split"
            advice = f"give the --source that {folder} is of, or another --workdir"
            raise DatasetError(f"{path}: found {os.path.realpath(path)}, expected {expected}; {advice}")


def make_links(folder: Path, links: Mapping[str, Path]) -> None:
    """Makes the links that are not there yet."""
    for name, target in links.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)
