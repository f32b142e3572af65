"""The selective scan's public function: checks, choice of the implementation, and the one custom gradient."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mambamim_jax.ops import partition
from mambamim_jax.ops.selective_scan import associative, cards, reference, sequential
from mambamim_jax.ops.selective_scan.contract import ScanInputs, like_inputs
from mambamim_jax.types import Array

log = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """An implementation with its own backward pass; see `contract` for the two signatures."""

    forward: Callable[..., tuple[Array, Array, Any]]
    backward: Callable[..., ScanInputs]


def _module(name: str) -> ModuleType:
    """The module of a kernel, imported when it is asked for: its backend may be slow to load, or gone one day."""
    return importlib.import_module(f"mambamim_jax.ops.selective_scan.{name.removeprefix('pallas_')}")


@functools.cache
def _missing(name: str) -> str | None:
    """Why the backend of a kernel is not there, or None where it is."""
    try:
        _module(name)
    except ImportError as error:
        return f"jax {jax.__version__} has no such backend of Pallas ({error})"
    return None


def _kernel(name: str) -> Kernel:
    """Its functions, found when they are called."""

    def forward(*args: Any, **options: Any) -> Any:
        return _module(name).forward(*args, **options)

    def backward(*args: Any) -> Any:
        return _module(name).backward(*args)

    return Kernel(forward, backward)


PLAIN = {"reference": reference.scan, "associative": associative.scan}
"""Implementations that JAX differentiates: f(inputs, reverse) -> y, last_state."""
KERNELS = {
    "sequential": Kernel(sequential.forward, sequential.backward),
    "pallas_triton": _kernel("pallas_triton"),
    "pallas_mosaic": _kernel("pallas_mosaic"),
}
"""Implementations with a backward pass of their own."""
DTYPES = tuple(map(jnp.dtype, ("bfloat16", "float16", "float32", "float64")))
IMPLEMENTATIONS = ("auto", *PLAIN, *KERNELS)


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    *,
    initial_state: Array | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
    implementation: str = "auto",
) -> Array | tuple[Array, Array]:
    """Mamba's selective state space recurrence with softplus, skip and gate fused in.

        Δ_t = softplus(delta_t + delta_bias)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t
        y_t = (C_t · h_t + D u_t) SiLU(z_t)

    Gu and Dao, *Mamba*, arXiv 2312.00752, section 3. Arrays are JAX's, NumPy's or nested lists,
    each bfloat16, float16, float32 or float64, with every size at least 1. Differentiable in every one of them in
    reverse mode, once; in forward mode and more often by "reference" and "associative" alone.

    Args:
        u: inputs (b, l, e).
        delta: step sizes before bias and softplus (b, l, e).
        A: state matrix's diagonal (e, n), negative.
        B: input projection (b, l, n).
        C: output projection (b, l, n).
        D: skip (e,), or None for none.
        z: gate (b, l, e), or None for none.
        delta_bias: (e,), or None for none.
        initial_state: state before the first token run (b, e, n), or None for zeros.
        return_last_state: whether to return the state after the last token run too.
        reverse: run from the last token, which the initial state then precedes, to token 0.
        implementation: "auto" (by device), "reference", "associative", "sequential", or of NVIDIA GPUs
            "pallas_triton" or "pallas_mosaic".

    Returns:
        y (b, l, e) in u's dtype; with ``return_last_state`` also the state (b, e, n), float32, or float64
        where an input is. Arithmetic is in the state's dtype whatever the inputs' are.

    Raises:
        ValueError: if shapes do not fit each other, an array is of another dtype, or the implementation is unknown,
            has no backend in this jax, or cannot run on this device or, "pallas_mosaic", with these inputs.
    """
    inputs = _checked(u, delta, A, B, C, D, z, delta_bias, initial_state)
    name = _choose(inputs) if implementation == "auto" else implementation
    if name in KERNELS and name.startswith("pallas"):
        _require(name, inputs)
    if name in KERNELS:
        y, last = _scan_parts(name, reverse, return_last_state, inputs)
    elif name in PLAIN:
        y, last = PLAIN[name](inputs, reverse)
    else:
        expected = f"expected one of {IMPLEMENTATIONS}"
        raise ValueError(f"selective_scan: unknown implementation {name!r}, {expected}")
    return (y, cast(Array, last)) if return_last_state else y


def refusal(implementation: str) -> str | None:
    """Why the default device cannot run one of ``IMPLEMENTATIONS``, whatever the inputs, or None where it can."""
    if not implementation.startswith("pallas"):
        return None
    least = cards.HOPPER if implementation == "pallas_mosaic" else cards.AMPERE
    return cards.device_refusal(*_device(), least) or _missing(implementation)


def _scan_parts(name: str, reverse: bool, keep: bool, inputs: ScanInputs) -> tuple[Array, Array | None]:
    """`_kernel_scan`, on a mesh every device its rows and channels: the compiler cannot look into a kernel."""
    if partition.ambient() is None or not name.startswith("pallas"):
        return _kernel_scan(name, reverse, keep, inputs)
    (b, _, e), P, of = inputs.u.shape, PartitionSpec, cast(Any, ScanInputs)
    rows, width = partition.rows(b), partition.width(e)
    tokens, shared, channels, state = P(rows, None, width), P(rows), P(width), P(rows, width)
    specs = of(tokens, tokens, channels, shared, shared, channels, tokens, channels, state)
    given = of(*(None if array is None else spec for array, spec in zip(inputs, specs)))
    scan = functools.partial(_kernel_scan, name, reverse, keep)
    found = (tokens, state if keep else None)
    return jax.shard_map(scan, in_specs=(given,), out_specs=found, check_vma=False)(inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernel_scan(name: str, reverse: bool, keep: bool, inputs: ScanInputs) -> tuple[Array, Array | None]:
    """y and, with ``keep``, the last state."""
    y, last, _ = KERNELS[name].forward(inputs, reverse, save=False)
    return y, last if keep else None


def _kernel_scan_forward(
    name: str, reverse: bool, keep: bool, inputs: ScanInputs
) -> tuple[tuple[Array, Array | None], tuple]:
    y, last, saved = KERNELS[name].forward(inputs, reverse, save=True)
    return (y, last if keep else None), (inputs, saved)


def _kernel_scan_backward(
    name: str, reverse: bool, keep: bool, residuals: tuple, cotangents: tuple
) -> tuple[ScanInputs]:
    inputs, saved = residuals
    return (like_inputs(KERNELS[name].backward(inputs, saved, *cotangents, reverse), inputs),)


_kernel_scan.defvjp(_kernel_scan_forward, _kernel_scan_backward)


def _device() -> tuple[str, str]:
    """Platform and compute capability of the default device."""
    device: Any = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    platform = device if isinstance(device, str) else device.platform
    return platform, getattr(device, "compute_capability", "")


def _require(name: str, inputs: ScanInputs) -> None:
    """Raises ValueError for a kernel that is not there, or Mosaic's where compiling it would abort the process.

    A CPU may lower for a card, but not run: what is not traced is refused.
    """
    platform, capability = _device()
    reason = _missing(name)
    if name == "pallas_mosaic" and reason is None:
        card = ("gpu", "9.0") if platform == "cpu" else (platform, capability)
        reason = cards.refusal(inputs, *card, cards.HOPPER)
    traced = any(isinstance(x, jax.core.Tracer) for x in inputs)
    if reason is None and platform == "cpu" and not (traced or _module(name).is_interpreted()):
        reason = cards.device_refusal(platform, capability)
    if reason is not None:
        raise ValueError(f"selective_scan: implementation {name!r}: {reason}; use 'auto'")


def _choose(inputs: ScanInputs) -> str:
    """The fastest implementation for the default device and these inputs."""
    platform, capability = _device()
    if platform == "cpu":
        return "sequential"
    reason = cards.refusal(inputs, platform, capability) or _missing("pallas_triton")
    if reason is None:
        return "pallas_triton"
    if not (cards.refusal(inputs, platform, capability, cards.HOPPER) or _missing("pallas_mosaic")):
        _log_once(f"selective_scan: pallas_mosaic runs instead of pallas_triton: {reason}")
        return "pallas_mosaic"
    _log_once(f"selective_scan: the associative scan runs instead of the GPU kernel: {reason}")
    return "associative"


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def _checked(*given: Any) -> ScanInputs:
    """The inputs as JAX's arrays; raises ValueError for dtypes and shapes that do not fit."""
    inputs = ScanInputs._make(None if x is None else jnp.asarray(x) for x in given)
    for name, array in zip(ScanInputs._fields, inputs):
        if array is not None and array.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(
                f"selective_scan: found {name} of {array.dtype}, expected one of {known}; convert it"
            )
    u, A = inputs.u.shape, inputs.A.shape
    if len(u) != 3 or len(A) != 2 or 0 in (*u, *A):
        expected = "(b, l, e) and (e, n), every size ≥ 1"
        raise ValueError(f"selective_scan: found u {u} and A {A}, expected {expected}")
    (b, l, e), n = u, A[1]
    shapes = [u, u, (e, n), (b, l, n), (b, l, n), (e,), u, (e,), (b, e, n)]
    for name, array, shape in zip(ScanInputs._fields, inputs, shapes):
        if array is not None and array.shape != shape:
            raise ValueError(f"selective_scan: found {name} {array.shape}, expected {shape} (u {u}, A {A})")
    return inputs
