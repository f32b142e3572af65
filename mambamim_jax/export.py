"""A run's weights for others to use: a model folder, or a file in the authors' naming for PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambamim_jax.convert import to_official
from mambamim_jax.model_files import ModelFileError, find_model, load_model, save_model
from mambamim_jax.official_sizes import ConversionError
from mambamim_jax.paths import home
from mambamim_jax.types import Tree
from mambamim_jax.weight_files import SUFFIXES, nest, read_arrays, write_arrays

PARTS = ("whole", "encoder")


def export(source: str | Path, target: str | Path, part: str = "whole") -> str:
    """Writes a run's network, or its encoder alone.

    Args:
      source: a model folder, a fine-tuning workdir (its best) or a pre-training workdir (its newest checkpoint).
      target: a folder to make, or a .pth, .safetensors or .npz file, which gets the authors' names.
      part: one of ``PARTS``.

    Returns: a line on what was written.

    Raises: ModelFileError, WeightFileError or ConversionError, in one line; nothing is written then.
    """
    source, target = home(source), home(target)
    description, params, stats = read_network(source)
    if part == "encoder" and description["task"] != "encoder":
        description, params, stats = encoder_alone(description), params["encoder"], {}
    what = f"{description['encoder']}, {description['task']}"
    if target.suffix in SUFFIXES:
        arrays = official(description, params, stats, source)
        write_arrays(target, arrays)
        return f"{target}: {what}, {len(arrays)} arrays by the authors' names"
    if target.exists():
        raise ModelFileError(f"{target}: is there already; choose another place")
    save_model(target, description, params, stats)
    return f"{target}: {what}, as a model folder"


def read_network(source: Path) -> tuple[dict[str, Any], Tree, Tree]:
    """Description, parameters and batch statistics of a run or model folder.

    Raises: ModelFileError or WeightFileError if there is none.
    """
    try:
        find_model(source)
    except ModelFileError:
        if not (source / "checkpoints").is_dir():
            raise
        return read_pretraining(source)
    model = load_model(source)
    return model.description, model.params, model.batch_stats


def read_pretraining(workdir: Path) -> tuple[dict[str, Any], Tree, Tree]:
    """As ``read_network``, of a pre-training run's newest checkpoint.

    Raises: WeightFileError where it cannot be read, ModelFileError where it is of another kind of run.
    """
    trees = nest(read_arrays(workdir))
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    meta = workdir / "checkpoints" / str(newest) / "meta" / "metadata"
    try:
        config = json.loads(meta.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError):
        raise ModelFileError(f"{meta}: the checkpoint's settings cannot be read") from None
    if "model.mask_ratio" not in config:
        advice = "expected a pre-training run; a fine-tuning run writes best and last itself when it validates and ends"
        raise ModelFileError(f"{workdir}: holds neither a model nor a pre-training run; {advice}")
    return describe_pretraining(config, newest), trees["params"], trees.get("batch_stats", {})


def describe_pretraining(config: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What ``save_model`` needs to know, from a pre-training run's flat settings."""
    encoder = config["model.encoder"]
    own = f"model.{encoder}."
    low, high = config["data.window"]
    return {
        "task": "pretrain",
        "encoder": encoder,
        "encoder_config": {key.removeprefix(own): v for key, v in config.items() if key.startswith(own)},
        "in_channels": 1,
        "channel_names": ["CT"],
        "normalisation": [{"kind": "window", "low": low, "high": high}],
        "spacing": config["data.spacing"],
        "crop": config["data.crop"],
        "filler": config["model.filler"],
        "decoder_width": config["model.decoder_width"],
        "dtype": config["model.dtype"],
        "training": {
            "data": ", ".join(Path(source).name for source in str(config["data.source"]).split(",")),
            "steps": step,
            "mask ratio": config["model.mask_ratio"],
            "seed": config["seed"],
        },
    }


def encoder_alone(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a network's encoder."""
    kept = (
        "encoder",
        "encoder_config",
        "in_channels",
        "channel_names",
        "normalisation",
        "spacing",
        "crop",
        "dtype",
    )
    result = {key: description[key] for key in kept if key in description}
    training = {**description.get("training", {}), "trained as": f"part of a {description['task']} network"}
    return result | {"task": "encoder", "training": training}


def official(description: Mapping[str, Any], params: Tree, stats: Tree, source: Path) -> dict[str, Any]:
    """Arrays by the authors' names; raises ConversionError for a network they have no names for."""
    if description["encoder"] != "hymamba":
        raise ConversionError(
            f"{source}: encoder {description['encoder']}; only hymamba has an official form"
        )
    stem = description["encoder_config"]["channels"][0]
    if description["task"] == "segment" and description["head_width"] != stem:
        found = f"head_width {description['head_width']}"
        raise ConversionError(f"{source}: {found}; the authors' network has that of the stem, {stem}")
    return to_official(params, stats or None, {"size": tuple(description["crop"])})
