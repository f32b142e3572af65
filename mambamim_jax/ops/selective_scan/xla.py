"""The selective scan in plain XLA: an associative scan, and a chunk-checkpointed sequential one.

`sequential` holds the state as (b, n, e), so that the longest axis is contiguous, keeps only the state at the
start of every chunk of tokens, and has its own backward pass that recomputes the states inside a chunk. It is
the fastest on CPUs. `associative` has logarithmic depth and much more memory traffic; JAX differentiates it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from mambamim_jax.ops.selective_scan.contract import ScanInputs, in_state_dtype, skip_and_gate
from mambamim_jax.types import Array

CHUNK = 16
"""Most tokens in a chunk of the sequential scan: one state is kept a chunk, and recomputed inside it."""


def associative(inputs: ScanInputs, reverse: bool) -> tuple[Array, Array]:
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


def _chunked(x: Array, chunks: int, size: int) -> Array:
    """(b, l, f) → (chunks, size, b, f), zeros after the last token."""
    x = jnp.moveaxis(x, 1, 0)
    x = jnp.pad(x, ((0, chunks * size - x.shape[0]), (0, 0), (0, 0)))
    return x.reshape(chunks, size, *x.shape[1:])


def _unchunked(x: Array, length: int) -> Array:
    """(chunks, size, b, f) → (b, l, f), the inverse of `_chunked`."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:length], 0, 1)


def _prepare(inputs: ScanInputs, reverse: bool) -> tuple[ScanInputs, Array, tuple[Array, ...]]:
    """Inputs in the arithmetic's dtype and running order, softplus'd delta, and the chunked (u, delta, B, C).

    A padded token has delta 0: its decay is 1 and its input 0, so that it changes no state.
    """
    f = in_state_dtype(inputs)
    if reverse:
        f = turned(f)
    raw = f.delta if f.delta_bias is None else f.delta + f.delta_bias
    delta = jax.nn.softplus(raw)
    length = f.u.shape[1]
    chunks = -(-length // min(CHUNK, math.isqrt(length) + 1))
    size = -(-length // chunks)
    return f, raw, tuple(_chunked(x, chunks, size) for x in (f.u, delta, f.B, f.C))


def turned(f: ScanInputs) -> ScanInputs:
    """The inputs with their tokens in the opposite order."""
    z = None if f.z is None else f.z[:, ::-1]
    return f._replace(u=f.u[:, ::-1], delta=f.delta[:, ::-1], B=f.B[:, ::-1], C=f.C[:, ::-1], z=z)


def _token(h: Array, u: Array, delta: Array, B: Array, At: Array) -> Array:
    """One step of the recurrence on a state (b, n, e); At is A transposed (n, e)."""
    return jnp.exp(delta[:, None, :] * At) * h + B[:, :, None] * (delta * u)[:, None, :]


def _over_states(terms: Iterable[Array]) -> Array:
    """A sum written out, which XLA fuses with its terms; of a reduction it would first store them all."""
    return functools.reduce(operator.add, terms)


def sequential_forward(inputs: ScanInputs, reverse: bool, save: bool) -> tuple[Array, Array, Array | None]:
    """`reference.scan`, token by token; saves the state at every chunk's start (chunks, b, n, e)."""
    f, _, tokens = _prepare(inputs, reverse)
    At = f.A.T
    h = jnp.zeros((f.u.shape[0], *At.shape), f.u.dtype) if f.initial_state is None else f.initial_state.mT

    def token(h: Array, at: tuple[Array, ...]) -> tuple[Array, Array]:
        u, delta, B, C = at
        h = _token(h, u, delta, B, At)
        return h, _over_states(h[:, j] * C[:, j, None] for j in range(h.shape[1]))

    def chunk(h: Array, at: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array | None]]:
        last, y = jax.lax.scan(token, h, at)
        return last, (y, h if save else None)

    last, (y, saved) = jax.lax.scan(chunk, h, tokens)
    y = _unchunked(y, f.u.shape[1])
    y = skip_and_gate(y, f)
    return (y[:, ::-1] if reverse else y).astype(inputs.u.dtype), last.mT, saved


def sequential_backward(
    inputs: ScanInputs, saved: Array, dy: Array, dlast: Array, reverse: bool
) -> ScanInputs:
    """Gradients, chunk by chunk from the last, with each chunk's states recomputed from its saved first one.

    With G_t the gradient of h_t:  G_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}.
    """
    f, raw, tokens = _prepare(inputs, reverse)
    At, length = f.A.T, f.u.shape[1]
    dy = dy.astype(f.u.dtype)
    dy = dy[:, ::-1] if reverse else dy
    dgated, dz_per_y = dy, None
    if f.z is not None:
        gate = jax.nn.sigmoid(f.z)
        dgated, dz_per_y = dy * f.z * gate, dy * gate * (1 + f.z * (1 - gate))
    chunks, size = tokens[0].shape[:2]

    def back(carry: tuple, at: tuple) -> tuple[tuple, tuple[Array, ...]]:
        g, dAt, after = carry
        u, delta, B, C, dout, before = at
        G = g + C[:, :, None] * dout[:, None, :]
        g = jnp.exp(delta[:, None, :] * At) * G
        states = range(At.shape[0])
        dinput = _over_states(G[:, j] * B[:, j, None] for j in states)
        ddelta = _over_states(g[:, j] * before[:, j] * At[j] for j in states) + dinput * u
        dB = jnp.einsum("bne,be->bn", G, delta * u, precision="highest")
        dC = jnp.einsum("bne,be->bn", after, dout, precision="highest")
        y = _over_states(after[:, j] * C[:, j, None] for j in states)
        return (g, dAt + g * before * delta[:, None, :], before), (dinput * delta, ddelta, dB, dC, y)

    def chunk(carry: tuple[Array, Array], at: tuple) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        (u, delta, B, C), dout, first = at

        def forth(h: Array, at: tuple[Array, ...]) -> tuple[Array, Array]:
            u, delta, B = at
            return _token(h, u, delta, B, At), h

        last, before = jax.lax.scan(forth, first, (u, delta, B))
        (g, dAt, _), out = jax.lax.scan(back, (*carry, last), (u, delta, B, C, dout, before), reverse=True)
        return (g, dAt), out

    at = (tokens, _chunked(dgated, chunks, size), saved)
    (dfirst, dAt), out = jax.lax.scan(chunk, (dlast.mT, jnp.zeros_like(dlast.mT)), at, reverse=True)
    du, ddelta, dB, dC, y = (_unchunked(x, length) for x in out)
    if f.D is not None:
        y = y + f.D * f.u
        du = du + f.D * dgated
    ddelta = ddelta * jax.nn.sigmoid(raw)
    gradients = ScanInputs(
        u=du,
        delta=ddelta,
        A=jnp.sum(dAt, axis=0).T,
        B=dB,
        C=dC,
        D=jnp.sum(dgated * f.u, axis=(0, 1)),
        z=None if dz_per_y is None else dz_per_y * y,
        delta_bias=jnp.sum(ddelta, axis=(0, 1)),
        initial_state=dfirst.mT,
    )
    return turned(gradients) if reverse else gradients
