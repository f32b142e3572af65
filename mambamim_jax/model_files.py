"""Model folders: a trained network as ``config.json``, ``model.safetensors`` and ``README.md``.

The layout of Hugging Face. Training writes them (WORKDIR/best, WORKDIR/last), prediction and export read them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambamim_jax import __version__, model_card
from mambamim_jax.checks import ConfigError
from mambamim_jax.model.encoder import ENCODERS
from mambamim_jax.model.mask import Mask
from mambamim_jax.model.mim import MaskedImageModel
from mambamim_jax.model.rngs import Rngs
from mambamim_jax.model.segmenter import Segmenter
from mambamim_jax.paths import home
from mambamim_jax.settings_model import ModelConfig
from mambamim_jax.train.build import build_encoder
from mambamim_jax.types import Array, NumpyArray, Tree
from mambamim_jax.weight_files import WeightFileError, nest, read_arrays, write_arrays

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT_VERSION = 1
TASKS = ("segment", "encoder", "pretrain")
ALWAYS = (
    "task",
    "encoder",
    "encoder_config",
    "in_channels",
    "channel_names",
    "normalisation",
    "spacing",
    "crop",
)
NETWORK = (
    *("task", "encoder", "encoder_config", "in_channels", "classes", "head_width"),
    *("filler", "decoder_width", "dtype"),
)
SEGMENT = ("classes", "head_width", "labels")


class ModelFileError(ValueError):
    """A model folder that cannot be written, found, read or used, in one line."""

    exit_code = 2


@dataclass(frozen=True)
class LoadedModel:
    """A network and what is needed to use it.

    Attributes:
      path: the model folder.
      description: its config.json, see ``save_model``.
      params, batch_stats: nested plain dicts of float32 NumPy arrays.
      apply: pure, to be jitted. "segment": (params, x (b, h, w, d, c)) → logits (b, h, w, d, classes) float32.
        "encoder": (params, x) → maps at strides 16, 8, 4, 2, 1. "pretrain": (params, x, ``model.mask.Mask``) →
        reconstruction (b, h, w, d, c). x is float32, normalised, its sides divisible by 16.
    """

    path: Path
    description: dict[str, Any]
    params: Tree
    batch_stats: Tree
    apply: Callable[..., Any]


def save_model(
    folder: str | Path, description: Mapping[str, Any], params: Tree, batch_stats: Tree | None = None
) -> Path:
    """Writes a model folder: aside first, then renamed in place of the one before.

    Args:
      folder: the model folder itself (WORKDIR/best, written whenever the validation Dice improves;
        WORKDIR/last, at the end).
      description: what becomes config.json; JSON types, tuples allowed.
        task: "segment" (a Segmenter), "encoder", or "pretrain" (a MaskedImageModel).
        encoder: its name in ``model.encoder.ENCODERS``; encoder_config: its settings' dataclass as a dict
          (``dataclasses.asdict(config.model.hymamba)``).
        in_channels; channel_names: one per channel.
        normalisation: one rule per channel, see ``data.intensity.normalise``.
        spacing: mm of the RAS grid that the network sees; crop: (h, w, d) of its training crops, the window of
          sliding-window prediction.
        classes, head_width: of the Segmenter ("segment").
        labels: {"0": "background", "1": name …}, every value that a label map may hold ("segment").
        regions: null (or left out) for a softmax over the labels, output channel = label. Otherwise one
          {"name", "labels": [values inside it], "writes": value} per output channel, each a sigmoid: a prediction
          starts at 0, and where a region's probability is at least 0.5, in the list's order, takes the value that
          it writes.
        filler, decoder_width: of the MaskedImageModel ("pretrain").
        dtype: compute type, "float32" (if left out) or "bfloat16".
        results: {"Dice": 0.81 …} and training: {"data": …, "steps": …}, both optional and free, go into the card.
        library, library_version and format_version are added.
      params: of exactly that network (averaged ones, if the run keeps an average), heads that serve only in
        training left out. batch_stats: running statistics, "pretrain" only.

    Raises:
      ModelFileError: a key is missing or does not fit, the parameters are not those of the network described, or
        the place cannot be written.
    """
    folder = home(folder)
    stamp = {"library": "mambamim_jax", "library_version": __version__, "format_version": FORMAT_VERSION}
    described = json.loads(json.dumps({**description, **stamp}))
    _check(described, folder)
    arrays = {f"params/{path}": leaf for path, leaf in flat(params).items()}
    arrays |= {f"batch_stats/{path}": leaf for path, leaf in flat(batch_stats or {}).items()}
    _check_arrays(arrays, described, folder)
    aside, before = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "before"))
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_arrays(aside / WEIGHTS, arrays)
        (aside / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        (aside / CARD).write_text(model_card.write(described), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(before, ignore_errors=True)
            os.replace(folder, before)
        os.replace(aside, folder)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, WeightFileError) as error:
        raise ModelFileError(f"{folder}: the model cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def load_model(path: str | Path, *, dtype: str | None = None) -> LoadedModel:
    """A network from a model folder, or from a fine-tuning workdir: its ``best``, else its ``last``.

    Args:
      dtype: compute type in place of the saved one.

    Raises: ModelFileError if there is none, it is damaged, of a newer format or not the network it says it is.
    """
    folder = find_model(path)
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{folder / CONFIG}: not readable as JSON ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(described, dict):
        raise ModelFileError(f"{folder / CONFIG}: expected an object, found {type(described).__name__}")
    if (version := described.get("format_version")) != FORMAT_VERSION:
        expected = f"expected {FORMAT_VERSION}; is it a model of mambamim_jax {__version__} or older?"
        raise ModelFileError(f"{folder / CONFIG}: format_version {version!r}, {expected}")
    described |= {"dtype": dtype} if dtype else {}
    _check(described, folder)
    try:
        arrays = read_arrays(folder / WEIGHTS)
    except WeightFileError as error:
        raise ModelFileError(str(error)) from None
    _check_arrays(arrays, described, folder)
    trees = nest(arrays)
    params, stats = trees["params"], trees.get("batch_stats", {})
    return LoadedModel(folder, described, params, stats, _apply(described, stats))


def find_model(path: str | Path) -> Path:
    """The model folder that a path means.

    Raises: ModelFileError if there is none.
    """
    path = home(path)
    for folder in (path, path / "best", path / "last"):
        for found in (
            folder,
            folder.with_name(f".{folder.name}.before"),
        ):  # a save was killed between its renames
            if (found / CONFIG).is_file():
                return found
    what = "no such folder" if not path.exists() else f"no {CONFIG} in it, nor in best or last in it"
    advice = "expected a model folder or the workdir of a fine-tuning run"
    if (path / "checkpoints").is_dir():
        advice = f"{advice}; a run's checkpoint becomes a model folder with launch/export.py"
    raise ModelFileError(f"{path}: {what}; {advice}")


def models(workdir: Path) -> list[str]:
    """Names of the model folders that a run has left in its workdir, with those that a killed save left."""
    names = ("best", "last")
    return [name for name in (*names, *(f".{name}.before" for name in names)) if (workdir / name).exists()]


def network_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """What of a description decides the network."""
    return {key: value for key, value in description.items() if key in NETWORK}


def build_network(description: Mapping[str, Any], rngs: nnx.Rngs) -> Any:
    """The network that a description means, newly initialised."""
    encoder_name, channels = description["encoder"], description["in_channels"]
    kind = _settings_of(encoder_name)
    own = {name: tuple(v) if isinstance(v, list) else v for name, v in description["encoder_config"].items()}
    dtype = description.get("dtype", "float32")
    config = ModelConfig(**{"encoder": encoder_name, encoder_name: kind(**own), "dtype": dtype})
    encoder = build_encoder(config, rngs, channels)
    if description["task"] == "encoder":
        return encoder
    options: dict[str, Any] = {"dtype": jnp.dtype(dtype), "rngs": rngs}
    if description["task"] == "segment":
        sizes = {name: description[name] for name in ("classes", "head_width")}
        return Segmenter(encoder, **sizes, **options)
    sizes = {"filler": description["filler"], "decoder_width": description["decoder_width"]}
    return MaskedImageModel(encoder, **sizes, out_channels=channels, **options)


def abstract_network(description: Mapping[str, Any]) -> Any:
    """The network that a description means, shapes and dtypes only."""
    return nnx.eval_shape(lambda: build_network(description, Rngs(0)))


def flat(tree: Tree) -> dict[str, NumpyArray]:
    """Nested dict → {"a/0/b": NumPy array}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def _apply(description: Mapping[str, Any], stats: Tree) -> Callable[..., Any]:
    graph, _ = _structure(description)

    def apply(params: Tree, x: Array, mask: Mask | None = None) -> Any:
        network = nnx.merge(graph, params, stats)
        return network(x, mask, train=False) if description["task"] == "pretrain" else network(x)

    return apply


