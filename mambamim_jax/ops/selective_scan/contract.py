"""What every implementation of the selective scan takes and gives.

An implementation is a module with two functions:

    forward(inputs, reverse, save)               -> y, last_state, saved
    backward(inputs, saved, dy, dlast, reverse)  -> ScanInputs of gradients

``saved`` is whatever that module's ``backward`` needs beyond the inputs, ``None`` where ``save`` is false;
``dlast`` is ``None`` where nobody asked for the last state.
Gradients have their input's shape; their dtype, and those of inputs that are ``None``, do not matter.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mambamim_jax.types import Array


class ScanInputs(NamedTuple):
    """The differentiable arguments of a selective scan, as `selective_scan` names them."""

    u: Array  # (b, l, e)
    delta: Array  # (b, l, e)
    A: Array  # (e, n)
    B: Array  # (b, l, n)
    C: Array  # (b, l, n)
    D: Array | None = None  # (e,)
    z: Array | None = None  # (b, l, e)
    delta_bias: Array | None = None  # (e,)
    initial_state: Array | None = None  # (b, e, n)


def in_state_dtype(inputs: ScanInputs) -> ScanInputs:
    """The inputs in the dtype of the state and of all arithmetic: float64 if any is float64, else float32."""
    given = [x.dtype for x in inputs if x is not None]
    dtype = jnp.float64 if jnp.dtype(jnp.float64) in given else jnp.float32
    return jax.tree.map(lambda x: x.astype(dtype), inputs)


def last_gradient(dlast: Array | None, inputs: ScanInputs) -> Array:
    """The gradient of the last state (b, e, n), zeros where nobody asked for that state."""
    shape = inputs.u.shape[0], *inputs.A.shape
    return jnp.zeros(shape, inputs.A.dtype) if dlast is None else dlast


def like_inputs(gradients: ScanInputs, inputs: ScanInputs) -> ScanInputs:
    """Gives each gradient its input's dtype, and drops those of absent inputs."""
    kept = ScanInputs._make(None if x is None else g for g, x in zip(gradients, inputs))
    return jax.tree.map(lambda g, x: g.astype(x.dtype), kept, inputs)


def skip_and_gate(y: Array, inputs: ScanInputs) -> Array:
    """(y + D u) SiLU(z), each where given."""
    if inputs.D is not None:
        y = y + inputs.D * inputs.u
    return y if inputs.z is None else y * jax.nn.silu(inputs.z)
