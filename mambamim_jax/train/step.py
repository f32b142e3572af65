"""One training step for any task: a pure jitted function on plain dicts.

The state is {"params", "batch_stats", "opt_state", "step"}; ``step`` counts the updates done. A step's key is
a function of (seed, step), so a resumed run draws what an undisturbed one would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mambamim_jax.lean import compile_lean
from mambamim_jax.train.optim import AdamW, Schedule, map_with_path, paths
from mambamim_jax.train.sharding import Placement, host_device, on_host, one_device
from mambamim_jax.types import Array, NumpyArray, Tree

State: TypeAlias = dict[str, Any]
Batch: TypeAlias = dict[str, Any]
RUN_SELDOM: dict[str, str | bool | int | float] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
"""For what runs seldom: compiled in a fraction of the time (random numbers: a sixth), but slower."""
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
}
"""What of the forward pass is kept for the backward, by name: all that it reads; or the results of convolutions and
matrix products alone, from which the rest (norms, activations, depthwise convolutions, scans) is computed again."""
STOP = "stop"
"""Part of a batch, int32 (devices,): the number of a signal that a device's process has caught, or 0."""
Loss: TypeAlias = Callable[[Tree, Tree, Batch, Array], tuple[Array, Tree]]


EMA_START = 10
"""The moving average forgets faster at first: its decay is at most (1 + step) / (EMA_START + step)."""


def _keep(batch: Batch, key: Array) -> Batch:
    return batch


class Validation(Protocol):
    """What the loop does on held-out data, at an interval and at the end; in the first process alone.

    A state is here {"params", "batch_stats", "ema" if there is one}, whole and on the host.
    """

    @property
    def every(self) -> int:
        """Steps between two measurements; there is one at the last step, too."""

    def begin(self) -> None:
        """Called before the first step, and not where a run goes on from a checkpoint."""

    def measure(
        self, step: int, state: State, earlier: Sequence[Mapping[str, Any]], check: Callable[[], None]
    ) -> dict[str, Any]:
        """The row for validation.jsonl, JSON-able; ``earlier`` are those before. Numbers also go to TensorBoard.

        ``check`` is called every few seconds and raises where the run has to end first: nothing is left behind then.
        """

    def finish(self, step: int, state: State) -> None:
        """Called once after the last step."""


@dataclass(frozen=True)
class Task:
    """What the loop trains: everything that differs between pre-training and fine-tuning.

    Attributes:
      name: for headings.
      inputs: which parts of the loader's batches it takes.
      init: key → (params, batch_stats), plain nested dicts; pure, so that it can be jitted and sharded.
      loss: (params, batch_stats, batch, key) → (float32 scalar, new batch_stats).
      prepare: (batch, key) → batch, on the whole global batch, before micro-batches are cut; draws masks.
      panel: (params, batch_stats, batch, key) → {title: (b, h, w, d)} for ``visualise``, or None.
      titles: of the pictures, in order.
      unused_parameters: path prefixes that the loss never reaches.
      description: lines for the summary.
      loaded: {path: array} of parameters that a new run starts from in place of the drawn ones.
      rate_scales: (path prefix, factor) pairs, see ``optim.AdamW``.
      ema: decay of a moving average of the parameters, kept as state["ema"]; 0 for none.
      validation: on held-out data, or None.
    """

    name: str
    init: Callable[[Array], tuple[Tree, Tree]]
    loss: Loss
    prepare: Callable[[Batch, Array], Batch] = _keep
    panel: Callable[[Tree, Tree, Batch, Array], dict[str, Array]] | None = None
    titles: tuple[str, ...] = ()
    unused_parameters: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("image",)
    description: tuple[str, ...] = ()
    loaded: Mapping[str, NumpyArray] = field(default_factory=dict)
    rate_scales: tuple[tuple[str, float], ...] = ()
    ema: float = 0.0
    validation: Validation | None = None


def _create(task: Task, optimiser: AdamW, key: Array) -> State:
    params, stats = task.init(key)
    moments, step = optimiser.init(params), jnp.zeros((), jnp.int32)
    state = {"params": params, "batch_stats": stats, "opt_state": moments, "step": step}
    return state | ({"ema": jax.tree.map(jnp.copy, params)} if task.ema else {})


