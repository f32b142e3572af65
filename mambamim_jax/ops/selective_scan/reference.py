"""The specification of the selective scan: one token after the other, differentiated by JAX.

Gu and Dao, *Mamba: Linear-time sequence modeling with selective state spaces*, section 3.2,
equations 2 and 4, with the zero-order hold for A and the Euler step for B that the published code uses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mambamim_jax.ops.selective_scan.contract import ScanInputs, in_state_dtype, skip_and_gate
from mambamim_jax.types import Array


def scan(inputs: ScanInputs, reverse: bool) -> tuple[Array, Array]:
    """Runs the recurrence token by token.

        Δ_t = softplus(delta_t + delta_bias)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t
        y_t = (C_t · h_t + D u_t) SiLU(z_t)

    Returns:
        y (b, l, e) in u's dtype, and the last state (b, e, n) in the dtype of the arithmetic.
    """
    f = in_state_dtype(inputs)
    delta = jax.nn.softplus(f.delta if f.delta_bias is None else f.delta + f.delta_bias)
    first = f.initial_state
    if first is None:
        first = jnp.zeros((f.u.shape[0], *f.A.shape), f.u.dtype)

    def token(h: Array, at: tuple[Array, ...]) -> tuple[Array, Array]:
        u, delta, B, C = at
        h = jnp.exp(delta[:, :, None] * f.A) * h + (delta * u)[:, :, None] * B[:, None, :]
        return h, jnp.einsum("ben,bn->be", h, C, precision="highest")

    by_token = tuple(jnp.moveaxis(x, 1, 0) for x in (f.u, delta, f.B, f.C))
    last, y = jax.lax.scan(token, first, by_token, reverse=reverse)
    return skip_and_gate(jnp.moveaxis(y, 0, 1), f).astype(inputs.u.dtype), last
