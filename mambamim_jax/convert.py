"""Released PyTorch weights ↔ ours, exact both ways (the table is in ``official_names``).

    weights = from_official(state_dict)                    # a dict of torch tensors or arrays
    state_dict = to_official(weights.params, weights.batch_stats)

What the released networks carry and never use (nearly half of the pre-training model) is listed in the load
report and, on the way back, filled with its initial values, so that PyTorch's strict ``load_state_dict``
passes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from flax import nnx

from mambamim_jax.model.encoder import HyMamba
from mambamim_jax.model.mim import MaskedImageModel
from mambamim_jax.model.rngs import Rngs
from mambamim_jax.model.segmenter import Segmenter
from mambamim_jax.official_names import Row, initial_value, rows
from mambamim_jax.official_sizes import ConversionError, Sizes, sizes_of_official, sizes_of_ours, with_config
from mambamim_jax.types import NumpyArray, Tree

Flat = dict[str, Any]
SHOWN = 5
"""Misfits of a kind that a report names."""
OWN = ("params/", "batch_stats/")
"""What the names in our files begin with."""


@dataclasses.dataclass
class LoadReport:
    """What became of every array of an official state dict, and of every one of ours.

    Attributes:
      task: "pretrain", "encoder" or "segment".
      matched: official name → our path.
      missing: official names that we need and the state dict lacks.
      unexpected: names of the state dict that the table does not know.
      wrong_shape: official name → (found, expected).
      unused: official name → why the released network never uses it.
      ours_alone: our paths without an official counterpart (a segmenter's mask token), set to zero.
      numbers: official name → how many numbers it holds.
    """

    task: str
    matched: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    unused: dict[str, str] = dataclasses.field(default_factory=dict)
    ours_alone: list[str] = dataclasses.field(default_factory=list)
    numbers: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every array of ours was found at its shape and nothing was left over."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    @property
    def problem(self) -> str:
        """The misfits in one line, the first of each kind by name."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing (first {self.missing[0]})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected (first {self.unexpected[0]})")
        if self.wrong_shape:
            name, (found, expected) = next(iter(self.wrong_shape.items()))
            first = f"first {name}: found {found}, expected {expected}"
            parts.append(f"{len(self.wrong_shape)} of a wrong shape ({first})")
        return ", ".join(parts)

    def __str__(self) -> str:
        """A table; the first misfits of each kind by name below it."""
        lines = [("", "arrays", "numbers")]
        groups = {"matched": list(self.matched), "missing": self.missing, "unexpected": self.unexpected}
        groups["wrong shape"] = list(self.wrong_shape)
        for reason in dict.fromkeys(self.unused.values()):
            groups[f"unused: {reason}"] = [name for name, why in self.unused.items() if why == reason]
        groups["ours alone, set to zero"] = self.ours_alone
        for title, names in groups.items():
            numbers = sum(self.numbers.get(name, 0) for name in names)
            lines.append((title, str(len(names)), f"{numbers:,}" if numbers else "-"))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        body = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in lines]
        wrong = [f"{name}: found {a}, expected {b}" for name, (a, b) in self.wrong_shape.items()]
        misfits = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": wrong}
        details = [f"{kind:<11}  {name}" for kind, some in misfits.items() for name in _first(some)]
        return "\n".join([f"official {self.task} weights", *body, *details])


def _first(names: list[str]) -> list[str]:
    """The first few, and how many more there are."""
    more = len(names) - SHOWN
    return names if more <= 0 else [*names[:SHOWN], f"… and {more} more"]


class Weights(NamedTuple):
    """Our two trees (nested plain dicts of NumPy arrays, as the training step takes them) and the report."""

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    report: LoadReport


def from_official(state_dict: Mapping[str, Any], config: Any = None, *, strict: bool = True) -> Weights:
    """Official state dict → our parameters and batch statistics.

    Args:
      state_dict: tensors or arrays by official name, of the pre-training network, its encoder alone or the
        fine-tuning network. A whole checkpoint (with ``module``), DDP's ``module.`` prefixes and a ``config``
        entry are seen through.
      config: sizes to insist on: a mapping with any of ``channels``, ``depths``, ``expansion``,
        ``mamba_depth``, ``decoder_width``, ``classes``, ``filler`` …, or a configuration of ours; what it
        leaves open is read off the shapes.
      strict: whether misfits raise; otherwise what does not fit is left out.

    Raises:
      ConversionError: one line; its ``report`` names everything. Also where nothing fits, whatever ``strict``.
    """
    theirs = unwrap(state_dict)
    sizes = with_config(sizes_of_official(theirs), config)
    params, stats = abstract_trees(sizes)
    shapes = flatten(params) | flatten(stats)
    report = LoadReport(sizes.task, numbers={name: int(np.prod(a.shape)) for name, a in theirs.items()})
    table = {row.official: row for row in rows(sizes)}
    report.unexpected = [name for name in theirs if name not in table]
    values: Flat = {}
    for name, row in table.items():
        if row.unused:
            if name in theirs:
                report.unused[name] = row.unused
        elif name not in theirs:
            report.missing.append(name)
        else:
            _take(row, theirs[name], shapes[row.ours].shape, values, report)
    taken = {row.ours for row in table.values()}
    report.ours_alone = [path for path in shapes if path not in taken]
    values |= {path: np.zeros(shapes[path].shape, np.float32) for path in report.ours_alone}
    if not report.matched or (strict and not report.ok):
        raise ConversionError(f"official {sizes.task} weights: {report.problem}", report)
    return Weights(_fill(params, values), _fill(stats, values), report)


