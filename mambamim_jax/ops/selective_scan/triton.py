"""The selective scan on NVIDIA GPUs, Ampere and newer, through the Triton backend of Pallas.

Long sequences at a small batch leave most of the card idle, so they are cut into segments: one launch finds
each segment's end state from a zero start, a second combines them into the states that enter the segments,
and the main launch then walks all segments side by side. The adjoint pass does the same the other way
round.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from mambamim_jax.ops.selective_scan import triton_abreast as abreast
from mambamim_jax.ops.selective_scan import triton_few as few
from mambamim_jax.ops.selective_scan import triton_kernels as kernels
from mambamim_jax.ops.selective_scan import triton_plan as plan
from mambamim_jax.ops.selective_scan.contract import ScanInputs
from mambamim_jax.ops.selective_scan.triton_math import LANES
from mambamim_jax.ops.selective_scan.triton_program import PLACES, QUAD, SET, Program, Walk
from mambamim_jax.ops.selective_scan.triton_totals import totals
from mambamim_jax.ops.selective_scan.tuning import Launch, launch_for
from mambamim_jax.types import Array

_interpret = False


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs the kernels traced inside by the Pallas interpreter, on any device; for tests."""
    global _interpret
    _interpret, before = True, _interpret
    try:
        yield
    finally:
        _interpret = before


def is_interpreted() -> bool:
    """Whether kernels traced now run by the interpreter, which needs no GPU."""
    return bool(_interpret)


