"""What a fine-tuning run starts from: weights of ours or of the released code, with a report that tells misfits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mambamim_jax.checks import ConfigError
from mambamim_jax.convert import ConversionError, flatten, from_official
from mambamim_jax.model_files import CONFIG, ModelFileError, load_model
from mambamim_jax.paths import home
from mambamim_jax.train.optim import under
from mambamim_jax.types import NumpyArray
from mambamim_jax.weight_files import WeightFileError, read_arrays

ENCODER = "encoder"
HEADS = ("aux",)
"""Parts of a segmenter that serve in training alone and are in no file."""


@dataclass
class StartReport:
    """What became of every array; names are paths of our segmentation network.

    Attributes:
      source: where the weights are from. kind: "pre-training network", "encoder" or "segmentation network".
      matched, missing: of the network, found in the file or expected there.
      unexpected: parts of the encoder (of the whole, if it is a segmentation network) that the network lacks.
      wrong_shape: path → (found, expected). unused: of another decoder. new: drawn anew.
      numbers: path → how many numbers.
    """

    source: str
    kind: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """The misfits in one line, empty if there is none."""
        parts = []
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            parts += [f"{len(names)} {what} (first {names[0]})"] if names else []
        if self.wrong_shape:
            name, (found, expected) = next(iter(self.wrong_shape.items()))
            parts.append(
                f"{len(self.wrong_shape)} of another shape (first {name}: {found}, expected {expected})"
            )
        return ", ".join(parts)

    def __str__(self) -> str:
        groups = {name: getattr(self, name) for name in ("matched", "missing", "unexpected", "unused", "new")}
        groups["another shape"] = list(self.wrong_shape)
        lines = [f"starting from the {self.kind} in {self.source}"]
        for title, names in groups.items():
            if names:
                numbers = sum(self.numbers.get(name, 0) for name in names)
                lines.append(f"  {title:<13} {len(names):>4} arrays {numbers:>12,} numbers")
        return "\n".join(lines)


def load_start(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], *, partial: bool = False
) -> tuple[dict[str, NumpyArray], StartReport]:
    """Initial values {path: array} for a segmentation network with these shapes.

    A pre-training network gives its encoder; a segmentation network everything.

    Args:
      path: a model folder, a workdir of ours, or a file of our or the released code's weights.
      partial: take what fits in spite of misfits.

    Raises: ConfigError, one line, for what cannot be read or does not fit.
    """
    found = _read(home(path), partial)
    whole = "classify/kernel" in found
    kind = "segmentation network" if whole else "pre-training network"
    if all(under(name, (ENCODER,)) for name in found):
        kind = ENCODER
    report = StartReport(str(path), kind)
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    report.numbers = {name: int(np.size(a)) for name, a in found.items()} | sizes
    taken = {}
    for name, shape in shapes.items():
        wanted = (whole or under(name, (ENCODER,))) and not under(name, HEADS)
        if not wanted:
            report.new.append(name)
        elif name not in found:
            report.missing.append(name)
        elif found[name].shape != tuple(shape):
            report.wrong_shape[name] = (found[name].shape, tuple(shape))
        else:
            report.matched.append(name)
            taken[name] = found[name]
    for name in found.keys() - shapes.keys():
        (report.unexpected if whole or under(name, (ENCODER,)) else report.unused).append(name)
    report.unexpected.sort()
    if report.problem and not partial:
        expected = "weights of the network that config.model describes"
        advice = "match config.model to them, or --config.init_partial=true to take what fits"
        raise ConfigError("config.init", f"{path} does not fit: {report.problem}", expected, advice)
    return taken, report


def _read(path: Path, partial: bool) -> dict[str, NumpyArray]:
    """Arrays by our paths: "encoder/…" and whatever else there is."""
    try:
        if any((path / name / CONFIG).is_file() for name in ("", "best", "last")):
            model = load_model(path)
            arrays = flatten(model.params)
            alone = model.description["task"] == ENCODER
        else:
            arrays = read_arrays(path)
            ours = {n.removeprefix("params/"): a for n, a in arrays.items() if str(n).startswith("params/")}
            alone = bool(ours) and not any(under(name, (ENCODER,)) for name in ours)
            if not ours:
                weights = from_official(arrays, strict=not partial)
                ours, alone = flatten(weights.params), weights.report.task == ENCODER
            arrays = ours
    except (WeightFileError, ConversionError, ModelFileError) as error:
        advice = "or leave it empty to train from scratch"
        raise ConfigError("config.init", str(error), "weights to start from", advice) from None
    values: dict[str, Any] = {f"{ENCODER}/{name}" if alone else name: a for name, a in arrays.items()}
    return {name: np.asarray(a, np.float32) for name, a in values.items()}