def _structure(description: Mapping[str, Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """The network's graph, and the shapes of its arrays by the names they have in a file."""
    return _structure_of(json.dumps(network_of(description), sort_keys=True))


@cache
def _structure_of(sizes: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    graph, *states = nnx.split(abstract_network(json.loads(sizes)), nnx.Param, nnx.BatchStat)
    trees = {name: nnx.to_pure_dict(state) for name, state in zip(("params", "batch_stats"), states)}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(leaf.shape) for p, leaf in leaves}
    return graph, shapes


def _settings_of(encoder: str) -> type:
    return next(f.default_factory for f in dataclasses.fields(ModelConfig) if f.name == encoder)  # type: ignore


def _check(description: Mapping[str, Any], folder: Path) -> None:
    """Raises ModelFileError for what is missing or contradicts itself."""

    def require(ok: bool, key: str, expected: str) -> None:
        if not ok:
            found = repr(description[key]) if key in description else "nothing"
            raise ModelFileError(f"{folder / CONFIG}: {key}: found {found}, expected {expected}")

    task = description.get("task")
    require(task in TASKS, "task", f"one of {', '.join(TASKS)}")
    for key in (*ALWAYS, *(SEGMENT if task == "segment" else ())):
        require(key in description, key, "a value")
    require(description["encoder"] in ENCODERS, "encoder", f"one of {', '.join(ENCODERS)}")
    channels = description["in_channels"]
    require(isinstance(channels, int) and channels > 0, "in_channels", "a positive number")
    for key in ("normalisation", "channel_names"):
        require(isinstance(description[key], list) and len(description[key]) == channels, key,
                f"a list of {channels}, one per channel")  # fmt: skip
    for key in ("spacing", "crop"):
        value = description[key]
        ok = isinstance(value, list) and len(value) == 3 and all(v > 0 for v in value)
        require(ok, key, "three positive numbers")
    require(description.get("dtype", "float32") in ("float32", "bfloat16"), "dtype", "float32 or bfloat16")
    if task == "segment":
        regions, count = description.get("regions"), description["classes"]
        table = regions if regions else description["labels"]
        require(len(table) == count, "classes", f"{len(table)}, one per {'region' if regions else 'label'}")
    if task == "pretrain":
        require(
            "filler" in description and "decoder_width" in description,
            "filler",
            "a value, with decoder_width",
        )


def _check_arrays(arrays: Mapping[str, NumpyArray], description: Mapping[str, Any], folder: Path) -> None:
    """Raises ModelFileError unless the arrays are exactly those of the network described."""
    try:
        _, wanted = _structure(description)
    except (ConfigError, TypeError, ValueError, KeyError) as error:
        raise ModelFileError(f"{folder / CONFIG}: no network can be built from it ({error})") from None
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    if found == wanted:
        return
    missing, left = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    parts = [f"{len(names)} {what} (first {names[0]})" for names, what in
             ((missing, "missing"), (left, "unexpected")) if names]  # fmt: skip
    if wrong:
        first = f"first {wrong[0]}: found {found[wrong[0]]}, expected {wanted[wrong[0]]}"
        parts.append(f"{len(wrong)} of a wrong shape ({first})")
    network_name = f"the {description['encoder']} {description['task']} network that {CONFIG} describes"
    raise ModelFileError(f"{folder}: the weights are not those of {network_name}: {', '.join(parts)}")
