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

from previous_scan import triton_kernels as kernels
from mambamim_jax.ops.selective_scan.contract import ScanInputs
from previous_scan.triton_math import LANES
from previous_scan.tuning import Launch, launch_for
from mambamim_jax.types import Array

LARGEST_STATE = 32
"""States a channel that the kernels can keep in registers."""

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


def refusal(inputs: ScanInputs, platform: str, capability: str) -> str | None:
    """Why the kernels cannot take these inputs on this device, or None where they can."""
    if platform not in ("gpu", "cuda"):
        return f"found platform {platform}, expected an NVIDIA GPU"
    if tuple(int(part) for part in capability.split(".") if part.isdigit()) < (8, 0):
        return f"found compute capability {capability or 'unknown'}, expected 8.0 (Ampere) or newer"
    if inputs.A.shape[1] > LARGEST_STATE:
        return f"found a state of {inputs.A.shape[1]}, expected {LARGEST_STATE} or less"
    if any(x is not None and x.dtype == jnp.float64 for x in inputs):
        return "found float64 inputs, expected float32 or narrower"
    return None


def forward(
    inputs: ScanInputs, reverse: bool, save: bool, launch: Launch | None = None
) -> tuple[Array, Array, Array | None]:
    """`reference.scan`; saves the state before every chunk (b, chunks, n, e)."""
    launch = launch or _default_launch()
    (b, length, width), n = inputs.u.shape, inputs.A.shape[1]
    f = _padded(inputs, launch)
    walk, segments = _walk(f, launch, launch.warps, launch.chunk if save else launch.inference_chunk, reverse)
    e = f.u.shape[2]
    outputs = {"y": jax.ShapeDtypeStruct(f.u.shape, f.u.dtype), "last": _float(segments, b, n, e)}
    if save:
        outputs["saved"] = _float(b, -(-length // launch.chunk), n, e)
    first = None if f.initial_state is None else f.initial_state.astype(jnp.float32).mT
    entries = _entries(f, None, first, walk, segments)
    out = _launch(
        kernels.forward,
        "forward",
        walk,
        (e // walk.block, b, segments),
        {**_arrays(f), "first": entries},
        outputs,
    )
    return out["y"][..., :width], out["last"][-1, :, :, :width].mT, out.get("saved")


def backward(
    inputs: ScanInputs, saved: Array, dy: Array, dlast: Array, reverse: bool, launch: Launch | None = None
) -> ScanInputs:
    """Gradients; sums over samples, segments and warps are left to XLA, so that no atomics are needed."""
    launch = launch or _default_launch()
    (b, length, width), n = inputs.u.shape, inputs.A.shape[1]
    f = _padded(inputs, launch)
    e = f.u.shape[2]
    dy, dlast = _widen(dy, e), _widen(dlast.mT, e)
    walk, segments = _walk(f, launch, launch.backward_warps, launch.chunk, reverse)
    groups = -(-2 * n // LANES)
    outputs = {
        "du": jax.ShapeDtypeStruct(f.u.shape, f.u.dtype),
        "ddelta": jax.ShapeDtypeStruct(f.u.shape, f.delta.dtype),
        "dBC": _float(b, length, groups * e),
        "dA": _float(segments, b, n, e),
        "dfirst": _float(segments, b, n, e),
        "dbias": _float(segments, b, e),
    }
    if f.z is not None:
        outputs["dz"] = jax.ShapeDtypeStruct(f.u.shape, f.z.dtype)
    if f.D is not None:
        outputs["dD"] = _float(segments, b, e)
    entries = _entries(f, dy, dlast, walk, segments)
    given = {**_arrays(f), "dy": dy, "saved": saved, "dlast": entries}
    out = _launch(kernels.backward, "backward", walk, (e // walk.block, b, segments), given, outputs)
    dBC = jnp.sum(out["dBC"].reshape(b, length, groups, -1, LANES), axis=3)
    dBC = dBC.reshape(b, length, groups * LANES)
    return ScanInputs(
        u=out["du"][..., :width],
        delta=out["ddelta"][..., :width],
        A=jnp.sum(out["dA"], axis=(0, 1)).mT[:width],
        B=dBC[..., :n],
        C=dBC[..., n : 2 * n],
        D=jnp.sum(out["dD"], axis=(0, 1))[:width] if "dD" in out else None,
        z=out["dz"][..., :width] if "dz" in out else None,
        delta_bias=jnp.sum(out["dbias"], axis=(0, 1))[:width],
        initial_state=out["dfirst"][0, :, :, :width].mT,
    )


def _default_launch() -> Launch:
    """The row for the default device; for the oldest served card where that is no GPU."""
    capability = getattr(jax.devices()[0], "compute_capability", "8.0")
    major, minor = (int(part) for part in str(capability).split(".")[:2])
    return launch_for((major, minor))


def _padded(inputs: ScanInputs, launch: Launch) -> ScanInputs:
    """Inputs with e padded to whole programs; the padded channels have u = 0 and so stay zero."""
    block = LANES * max(launch.warps, launch.backward_warps)
    e = -(-inputs.u.shape[2] // block) * block
    if e == inputs.u.shape[2]:
        return inputs
    wide = {k: _widen(getattr(inputs, k), e) for k in ("u", "delta", "z", "D", "delta_bias")}
    state = inputs.initial_state
    return inputs._replace(
        **wide,
        A=_widen(inputs.A.mT, e).mT,
        initial_state=None if state is None else _widen(state.mT, e).mT,
    )


def _widen(x: Array | None, e: int) -> Any:
    """Zeros after the last channel, the last axis."""
    return x if x is None else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, e - x.shape[-1])])


def _walk(f: ScanInputs, launch: Launch, warps: int, chunk: int, reverse: bool) -> tuple[kernels.Walk, int]:
    """The launch's static facts, and into how many segments the length is cut so that it fills the card."""
    b, length, e = f.u.shape
    chunks = -(-length // chunk)
    wanted = min(launch.fill * LANES // (b * e), length // launch.shortest)
    per_segment = -(-chunks // max(wanted, 1))
    walk = kernels.Walk(length, chunk, LANES * warps, per_segment, reverse, _interpret)
    return walk, -(-chunks // per_segment)


def _arrays(f: ScanInputs) -> dict[str, Array | None]:
    """The inputs by the kernels' names, A as (n, e), B and C with their tokens one after the other (b, l n)."""
    named = {k: getattr(f, k) for k in ("u", "delta", "D", "z", "delta_bias")}
    flat = {"B": f.B.reshape(f.B.shape[0], -1), "C": f.C.reshape(f.C.shape[0], -1)}
    return {**named, **flat, "A": f.A.astype(jnp.float32).mT}


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _entries(
    f: ScanInputs, dy: Array | None, edge: Array | None, walk: kernels.Walk, segments: int
) -> Array | None:
    """The state, or with ``dy`` its gradient, that enters each segment (segments, b, n, e)."""
    if segments == 1:
        return None if edge is None else edge[None]
    b, e, n, adjoint = f.u.shape[0], f.u.shape[2], f.A.shape[1], dy is not None
    arrays = _arrays(f)
    given = {k: arrays[k] for k in ("delta", "A", "delta_bias", "u", *(("z", "C") if adjoint else ("B",)))}
    found = _launch(
        functools.partial(kernels.ends, adjoint=adjoint),
        "ends",
        walk,
        (e // walk.block, b, segments),
        {**given, "dy": dy},
        {"end": _float(segments, b, n, e), "total": _float(segments, b, e)},
    )
    combined = _launch(
        functools.partial(kernels.combine, segments=segments, adjoint=adjoint),
        "combine",
        walk,
        (e // walk.block, b, 1),
        {"A": arrays["A"], "first": None if edge is None else edge[None], **found},
        {"entry": _float(segments, b, n, e)},
    )
    return combined["entry"]


def _launch(
    body: Callable[[kernels.Program], None],
    name: str,
    walk: kernels.Walk,
    grid: tuple[int, int, int],
    inputs: dict[str, Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, Array]:
    """Runs ``body`` over the grid (blocks of channels, samples, segments), refs named as the arrays."""
    given = {key: value for key, value in inputs.items() if value is not None}

    def kernel(*refs: Any) -> None:
        body(kernels.Program(dict(zip((*given, *outputs), refs)), walk))

    call = pl.pallas_call(
        kernel,
        out_shape=tuple(outputs.values()),
        grid=grid,
        interpret=walk.interpret,
        name=f"selective_scan_{name}",
        compiler_params=pltriton.CompilerParams(num_warps=walk.block // LANES, num_stages=1),
    )
    return dict(zip(outputs, call(*given.values())))