def forward(
    inputs: ScanInputs, reverse: bool, save: bool, launch: Launch | None = None
) -> tuple[Array, Array, Array | None]:
    """`reference.scan`; with ``save`` also what `Program.put_saved` stores, for `backward`."""
    launch = launch or _launch_of(inputs)
    (b, length, width), n = inputs.u.shape, inputs.A.shape[1]
    f = _padded(inputs, launch, save)
    walk, segments = plan.walk(f, launch, "saves" if save else "inference", reverse, _interpret)
    e, states = f.u.shape[2], f.A.shape[1]
    outputs = {"y": _flat(f.u), "last": _float(segments, b, states, e)}
    if save:
        count, k = -(-length // walk.chunk), launch.channels
        outputs["saved"] = _float(b, count, states // SET * k, e // k * QUAD, QUAD)
    first = None if f.initial_state is None else f.initial_state.astype(jnp.float32).mT
    entries, dt = _entries(f, None, first, walk, segments, launch)
    given = {**_arrays(f), "first": entries, "dt": dt}
    aliases = None
    if dt is not None:
        given, aliases = given | {"delta": None, "delta_bias": None}, {"dt": "y"}
    out = _launch(
        _forward_body(walk), "forward", walk, (_programs(f, walk), b, segments), given, outputs, aliases
    )
    return out["y"].reshape(f.u.shape)[..., :width], out["last"][-1, :, :n, :width].mT, out.get("saved")


def backward(
    inputs: ScanInputs,
    saved: Array,
    dy: Array,
    dlast: Array | None,
    reverse: bool,
    launch: Launch | None = None,
) -> ScanInputs:
    """Gradients; a second kernel sums over samples, segments and programs, so that no atomics are needed."""
    launch = launch or _launch_of(inputs)
    (b, length, width), n = inputs.u.shape, inputs.A.shape[1]
    f = _padded(inputs, launch, True)
    e, states = f.u.shape[2], f.A.shape[1]
    dy, dlast = _widen(dy, e), None if dlast is None else _pad(dlast.mT, (states, e))
    walk, segments = plan.walk(f, launch, "backward", reverse, _interpret)
    programs = _programs(f, walk)
    outputs = {
        "du": _flat(f.u),
        "ddelta": _flat(f.delta),
        "dBC": _tokens((b, length * states // SET * programs * LANES), jnp.float32),
        "sums": _float(segments, b, states + 2, e),
    }
    if f.z is not None:
        outputs["dz"] = _flat(f.z)
    if f.initial_state is not None:
        outputs["dfirst"] = _float(segments, b, states, e)
    entries, _ = _entries(f, dy, dlast, walk, segments, launch)
    given = {**_arrays(f), "dy": _rows(dy), "saved": saved, "dlast": entries}
    out = _launch(kernels.backward, "backward", walk, (programs, b, segments), given, outputs)
    wide = {k: out[k].reshape(f.u.shape)[..., :width] for k in ("du", "ddelta", "dz") if k in out}
    found = totals(out["dBC"], out["sums"], (b, length, states), walk.shift, walk.interpret)
    return ScanInputs(
        u=wide["du"],
        delta=wide["ddelta"],
        A=found.A[:width, :n],
        B=found.B[..., :n],
        C=found.C[..., :n],
        D=None if f.D is None else found.D[:width],
        z=wide.get("dz"),
        delta_bias=found.delta_bias[:width],
        initial_state=out["dfirst"][0, :, :n, :width].mT if "dfirst" in out else None,
    )


def _forward_body(walk: Walk) -> Callable[[Program], None]:
    """The forward kernel for a walk."""
    if walk.abreast > 1:
        return abreast.forward
    return few.forward if walk.adjacent and walk.channels == 1 and walk.whole else kernels.forward


def _default_launch() -> Launch:
    """The row for the default device; for the oldest served card where that is no GPU."""
    capability = getattr(jax.devices()[0], "compute_capability", "8.0")
    major, minor = (int(part) for part in str(capability).split(".")[:2])
    return launch_for((major, minor))


def _launch_of(inputs: ScanInputs) -> Launch:
    """The default one, with smaller programs and chunks of the backward pass where these inputs need it.

    Programs of half the warps where e is no whole number of them; shorter chunks for more states than a set, so that
    registers take them.
    """
    launch, (e, n) = _default_launch(), inputs.A.shape
    if e % (LANES // QUAD * launch.channels * launch.backward_warps):
        launch = launch._replace(backward_warps=max(launch.backward_warps // 2, 1))
    unit, sets = plan.unit(launch.channels, "backward"), -(-n // SET)
    return launch._replace(chunk=max(launch.chunk // sets // unit, 1) * unit) if sets > 1 else launch


def _padded(inputs: ScanInputs, launch: Launch, save: bool) -> ScanInputs:
    """Inputs with e padded to whole programs and n to whole sets; what is padded has u = 0, B = 0 and stays zero.

    Where states are saved, e is padded to programs of the backward pass too.
    """
    e, n = inputs.A.shape
    channels = launch.inference_channels * launch.warps
    if save:
        channels = max(plan.wide(launch) * launch.warps, launch.channels * launch.backward_warps)
    block = LANES // QUAD * channels
    e, n = -(-e // block) * block, -(-n // SET) * SET
    if (e, n) == inputs.A.shape:
        return inputs
    wide = {k: _widen(getattr(inputs, k), e) for k in ("u", "delta", "z", "D", "delta_bias")}
    state = inputs.initial_state
    return inputs._replace(
        **wide,
        A=_pad(inputs.A, (e, n)),
        B=_widen(inputs.B, n),
        C=_widen(inputs.C, n),
        initial_state=None if state is None else _pad(state, (e, n)),
    )


def _widen(x: Array | None, e: int) -> Any:
    """Zeros after the last channel, the last axis."""
    return x if x is None else _pad(x, (e,))


def _pad(x: Array, sizes: tuple[int, ...]) -> Array:
    """Zeros up to these sizes of the last axes."""
    more = [(0, size - found) for size, found in zip(sizes, x.shape[-len(sizes) :])]
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(sizes)) + more)


def _programs(f: ScanInputs, walk: Walk) -> int:
    """Programs over the channels."""
    return f.u.shape[2] // walk.width


def _arrays(f: ScanInputs) -> dict[str, Array | None]:
    """The inputs by the kernels' names."""
    rows = {k: _rows(x) for k in ("u", "delta", "z", "B", "C") if (x := getattr(f, k)) is not None}
    return {**rows, "D": f.D, "delta_bias": f.delta_bias, "A": f.A.astype(jnp.float32)}


def _rows(x: Array) -> Array:
    """An array of tokens as the kernels have it."""
    return x.reshape(_flat(x).shape)


def _flat(x: Array) -> jax.ShapeDtypeStruct:
    """The shape of an array of tokens as the kernels have it, one after the other."""
    return _tokens((x.shape[0], x.shape[1] * x.shape[2]), x.dtype)


def _tokens(rows: tuple[int, int], dtype: Any) -> jax.ShapeDtypeStruct:
    """A row a sample, or flat where that makes few enough elements."""
    size = rows[0] * rows[1]
    return jax.ShapeDtypeStruct((size,) if size < PLACES else rows, dtype)


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _entries(
    f: ScanInputs, dy: Array | None, edge: Array | None, walk: Walk, segments: int, launch: Launch
) -> tuple[Array | None, Array | None]:
    """The state, or with ``dy`` its gradient, that enters each segment (segments, b, n, e).

    Of the states' pass also Δ, where y, which takes its place, has the same dtype.
    """
    if segments == 1:
        return (None if edge is None else edge[None]), None
    b, e, n, adjoint = f.u.shape[0], f.u.shape[2], f.A.shape[1], dy is not None
    arrays = _arrays(f)
    given = {
        k: arrays.get(k) for k in ("delta", "A", "delta_bias", "u", *(("z", "C") if adjoint else ("B",)))
    }
    keep = not adjoint and f.u.dtype == jnp.float32
    walked = segments if keep else segments - 1  # what the last one makes of its state is not needed, Δ is
    outputs = {"end": _float(segments, b, n, e), "total": _float(segments, b, e)}
    found = _launch(
        functools.partial(kernels.ends, adjoint=adjoint),
        "ends",
        plan.ends(walk, launch)._replace(skip=int(adjoint)),
        (_programs(f, walk), b, walked),
        {**given, "dy": None if dy is None else _rows(dy)},
        outputs | ({"dt": _flat(f.u)} if keep else {}),
    )
    single = walk._replace(block=LANES, skip=0)
    combined = _launch(
        functools.partial(kernels.combine, segments=segments, adjoint=adjoint),
        "combine",
        single,
        (-(-e // LANES), b, n),
        {"A": arrays["A"], "first": None if edge is None else edge[None], **{k: found[k] for k in outputs}},
        {"entry": _float(segments, b, n, e)},
    )
    return combined["entry"], found.get("dt")


def _launch(
    body: Callable[[Program], None],
    name: str,
    walk: Walk,
    grid: tuple[int, int, int],
    inputs: dict[str, Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct],
    aliases: dict[str, str] | None = None,
) -> dict[str, Array]:
    """Runs ``body`` over the grid (blocks of channels, samples, segments), refs named as the arrays.

    ``aliases`` says which inputs give their memory to which outputs.
    """
    given = {key: value for key, value in inputs.items() if value is not None}

    def kernel(*refs: Any) -> None:
        body(Program(dict(zip((*given, *outputs), refs)), walk))

    call = pl.pallas_call(
        kernel,
        out_shape=tuple(outputs.values()),
        grid=grid,
        interpret=walk.interpret,
        input_output_aliases={
            list(given).index(old): list(outputs).index(new) for old, new in (aliases or {}).items()
        },
        name=f"selective_scan_{name}",
        compiler_params=pltriton.CompilerParams(num_warps=walk.block // LANES, num_stages=1),
    )
    return dict(zip(outputs, call(*given.values())))