def initial_state(task: Task, optimiser: AdamW, seed: int, placement: Placement | None = None) -> State:
    """The state before the first update, divided as ``placement`` says.

    The host draws it, for accelerators too: in seconds, where compiling some hundred small draws for a GPU takes most
    of a minute, and the same numbers whatever the device.
    """
    create = jax.jit(lambda seed: _create(task, optimiser, jax.random.key(seed)), compiler_options=RUN_SELDOM)
    with jax.default_device(host_device()):
        drawn = jax.device_get(create(np.int32(seed)))
    return with_loaded((placement or one_device()).spread(drawn), task.loaded)


def with_loaded(state: State, loaded: Mapping[str, NumpyArray]) -> State:
    """A new state whose parameters (and their average) at these paths are replaced, placed as they were."""

    def place(path: str, leaf: Array) -> Array:
        return jax.device_put(loaded[path].astype(leaf.dtype), leaf.sharding) if path in loaded else leaf

    parts = [name for name in ("params", "ema") if name in state]
    return state | {name: map_with_path(place, state[name]) for name in parts}


def abstract_state(task: Task, optimiser: AdamW) -> State:
    """Shapes and dtypes of the state."""
    return jax.eval_shape(partial(_create, task, optimiser), jax.random.key(0))


def step_key(seed: Array | int, step: Array | int) -> Array:
    """The key of a step, a function of (seed, step) alone."""
    return jax.random.fold_in(jax.random.key(seed), step)


class Step:
    """A jitted step, compiled when it is first called, for what it is then given.

    Args:
      jitted: (state, *placed, batch) → (state, metrics). placed: what is the same at every step.
    """

    def __init__(self, jitted: jax.stages.Wrapped, placed: Sequence[Array]):
        self.jitted, self.placed = jitted, placed
        self.compiled: jax.stages.Compiled | None = None

    def trace(self, state: State, batch: Batch) -> jax.stages.Traced:
        """Of arrays, or of their shapes, dtypes and shardings."""
        return self.jitted.trace(state, *self.placed, batch)

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, Any]]:
        if self.compiled is None:
            self.compiled = compile_lean(self.trace(state, batch).lower())
        return self.compiled(state, *self.placed, batch)


def make_step(
    task: Task,
    optimiser: AdamW,
    schedule: Schedule,
    *,
    seed: int,
    accumulate: int = 1,
    remat: str = "none",
    placement: Placement | None = None,
) -> Step:
    """The step: (state, batch) → (state, metrics). The given state is donated.

    A step whose loss or gradient norm is not finite leaves the state as it was.

    Args:
      accumulate: micro-batches per update; gradient and loss are their means, BatchNorm sees each in turn.
      remat: what is kept for the backward pass, a name in ``REMAT``.
      placement: over which devices, and how; None for one device.

    Returns:
      A function whose metrics are {"loss", "grad_norm", "lr", "weight_decay", "finite", "grad_squares"}, the
      last being the squared gradient norm of each tensor in the order of ``optimiser.trained``; and "stop",
      the largest entry of the batch's ``STOP`` where it has one.
    """
    table = np.asarray(schedule.table(), dtype=np.float32)
    task_loss = placement.gathering(task.loss) if placement else task.loss
    if REMAT[remat]:
        task_loss = jax.checkpoint(task_loss, policy=REMAT[remat])

    def step(state: State, table: Array, seed: Array, batch: Batch) -> tuple[State, dict[str, Any]]:
        key_prepare, key_loss = jax.random.split(step_key(seed, state["step"]))
        batch, stop = {name: part for name, part in batch.items() if name != STOP}, batch.get(STOP)
        batch = task.prepare(batch, key_prepare)
        loss, grads, stats = _gradients(task_loss, state, batch, key_loss, accumulate)
        lr, decay = table[state["step"]]
        params, opt_state, squares = optimiser.update(grads, state["opt_state"], state["params"], lr, decay)
        norm = jnp.sqrt(jnp.sum(squares))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = {"params": params, "batch_stats": stats, "opt_state": opt_state, "step": state["step"] + 1}
        if task.ema:
            new["ema"] = _average(state["ema"], params, task.ema, state["step"])
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        metrics = {"loss": loss, "grad_norm": norm, "lr": lr, "weight_decay": decay, "finite": finite}
        metrics |= {"grad_squares": squares} | ({} if stop is None else {"stop": jnp.max(stop)})
        return new, metrics

    # The seed is an argument too: runs that differ in it alone share what was compiled.
    given = (table, np.int32(seed))
    if placement is None:
        jitted, placed = jax.jit(step, donate_argnums=0), [jnp.asarray(a) for a in given]
    else:
        # Pinned, or else the moments come back whole on every device and the next step is compiled anew.
        out = (placement.shardings(abstract_state(task, optimiser)), placement.everywhere)
        jitted = jax.jit(placement.traced(step), donate_argnums=0, out_shardings=out)
        placed = [placement.whole(a) for a in given]
    return Step(jitted, placed)


