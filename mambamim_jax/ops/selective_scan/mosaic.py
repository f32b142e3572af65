"""The selective scan on NVIDIA GPUs, Hopper and newer, through the Mosaic GPU backend of Pallas.

Kept for the day when the Triton backend is gone; until then `auto` does not choose it. The length is not cut into
segments, so that it suits batches that fill the card.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from mambamim_jax.ops.selective_scan import mosaic_kernels as kernels
from mambamim_jax.ops.selective_scan.contract import ScanInputs, last_gradient
from mambamim_jax.types import Array

CHUNK = 2
"""Tokens between two saved states, unrolled in the kernels; with 3 the time of lowering grows to minutes."""
NEVER = -1e4
"""A step size before softplus that leaves the state as it is, for tokens that pad the length."""

_interpret: Any = None


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs the kernels traced inside by the interpreter of Pallas for GPUs, on a CPU; for tests."""
    global _interpret
    params: Any = getattr(plgpu, "InterpretGPUParams", None)
    if params is None:  # jax 0.10 has it, but does not export it
        params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams
    _interpret, before = params(), _interpret
    try:
        yield
    finally:
        _interpret = before


def is_interpreted() -> bool:
    """Whether kernels traced now run by the interpreter, which needs no GPU."""
    return bool(_interpret)


def forward(inputs: ScanInputs, reverse: bool, save: bool) -> tuple[Array, Array, Array | None]:
    """`reference.scan`; saves the state before every chunk (b, chunks, n, e)."""
    (b, length, width), n = inputs.u.shape, inputs.A.shape[1]
    f, walk = _padded(inputs, reverse)
    e = f.u.shape[2]
    outputs = {"y": jax.ShapeDtypeStruct(f.u.shape, f.u.dtype), "last": _float(b, n, e)}
    if save:
        outputs["saved"] = _float(b, walk.length // walk.chunk, n, e)
    first = None if f.initial_state is None else f.initial_state.astype(jnp.float32).mT
    out = _launch(kernels.forward, "forward", walk, {**_arrays(f), "first": first}, outputs)
    return _cut(out["y"], length, width, reverse), out["last"][..., :width].mT, out.get("saved")


def backward(inputs: ScanInputs, saved: Array, dy: Array, dlast: Array | None, reverse: bool) -> ScanInputs:
    """Gradients; sums over samples and programs are left to XLA."""
    (b, length, width), n = inputs.u.shape, inputs.A.shape[1]
    f, walk = _padded(inputs, reverse)
    e = f.u.shape[2]
    given = {
        **_arrays(f),
        "dy": _pad(dy, walk, e),
        "saved": saved,
        "dlast": _wide(last_gradient(dlast, f).mT, e),
    }
    parts = e // kernels.CHANNELS
    outputs = {
        "du": jax.ShapeDtypeStruct(f.u.shape, f.u.dtype),
        "ddelta": jax.ShapeDtypeStruct(f.u.shape, f.delta.dtype),
        "dB": _float(parts, b, walk.length, n),
        "dC": _float(parts, b, walk.length, n),
        "dA": _float(b, n, e),
        "dfirst": _float(b, n, e),
        "dbias": _float(b, e),
    }
    if f.z is not None:
        outputs["dz"] = jax.ShapeDtypeStruct(f.u.shape, f.z.dtype)
    if f.D is not None:
        outputs["dD"] = _float(b, e)
    out = _launch(kernels.backward, "backward", walk, given, outputs)
    return ScanInputs(
        u=_cut(out["du"], length, width, reverse),
        delta=_cut(out["ddelta"], length, width, reverse),
        A=jnp.sum(out["dA"], axis=0).mT[:width],
        B=_cut(jnp.sum(out["dB"], axis=0), length, n, reverse),
        C=_cut(jnp.sum(out["dC"], axis=0), length, n, reverse),
        D=jnp.sum(out["dD"], axis=0)[:width] if "dD" in out else None,
        z=_cut(out["dz"], length, width, reverse) if "dz" in out else None,
        delta_bias=jnp.sum(out["dbias"], axis=0)[:width],
        initial_state=out["dfirst"][..., :width].mT,
    )


def _padded(inputs: ScanInputs, reverse: bool) -> tuple[ScanInputs, kernels.Walk]:
    """Inputs with e padded to whole programs and l to whole chunks, after the last token run."""
    length, width = inputs.u.shape[1:]
    walk = kernels.Walk(-(-length // CHUNK) * CHUNK, CHUNK, reverse)
    e = -(-width // kernels.CHANNELS) * kernels.CHANNELS
    n, state = inputs.A.shape[1], inputs.initial_state
    return ScanInputs(
        u=_pad(inputs.u, walk, e),
        delta=_pad(inputs.delta, walk, e, NEVER),
        A=_wide(inputs.A.mT, e).mT,
        B=_pad(inputs.B, walk, n),
        C=_pad(inputs.C, walk, n),
        D=None if inputs.D is None else _wide(inputs.D, e),
        z=None if inputs.z is None else _pad(inputs.z, walk, e),
        delta_bias=None if inputs.delta_bias is None else _wide(inputs.delta_bias, e),
        initial_state=None if state is None else _wide(state.mT, e).mT,
    ), walk


def _pad(x: Array, walk: kernels.Walk, width: int, value: float = 0.0) -> Array:
    """(b, l, f) → (b, walk.length, width), filled where no token or channel is."""
    tokens = walk.length - x.shape[1]
    ends = (tokens, 0) if walk.reverse else (0, tokens)
    return jnp.pad(x, ((0, 0), ends, (0, width - x.shape[2])), constant_values=value)


def _wide(x: Array, width: int) -> Array:
    """Zeros after the last channel, the last axis."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _cut(x: Array, length: int, width: int, reverse: bool) -> Array:
    """The inverse of `_pad`."""
    first = x.shape[1] - length if reverse else 0
    return x[:, first : first + length, :width]


def _arrays(f: ScanInputs) -> dict[str, Array | None]:
    """The inputs by the kernels' names, A as (n, e)."""
    named = {key: getattr(f, key) for key in ("u", "delta", "B", "C", "D", "z", "delta_bias")}
    return {**named, "A": f.A.astype(jnp.float32).mT}


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _launch(
    body: Callable[[kernels.Program], None],
    name: str,
    walk: kernels.Walk,
    inputs: dict[str, Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, Array]:
    """Runs ``body`` over the grid (blocks of channels, samples), refs named as the arrays."""
    given = {key: value for key, value in inputs.items() if value is not None}
    b, _, e = outputs["y" if "y" in outputs else "du"].shape

    def kernel(*refs: Any) -> None:
        body(kernels.Program(dict(zip((*given, *outputs), refs)), walk))

    kernel.__name__ = f"selective_scan_{name}"
    call = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        grid=(e // kernels.CHANNELS, b),
        grid_names=("part", "sample"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=_interpret,
    )
    return dict(zip(outputs, call(*given.values())))
