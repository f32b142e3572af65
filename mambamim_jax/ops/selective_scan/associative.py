"""The selective scan as `lax.associative_scan`: logarithmic depth, much memory traffic; JAX differentiates it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mambamim_jax.ops.selective_scan.contract import ScanInputs, in_state_dtype, skip_and_gate
from mambamim_jax.types import Array


def scan(inputs: ScanInputs, reverse: bool) -> tuple[Array, Array]:
    """`reference.scan` by `lax.associative_scan` over pairs (decay, input)."""
    f = in_state_dtype(inputs)
    delta = jax.nn.softplus(f.delta if f.delta_bias is None else f.delta + f.delta_bias)
    decay = jnp.exp(delta[..., None] * f.A)
    drive = (delta * f.u)[..., None] * f.B[:, :, None, :]
    first, last = (-1, 0) if reverse else (0, -1)
    if f.initial_state is not None:
        drive = drive.at[:, first].add(decay[:, first] * f.initial_state)

    def combine(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
        return early[0] * late[0], late[0] * early[1] + late[1]

    _, states = jax.lax.associative_scan(combine, (decay, drive), reverse=reverse, axis=1)
    y = jnp.einsum("blen,bln->ble", states, f.C, precision="highest")
    y = skip_and_gate(y, f)
    return y.astype(inputs.u.dtype), states[:, last]
