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

from mambamim_jax.ops.selective_scan import triton_kernels as kernels
from mambamim_jax.ops.selective_scan.contract import ScanInputs
from mambamim_jax.ops.selective_scan.triton_math import LANES
from mambamim_jax.ops.selective_scan.triton_program import PLACES, QUAD, SET, STRIDE, Program, Walk
from mambamim_jax.ops.selective_scan.tuning import Launch, launch_for
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
    """`reference.scan`; with ``save`` also what `Program.put_saved` stores before every second chunk."""
    launch = launch or _default_launch()
    (b, length, width), n = inputs.u.shape, inputs.A.shape[1]
    f = _padded(inputs, launch, save)
    walk, segments = _walk(f, launch, save, launch.warps, reverse)
    e, states = f.u.shape[2], f.A.shape[1]
    outputs = {"y": _flat(f.u), "last": _float(segments, b, states, e)}
    if save:
        count, fours = -(-length // (walk.chunk * STRIDE)), states // SET * walk.channels
        outputs["saved"] = _float(b, count, fours, _programs(f, walk) * walk.block, QUAD)
    first = None if f.initial_state is None else f.initial_state.astype(jnp.float32).mT
    entries = _entries(f, None, first, walk, segments)
    out = _launch(
        kernels.forward,
        "forward",
        walk,
        (_programs(f, walk), b, segments),
        {**_arrays(f), "first": entries},
        outputs,
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
    """Gradients; sums over samples, segments and programs are left to XLA, so that no atomics are needed."""
    launch = launch or _default_launch()
    (b, length, width), n = inputs.u.shape, inputs.A.shape[1]
    f = _padded(inputs, launch, True)
    e, states = f.u.shape[2], f.A.shape[1]
    dy, dlast = _widen(dy, e), None if dlast is None else _pad(dlast.mT, (states, e))
    walk, segments = _walk(f, launch, True, launch.backward_warps, reverse)
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
    entries = _entries(f, dy, dlast, walk, segments)
    given = {**_arrays(f), "dy": _rows(dy), "saved": saved, "dlast": entries}
    out = _launch(kernels.backward, "backward", walk, (programs, b, segments), given, outputs)
    wide = {k: out[k].reshape(f.u.shape)[..., :width] for k in ("du", "ddelta", "dz") if k in out}
    totals = jnp.sum(out["sums"], axis=(0, 1))[:, :width]
    sums = jnp.sum(out["dBC"].reshape(b, length, -1, programs, LANES), axis=3)
    dB, dC = (x.reshape(b, length, states)[..., :n] for x in jnp.split(sums, 2, axis=3))
    return ScanInputs(
        u=wide["du"],
        delta=wide["ddelta"],
        A=totals[:n].mT,
        B=dB,
        C=dC,
        D=None if f.D is None else totals[states + 1],
        z=wide.get("dz"),
        delta_bias=totals[states],
        initial_state=out["dfirst"][0, :, :n, :width].mT if "dfirst" in out else None,
    )


def _default_launch() -> Launch:
    """The row for the default device; for the oldest served card where that is no GPU."""
    capability = getattr(jax.devices()[0], "compute_capability", "8.0")
    major, minor = (int(part) for part in str(capability).split(".")[:2])
    return launch_for((major, minor))


def _padded(inputs: ScanInputs, launch: Launch, save: bool) -> ScanInputs:
    """Inputs with e padded to whole programs and n to whole sets; what is padded has u = 0, B = 0 and stays zero.

    Where states are saved, e is padded to programs of the backward pass too.
    """
    e, n = inputs.A.shape
    warps = max(launch.warps, launch.backward_warps) if save else launch.warps
    block = LANES // QUAD * (launch.channels if save else launch.inference_channels) * warps
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


def _walk(f: ScanInputs, launch: Launch, save: bool, warps: int, reverse: bool) -> tuple[Walk, int]:
    """The launch's static facts, and into how many segments the length is cut so that it fills the card.

    Raises: ValueError for channels or a chunk that no kernel takes.
    """
    b, length, e = f.u.shape
    chunk, channels, fill = launch.chunk, launch.channels, launch.fill
    if not save:
        chunk, channels, fill = _inference(launch, b, length, e)
    if channels not in (1, 2, 4):
        raise ValueError(f"found {channels} channels a quad, expected 1, 2 or 4")
    if chunk < 1 or chunk % (QUAD // channels):
        raise ValueError(
            f"found a chunk of {chunk} tokens, expected a multiple of {QUAD // channels} at {channels} channels a quad"
        )
    chunks = -(-length // chunk)
    per_segment = -(-chunks // _segments(launch, fill, b * e, channels, length))
    if save:
        per_segment = -(-per_segment // STRIDE) * STRIDE
    segments = -(-chunks // per_segment)
    walk = Walk(
        samples=b,
        length=length,
        chunk=chunk,
        channels=channels,
        block=LANES * warps,
        per_segment=per_segment,
        reverse=reverse,
        skip=0,
        adjacent=not save and _warps(b * e, channels) * segments <= launch.few,
        interpret=_interpret,
    )
    return walk, segments


def _warps(sequences: int, channels: int) -> int:
    """Warps of one segment of so many sequences, a channel of a sample each."""
    return max(sequences * QUAD // (LANES * channels), 1)


def _segments(launch: Launch, fill: int, sequences: int, channels: int, length: int) -> int:
    """How many segments fill the card with warps, twice as many where they would be long and warps few."""
    warps = _warps(sequences, channels)
    segments = max(min(fill // warps, length // launch.shortest), 1)
    return 2 * segments if 2 * warps <= fill and length // segments >= launch.long else segments


def _inference(launch: Launch, b: int, length: int, e: int) -> tuple[int, int, int]:
    """Chunk, channels and fill; channels are halved while a card that is far from filled would be by short segments.

    That makes twice the warps, so that half as many segments are enough.
    """
    chunk, channels, fill = launch.inference_chunk, launch.inference_channels, launch.fill
    while channels > 1 and chunk * channels % (2 * QUAD) == 0 and 2 * _warps(b * e, channels) <= launch.few:
        if length // _segments(launch, fill, b * e, channels, length) >= launch.halve_below:
            break
        channels, fill = channels // 2, launch.few
    return chunk, channels, fill


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


def _entries(f: ScanInputs, dy: Array | None, edge: Array | None, walk: Walk, segments: int) -> Array | None:
    """The state, or with ``dy`` its gradient, that enters each segment (segments, b, n, e)."""
    if segments == 1:
        return None if edge is None else edge[None]
    b, e, n, adjoint = f.u.shape[0], f.u.shape[2], f.A.shape[1], dy is not None
    arrays = _arrays(f)
    given = {
        k: arrays.get(k) for k in ("delta", "A", "delta_bias", "u", *(("z", "C") if adjoint else ("B",)))
    }
    found = _launch(
        functools.partial(kernels.ends, adjoint=adjoint),
        "ends",
        walk._replace(skip=int(adjoint)),
        (_programs(f, walk), b, segments - 1),
        {**given, "dy": None if dy is None else _rows(dy)},
        {"end": _float(segments, b, n, e), "total": _float(segments, b, e)},
    )
    single = walk._replace(channels=1, block=LANES)
    combined = _launch(
        functools.partial(kernels.combine, segments=segments, adjoint=adjoint),
        "combine",
        single,
        (_programs(f, single), b, 1),
        {"A": arrays["A"], "first": None if edge is None else edge[None], **found},
        {"entry": _float(segments, b, n, e)},
    )
    return combined["entry"]


def _launch(
    body: Callable[[Program], None],
    name: str,
    walk: Walk,
    grid: tuple[int, int, int],
    inputs: dict[str, Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, Array]:
    """Runs ``body`` over the grid (blocks of channels, samples, segments), refs named as the arrays."""
    given = {key: value for key, value in inputs.items() if value is not None}

    def kernel(*refs: Any) -> None:
        body(Program(dict(zip((*given, *outputs), refs)), walk))

    call = pl.pallas_call(
        kernel,
        out_shape=tuple(outputs.values()),
        grid=grid,
        interpret=walk.interpret,
        name=f"selective_scan_{name}",
        compiler_params=pltriton.CompilerParams(num_warps=walk.block // LANES, num_stages=1),
    )
    return dict(zip(outputs, call(*given.values())))
