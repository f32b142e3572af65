"""The selective scan in plain XLA, token by token: the fastest on CPUs.

The state is laid out (b, n, e), so that the longest axis is contiguous and a token's state stays in the cache. Only
the state before every chunk of tokens is kept; the backward pass recomputes the states inside a chunk. Tokens are read
from the inputs and written to the results where they lie, without copies in another order. All channels go in one
loop: XLA plans memory for one order, so that two loops share their scratch buffers and wait for each other.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mambamim_jax.ops.selective_scan.contract import ScanInputs, in_state_dtype, last_gradient
from mambamim_jax.types import Array

CHUNK = 16
"""Most tokens in a chunk: one state is kept a chunk, and the others are recomputed inside it."""


def forward(inputs: ScanInputs, reverse: bool, save: bool) -> tuple[Array, Array, Array | None]:
    """`reference.scan`; saves the state before every chunk, (chunks, b, n, e)."""
    f = in_state_dtype(inputs)
    if f.initial_state is None:
        f = f._replace(initial_state=jnp.zeros((f.u.shape[0], *f.A.shape), f.u.dtype))
    y, last, saved = _forward(_Walk(f, reverse), save)
    return y.astype(inputs.u.dtype), last.mT, saved if save else None


def backward(inputs: ScanInputs, saved: Array, dy: Array, dlast: Array | None, reverse: bool) -> ScanInputs:
    """Gradients, chunk by chunk from the last one run.

    With G_t the gradient of h_t:  G_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}.
    """
    f = in_state_dtype(inputs)
    dy, dlast = dy.astype(f.u.dtype), last_gradient(dlast, f).astype(f.u.dtype).mT
    g, dAt, du, ddelta, dz, dB, dC = _backward(_Walk(f, reverse), saved, dy, dlast)
    dgated = dy if f.z is None else dy * jax.nn.silu(f.z)
    return ScanInputs(
        u=du,
        delta=ddelta,
        A=jnp.sum(dAt, axis=0).T,
        B=dB,
        C=dC,
        D=jnp.sum(dgated * f.u, axis=(0, 1)),
        z=dz,
        delta_bias=jnp.sum(ddelta, axis=(0, 1)),
        initial_state=g.mT,
    )


class _Walk(NamedTuple):
    """How the tokens are walked; time t is the t-th token run."""

    inputs: ScanInputs
    reverse: bool

    @property
    def length(self) -> int:
        return self.inputs.u.shape[1]

    @property
    def chunk(self) -> int:
        """Tokens in a chunk; the last chunk may have fewer."""
        return min(CHUNK, math.isqrt(self.length) + 1, self.length)

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    def vector(self, x: Array | None) -> Array:
        """An optional vector (e,)."""
        return jnp.zeros(self.inputs.u.shape[2], self.inputs.u.dtype) if x is None else x

    def at(self, t: Array) -> Array:
        """Where the token of time t lies."""
        return self.length - 1 - t if self.reverse else t

    def token(self, x: Array, t: Array) -> Array:
        """The token of time t of (b, l, f): (b, f)."""
        return lax.dynamic_index_in_dim(x, self.at(t), 1, keepdims=False)

    def put(self, x: Array, t: Array, value: Array) -> Array:
        """Writes (b, f) as the token of time t into (b, l, f)."""
        return lax.dynamic_update_index_in_dim(x, value, self.at(t), 1)


class _Chunk(NamedTuple):
    """A chunk's times, and the block of tokens, as many as a whole chunk has, that holds them."""

    walk: _Walk
    first: Array  # time of the first token
    stop: Array  # time after the last one
    base: Array  # where the block starts

    def block(self, x: Array) -> Array:
        """(b, chunk, e) of (b, l, e)."""
        return lax.dynamic_slice_in_dim(x, self.base, self.walk.chunk, axis=1)

    def token(self, block: Array, t: Array) -> Array:
        """The token of time t in a block: (b, e)."""
        return lax.dynamic_index_in_dim(block, self.walk.at(t) - self.base, 1, keepdims=False)


def _chunk(walk: _Walk, index: Array) -> _Chunk:
    first = index * walk.chunk
    stop = jnp.minimum(first + walk.chunk, walk.length)
    base = jnp.maximum(walk.length - first - walk.chunk, 0) if walk.reverse else stop - walk.chunk
    return _Chunk(walk, first, stop, jnp.maximum(base, 0))


def _sum(terms: Iterable[Array]) -> Array:
    """A sum written out, which XLA fuses with its terms; of a reduction it would first store them all."""
    return functools.reduce(operator.add, terms)


def _step(h: Array, u: Array, delta: Array, B: Array, At: Array) -> Array:
    """One step of the recurrence on a state (b, n, e); At is A transposed (n, e)."""
    return jnp.exp(delta[:, None, :] * At) * h + B[:, :, None] * (delta * u)[:, None, :]