def _average(ema: Tree, params: Tree, decay: float, step: Array) -> Tree:
    """The moving average after an update; ``step`` counts the updates before it."""
    move = 1.0 - jnp.minimum(decay, (1.0 + step) / (EMA_START + step))
    return jax.tree.map(lambda old, new: old + move * (new - old), ema, params)


def _gradients(
    loss: Loss, state: State, batch: Batch, key: Array, accumulate: int
) -> tuple[Array, Tree, Tree]:
    """Loss, gradients (means over the micro-batches) and the batch statistics after the last of them."""
    differentiate = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (value, stats), grads = differentiate(state["params"], state["batch_stats"], batch, key)
        return value, grads, stats
    pieces = jax.tree.map(lambda a: _every(a, accumulate), batch)

    def one(carry: tuple[Array, Tree, Tree], piece: tuple[Batch, Array]) -> tuple[Any, None]:
        value, grads, stats = carry
        (extra, stats), more = differentiate(state["params"], stats, *piece)
        return (value + extra, jax.tree.map(jnp.add, grads, more), stats), None

    start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["params"]), state["batch_stats"])
    (value, grads, stats), _ = jax.lax.scan(one, start, (pieces, jax.random.split(key, accumulate)))
    return value / accumulate, jax.tree.map(lambda g: g / accumulate, grads), stats


def _every(rows: Array, count: int) -> Array:
    """(b, …) → (count, b/count, …), piece i being every count-th row from i on: no row leaves its device."""
    return rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]).swapaxes(0, 1)


class NonFiniteError(RuntimeError):
    """The loss or a gradient is not finite and the run has stopped; launch scripts end with ``exit_code``."""

    exit_code = 3


def explain_non_finite(
    step: int, metrics: dict[str, Any], names: list[str], state: State, batch: dict[str, NumpyArray]
) -> str:
    """One line: the step, the loss, and the names of the tensors that are not finite, inputs first.

    Args:
      step: updates done, this one counted.
      metrics: of the step that broke.
      names: paths of the trained parameters, in the order of metrics["grad_squares"].
      state: after it, or after the next one too: what was not finite before them is not finite still.
      batch: what it was given.
    """
    given = {"batch": batch, "params": state["params"], "batch_stats": state["batch_stats"]}
    inputs = [path for path, ok in zip(paths(given), on_host(_finite, given)) if not ok]
    finite = np.isfinite(np.asarray(metrics["grad_squares"]))
    gradients = [name for name, ok in zip(names, finite) if not ok]
    where = _listed("inputs", inputs) if inputs else "batch, parameters and batch statistics are finite"
    return (
        f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}; {where}; "
        f"{_listed('gradients', gradients)} of {len(names)}; the update was discarded"
    )


def _finite(tree: Tree) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def _listed(what: str, names: list[str], shown: int = 6) -> str:
    more = ", …" if len(names) > shown else ""
    return f"non-finite {what}: {', '.join(names[:shown])}{more} ({len(names)})" if names else f"no {what}"
