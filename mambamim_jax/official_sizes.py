"""The sizes that official names and shapes depend on: read off weights of either kind, or given."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambamim_jax.types import Size3

PATCH = 16
LARGEST = 1024
"""Voxels a side up to which a position embedding, with a row for each of 64³ patches then, is made."""


class ConversionError(ValueError):
    """Weights that do not fit, in one line."""

    exit_code = 2

    def __init__(self, message: str, report: Any = None):
        super().__init__(message)
        self.report = report
        """The ``LoadReport`` with the whole story, if one was drawn up."""


@dataclass(frozen=True)
class Sizes:
    """Everything the table depends on.

    Attributes:
      task: "pretrain", "encoder" or "segment".
      filler: what fills hidden tokens; decides where A_interpolation and mask_tokens.0 go.
      grid: patches along each axis, which only the position embedding depends on.
    """

    task: str
    in_channels: int = 1
    channels: tuple[int, ...] = (32, 64, 128, 192, 384)
    depths: tuple[int, ...] = (2, 2, 2, 1)
    expansion: tuple[int, ...] = (2, 4, 4, 4)
    mamba_depth: int = 4
    state: int = 16
    decoder_width: int = 768
    filler: str = "toki"
    classes: int = 14
    grid: Size3 = (6, 6, 6)

    @property
    def width(self) -> int:
        """Channels of the deepest map."""
        return self.channels[-1]


def sizes_of_official(arrays: Mapping[str, Any]) -> Sizes:
    """Sizes as the shapes tell them; the paper's where an array is missing (the report will say so)."""
    task = "encoder"
    if any(name.startswith(("sparse_encoder.", "dense_decoder.")) for name in arrays):
        task = "pretrain"
    elif any(name.startswith("decoder.") for name in arrays):
        task = "segment"
    prefix = "sparse_encoder." if task == "pretrain" else ""
    paper = Sizes(task)

    def size(name: str, axis: int, otherwise: int) -> int:
        shape = arrays[name].shape if name in arrays else ()
        return int(shape[axis]) or otherwise if axis < len(shape) else otherwise

    embeddings = f"{prefix}embeddings."
    names = ("stem", "expend1", "expend2", "expend3", "expend4")
    channels = tuple(size(f"{embeddings}{n}.weight", 0, c) for n, c in zip(names, paper.channels))
    layers = [f"{embeddings}layer{n}" for n in (2, 3, 4, 5)]
    ratios = zip(layers, paper.expansion, channels[1:])
    hidden = [size(f"{layer}.0.conv2.weight", 0, ratio * c) for layer, ratio, c in ratios]
    side = round(size(f"{prefix}mae.pos_embed", 1, 216) ** (1 / 3))
    return Sizes(
        task,
        in_channels=size(f"{embeddings}stem.weight", 1, 1),
        channels=channels,
        depths=tuple(_count(arrays, re.escape(layer)) or d for layer, d in zip(layers, paper.depths)),
        expansion=tuple(max(1, h // c) for h, c in zip(hidden, channels[1:])),
        mamba_depth=_count(arrays, rf"{re.escape(prefix)}mae\.blocks") or paper.mamba_depth,
        state=size(f"{prefix}mae.blocks.0.mamba.A_log", 1, paper.state),
        decoder_width=size("dense_decoder.dec.0.up_sample.weight", 0, paper.decoder_width),
        classes=size("decoder.out.conv.weight", 0, paper.classes),
        grid=(side, side, side),
    )


def sizes_of_ours(arrays: Mapping[str, Any]) -> Sizes:
    """Sizes as our shapes tell them.

    Raises: ConversionError if the tree is not one that the table knows.
    """
    task = "encoder"
    if "mask_tokens/0" in arrays:
        task = "pretrain"
    elif "classify/kernel" in arrays:
        task = "segment"
    prefix = "" if task == "encoder" else "encoder/"
    try:
        return _sizes_of_ours(arrays, task, prefix)
    except KeyError as error:
        found = ", ".join(list(arrays)[:3]) or "nothing"
        expected = f"expected a HyMamba network with {error.args[0]}; no other has an official form"
        raise ConversionError(f"our weights: found {found}…, {expected}") from None
    except (IndexError, ZeroDivisionError) as error:
        found = f"arrays that no HyMamba network has the shapes of ({error})"
        raise ConversionError(f"our weights: found {found}; no other has an official form") from None


def _sizes_of_ours(arrays: Mapping[str, Any], task: str, prefix: str) -> Sizes:
    stem = arrays[f"{prefix}stem/kernel"].shape
    expand = [arrays[f"{prefix}stages/{n}/0/expand/kernel"].shape for n in range(4)]
    transition = getattr(arrays.get("transition"), "ndim", 0)
    return Sizes(
        task,
        in_channels=stem[3],
        channels=(stem[4], *(shape[0] for shape in expand)),
        depths=tuple(_count(arrays, rf"{prefix}stages/{n}") for n in range(4)),
        expansion=tuple(shape[1] // shape[0] for shape in expand),
        mamba_depth=_count(arrays, f"{prefix}mamba/layers"),
        state=arrays[f"{prefix}mamba/layers/0/mamba/A_log"].shape[1],
        decoder_width=arrays["decoder/upsample/0/kernel"].shape[3] if task == "pretrain" else 768,
        filler=("linear", "learned_token", "toki")[transition],
        classes=arrays["classify/kernel"].shape[1] if task == "segment" else 14,
    )


def _count(arrays: Mapping[str, Any], prefix: str) -> int:
    """How many numbered members a list has, which are no more than there are arrays."""
    found = (re.match(rf"{prefix}[./](\d+)[./]", name) for name in arrays)
    return min(1 + max((int(match.group(1)) for match in found if match), default=-1), len(arrays))


def with_config(sizes: Sizes, config: Any) -> Sizes:
    """``sizes`` with what ``config`` says in their place.

    Args:
      config: None; a mapping with any field of ``Sizes`` and ``size`` (voxels a side, one number or three),
        depths and expansion with or without the unused first number of the released code; or a configuration
        of ours.

    Raises: ConversionError for an encoder that has no official form or values that make no sense.
    """
    if config is None:
        return sizes
    given = dict(config) if isinstance(config, Mapping) else _from_settings(config)
    try:
        if "size" in given:
            sides = given["size"] if isinstance(given["size"], (list, tuple)) else [given["size"]] * 3
            given["grid"] = tuple(_patches(side) for side in sides)
        for name in ("depths", "expansion"):
            if name in given:
                given[name] = tuple(given[name])[-4:]
        known = {field.name for field in dataclasses.fields(Sizes)} - {"task"}
        chosen: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in known
        }
        return dataclasses.replace(sizes, **chosen)
    except ConversionError:
        raise
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config: {error}; expected sizes such as channels, depths, size") from None


def _patches(side: Any) -> int:
    """Patches along a side of a crop.

    Raises: ConversionError for a side that the official network cannot have.
    """
    if side % PATCH or not PATCH <= side <= LARGEST:
        expected = f"voxels a side, divisible by {PATCH}, from {PATCH} to {LARGEST}, such as 96"
        raise ConversionError(f"size: found {side}, expected {expected}")
    return int(side) // PATCH


def _from_settings(config: Any) -> dict[str, Any]:
    """A configuration of ours (its model section, and the crop) as a mapping."""
    model = getattr(config, "model", config)
    if getattr(model, "encoder", "hymamba") != "hymamba":
        raise ConversionError(
            f"config.model.encoder: found {model.encoder}; only hymamba has an official form"
        )
    names = ("channels", "depths", "expansion", "mamba_depth", "state")
    given = {name: getattr(model.hymamba, name) for name in names}
    given |= {name: getattr(model, name) for name in ("decoder_width", "filler") if hasattr(model, name)}
    if hasattr(config, "data"):
        given["size"] = tuple(config.data.crop)
    return given