def _over_channels(state: Array, x: Array) -> Array:
    """(b, n, e) · (b, e) → (b, n)."""
    return jnp.einsum("bne,be->bn", state, x, precision="highest")


def _forward(p: _Walk, save: bool) -> tuple[Array, Array, Array]:
    """y (b, l, e), the last state (b, n, e) and the saved ones."""
    f, At, bias, D = p.inputs, p.inputs.A.T, p.vector(p.inputs.delta_bias), p.vector(p.inputs.D)
    assert f.initial_state is not None

    def chunk(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        h, y, saved = carry
        if save:
            saved = lax.dynamic_update_index_in_dim(saved, h, index, 0)
        c = _chunk(p, index)
        delta = jax.nn.softplus(c.block(f.delta) + bias)
        gate = None if f.z is None else jax.nn.silu(c.block(f.z))

        def token(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            h, y = carry
            u, C = p.token(f.u, t), p.token(f.C, t)
            h = _step(h, u, c.token(delta, t), p.token(f.B, t), At)
            out = _sum(h[:, j] * C[:, j, None] for j in range(h.shape[1])) + D * u
            return h, p.put(y, t, out if gate is None else out * c.token(gate, t))

        return *lax.fori_loop(c.first, c.stop, token, (h, y)), saved

    h = f.initial_state.mT
    y = jnp.zeros(f.u.shape, h.dtype)
    saved = jnp.zeros((p.chunks if save else 0, *h.shape), h.dtype)
    h, y, saved = lax.fori_loop(0, p.chunks, chunk, (h, y, saved))
    return y, h, saved


def _backward(p: _Walk, saved: Array, dy: Array, dlast: Array) -> tuple[Array, ...]:
    """Gradients: initial state (b, n, e), A by sample (b, n, e), u, delta, z, B and C."""
    f, At, bias, D = p.inputs, p.inputs.A.T, p.vector(p.inputs.delta_bias), p.vector(p.inputs.D)
    states = range(At.shape[0])

    def chunk(count: Array, carry: tuple) -> tuple:
        index = p.chunks - 1 - count
        c = _chunk(p, index)
        g, dAt, du, ddelta, dz, dB, dC, before = carry
        raw, dout = c.block(f.delta) + bias, c.block(dy)
        delta, slope = jax.nn.softplus(raw), jax.nn.sigmoid(raw)
        if f.z is not None:
            z = c.block(f.z)
            gate = jax.nn.sigmoid(z)
            dout, dz_per_y = dout * z * gate, dout * gate * (1 + z * (1 - gate))

        def forth(t: Array, carry: tuple) -> tuple:
            h, before, dz, dC = carry
            before = lax.dynamic_update_index_in_dim(before, h, t - c.first, 0)
            u, C = p.token(f.u, t), p.token(f.C, t)
            h = _step(h, u, c.token(delta, t), p.token(f.B, t), At)
            if f.z is not None:
                y = _sum(h[:, j] * C[:, j, None] for j in states) + D * u
                dz = p.put(dz, t, y * c.token(dz_per_y, t))
            return h, before, dz, p.put(dC, t, _over_channels(h, c.token(dout, t)))

        h = lax.dynamic_index_in_dim(saved, index, 0, keepdims=False)
        _, before, dz, dC = lax.fori_loop(c.first, c.stop, forth, (h, before, dz, dC))

        def back(count: Array, carry: tuple) -> tuple:
            g, dAt, du, ddelta, dB = carry
            t = c.stop - 1 - count
            u, step, out = p.token(f.u, t), c.token(delta, t), c.token(dout, t)
            B, C = p.token(f.B, t), p.token(f.C, t)
            h = lax.dynamic_index_in_dim(before, t - c.first, 0, keepdims=False)
            G = g + C[:, :, None] * out[:, None, :]
            g = jnp.exp(step[:, None, :] * At) * G
            dinput = _sum(G[:, j] * B[:, j, None] for j in states)
            draw = (_sum(g[:, j] * h[:, j] * At[j] for j in states) + dinput * u) * c.token(slope, t)
            dB = p.put(dB, t, _over_channels(G, step * u))
            dAt = dAt + g * h * step[:, None, :]
            return g, dAt, p.put(du, t, dinput * step + D * out), p.put(ddelta, t, draw), dB

        g, dAt, du, ddelta, dB = lax.fori_loop(0, c.stop - c.first, back, (g, dAt, du, ddelta, dB))
        return g, dAt, du, ddelta, dz, dB, dC, before

    by_channel = jnp.zeros(f.u.shape, dy.dtype)
    by_state, before = jnp.zeros_like(f.B), jnp.zeros((p.chunk, *dlast.shape), dy.dtype)
    carry = dlast, jnp.zeros_like(dlast), by_channel, by_channel, by_channel, by_state, by_state, before
    return lax.fori_loop(0, p.chunks, chunk, carry)[:-1]