def to_official(params: Tree, batch_stats: Tree | None = None, config: Any = None) -> dict[str, NumpyArray]:
    """Our parameters → official state dict, complete: PyTorch's strict load passes.

    Args:
      params: of our pre-training network, its HyMamba encoder alone or the segmentation network.
      batch_stats: running statistics of its BatchNorms; as initialised where not given.
      config: as in ``from_official``. Only the crop's ``size`` is not in the weights: the official position
        embedding has one entry per patch, for 96 voxels a side unless given.

    Raises:
      ConversionError: the tree is not one of ours, or its sizes are not those of ``config``.
    """
    ours = {path: np.asarray(leaf) for path, leaf in (flatten(params) | flatten(batch_stats or {})).items()}
    sizes = with_config(sizes_of_ours(ours), config)
    _check_shapes(ours, sizes)
    result = {}
    for row in rows(sizes):
        if row.unused:
            result[row.official] = initial_value(row, sizes)
        elif row.ours in ours:
            value = rearrange(ours.pop(row.ours), row.backwards)
            result[row.official] = np.ascontiguousarray(value)
        elif row.statistic and batch_stats is None:
            like = result[f"{row.official.rpartition('.')[0]}.weight"]
            result[row.official] = np.full_like(like, float(row.ours.endswith("/var")))
        else:
            raise ConversionError(
                f"our {sizes.task} weights: {row.ours} is missing (official {row.official})"
            )
    left = [path for path in ours if path != "encoder/mamba/mask_token"]  # which a Segmenter never reads
    if left:
        found = f"{len(left)} arrays without an official name (first {left[0]})"
        raise ConversionError(f"our {sizes.task} weights: {found}")
    return result


def _check_shapes(ours: Flat, sizes: Sizes) -> None:
    """Raises ConversionError if an array has another shape than in our network of these sizes."""
    shapes = {path: a.shape for tree in abstract_trees(sizes) for path, a in flatten(tree).items()}
    wrong = [path for path, array in ours.items() if path in shapes and array.shape != shapes[path]]
    if wrong:
        first = f"first {wrong[0]}: found {ours[wrong[0]].shape}, expected {shapes[wrong[0]]}"
        raise ConversionError(f"our {sizes.task} weights: {len(wrong)} of a wrong shape ({first})")


def _take(row: Row, tensor: Any, shape: tuple[int, ...], values: Flat, report: LoadReport) -> None:
    """Puts one official array, its axes in our order, into ``values``, or its misfit into the report."""
    try:
        value = rearrange(_as_numpy(tensor), row.pattern)
    except Exception:  # einops' own error: another number of axes, or an axis that should have length 1
        value = None
    if value is not None and value.shape == shape:
        values[row.ours] = np.ascontiguousarray(value)
        report.matched[row.official] = row.ours
    else:
        axes = row.backwards
        wanted = rearrange(np.empty(shape, np.bool_), axes).shape
        report.wrong_shape[row.official] = (tuple(tensor.shape), wanted)


def _as_numpy(tensor: Any) -> NumpyArray:
    """A torch tensor or any array; half precision, which only files carry, becomes float32."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() and tensor.itemsize == 2 else tensor).numpy()
    array = np.asarray(tensor)
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def unwrap(state_dict: Mapping[str, Any]) -> Flat:
    """The arrays of a state dict by their plain names, whatever they are wrapped in.

    Raises: ConversionError if there is none.
    """
    for key in ("module", "state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            return unwrap(state_dict[key])
    arrays = {str(name).removeprefix("module."): a for name, a in state_dict.items() if hasattr(a, "shape")}
    if not arrays:
        found = ", ".join(map(str, list(state_dict)[:5])) or "nothing"
        raise ConversionError(
            f"no arrays in the state dict: found {found}; expected official names, mae.pos_embed …"
        )
    if all(name.startswith(OWN) for name in arrays):
        found = f"{len(arrays)} arrays of ours (first {next(iter(arrays))})"
        raise ConversionError(
            f"found {found}; expected official names, mae.pos_embed … (ours: --to=official)"
        )
    return arrays


@functools.lru_cache(maxsize=8)
def abstract_trees(sizes: Sizes) -> tuple[Tree, Tree]:
    """Parameters and batch statistics of our network at these sizes, as shapes and dtypes only.

    Raises: ConversionError if it cannot have them.
    """

    def build() -> nnx.Module:
        rngs = Rngs(0)
        encoder = HyMamba(
            in_channels=sizes.in_channels,
            channels=sizes.channels,
            depths=sizes.depths,
            expansion=sizes.expansion,
            mamba_depth=sizes.mamba_depth,
            state=sizes.state,
            rngs=rngs,
        )
        if sizes.task == "encoder":
            return encoder
        if sizes.task == "segment":
            return Segmenter(encoder, classes=sizes.classes, head_width=sizes.channels[0], rngs=rngs)
        return MaskedImageModel(
            encoder,
            filler=sizes.filler,
            decoder_width=sizes.decoder_width,
            out_channels=sizes.in_channels,
            rngs=rngs,
        )

    try:
        state = nnx.state(nnx.eval_shape(build))
    except ValueError as error:
        raise ConversionError(f"{sizes.task} weights: no network has their sizes ({error})") from None
    params, stats = (nnx.to_pure_dict(nnx.filter_state(state, kind)) for kind in (nnx.Param, nnx.BatchStat))
    return params, stats


def flatten(tree: Tree) -> Flat:
    """Nested dict → {"a/0/b": leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _fill(tree: Tree, values: Flat) -> dict[str, Any]:
    """The tree with its leaves replaced by the values at their paths; leaves without a value are left out."""

    def visit(node: Any, path: str) -> Any:
        if not isinstance(node, Mapping):
            return values.get(path)
        items = {key: visit(child, f"{path}/{key}" if path else str(key)) for key, child in node.items()}
        return {key: child for key, child in items.items() if child is not None}

    return visit(tree, "")
