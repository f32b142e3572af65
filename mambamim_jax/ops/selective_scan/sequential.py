"""The selective scan in plain XLA, token by token: the fastest on CPUs.

The state is laid out (b, n, e), so that the longest axis is contiguous and a token's state stays in the cache. Only
the state before every chunk of tokens is kept; the backward pass recomputes the states inside a chunk. Tokens are read
from the inputs and written to the results where they lie, without copies in another order. A chunk's exponentials come
first, all at once: they are most of the work, XLA runs what is done token by token on one core, and a chunk's worth is
enough for it to use others. All channels go in one loop: XLA plans memory for one order, so that two loops share their
scratch buffers and wait for each other.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from mambamim_jax.ops.selective_scan import elementary
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

    With G_t the gradient of h_t and a_t = exp(Δ_t A):  G_t = C_t dy_t + a_{t+1} G_{t+1}. The gradient of Δ_t A is
    G_t a_t h_{t-1}, so that a_t h_{t-1} is what is kept of a chunk's states.
    """
    f = in_state_dtype(inputs)
    dy, dlast = dy.astype(f.u.dtype), last_gradient(dlast, f).astype(f.u.dtype).mT
    g, dAt, dD, dbias, du, ddelta, dz, dB, dC = _backward(_Walk(f, reverse), saved, dy, dlast)
    return ScanInputs(
        u=du,
        delta=ddelta,
        A=jnp.sum(dAt, axis=0).T,
        B=dB,
        C=dC,
        D=dD,
        z=dz,
        delta_bias=dbias,
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
        """The token of time t in a block (b, chunk, …): (b, …)."""
        return lax.dynamic_index_in_dim(block, self.walk.at(t) - self.base, 1, keepdims=False)

    def total(self, block: Array) -> Array:
        """The sum (e,) over the samples and the chunk's tokens, without those that its block holds besides."""
        t = self.walk.at(self.base + jnp.arange(self.walk.chunk))
        return jnp.sum(jnp.where(((self.first <= t) & (t < self.stop))[:, None], block, 0), axis=(0, 1))


def _chunk(walk: _Walk, index: Array) -> _Chunk:
    first = index * walk.chunk
    stop = jnp.minimum(first + walk.chunk, walk.length)
    base = jnp.maximum(walk.length - first - walk.chunk, 0) if walk.reverse else stop - walk.chunk
    return _Chunk(walk, first, stop, jnp.maximum(base, 0))


def _sum(terms: Iterable[Array]) -> Array:
    """A sum written out, which XLA fuses with its terms; of a reduction it would first store them all."""
    return functools.reduce(operator.add, terms)


def _decays(delta: Array, At: Array) -> Array:
    """exp(Δ A) of a block's tokens (b, chunk, n, e); At is A transposed (n, e)."""
    return elementary.exp2(delta[:, :, None, :] * (At * elementary.LOG2E))


def _outer(state: Array, x: Array) -> Array:
    """(b, n), (b, e) → (b, n, e)."""
    return state[:, :, None] * x[:, None, :]


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
        delta = elementary.softplus(c.block(f.delta) + bias)
        decays = _decays(delta, At)
        z = None if f.z is None else c.block(f.z)
        gate = None if z is None else z * elementary.sigmoid(z)

        def token(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            h, y = carry
            u, C = p.token(f.u, t), p.token(f.C, t)
            h = c.token(decays, t) * h + _outer(p.token(f.B, t), c.token(delta, t) * u)
            out = _sum(h[:, j] * C[:, j, None] for j in range(h.shape[1])) + D * u
            return h, p.put(y, t, out if gate is None else out * c.token(gate, t))

        return *lax.fori_loop(c.first, c.stop, token, (h, y)), saved

    h = f.initial_state.mT
    y = jnp.zeros(f.u.shape, h.dtype)
    saved = jnp.zeros((p.chunks if save else 0, *h.shape), h.dtype)
    h, y, saved = lax.fori_loop(0, p.chunks, chunk, (h, y, saved))
    return y, h, saved


def _backward(p: _Walk, saved: Array, dy: Array, dlast: Array) -> tuple[Array, ...]:
    """Gradients: initial state (b, n, e), A by sample (b, n, e), D and delta_bias (e,), u, delta, z, B and C."""
    f, At, bias, D = p.inputs, p.inputs.A.T, p.vector(p.inputs.delta_bias), p.vector(p.inputs.D)
    states = range(At.shape[0])

    def chunk(count: Array, carry: tuple) -> tuple:
        index = p.chunks - 1 - count
        c = _chunk(p, index)
        g, dAt, dD, dbias, du, ddelta, dz, dB, dC, kept = carry
        raw, dout = c.block(f.delta) + bias, c.block(dy)
        delta, slope = elementary.softplus(raw), elementary.sigmoid(raw)
        decays = _decays(delta, At)
        if f.z is not None:
            z = c.block(f.z)
            gate = elementary.sigmoid(z)
            dout, dz_per_y = dout * z * gate, dout * gate * (1 + z * (1 - gate))

        def kept_at(kept: Array, t: Array) -> Array:
            return lax.dynamic_index_in_dim(kept, t - c.first, 0, keepdims=False)

        def forth(t: Array, carry: tuple) -> tuple:
            h, kept, dz, dC = carry
            u, C = p.token(f.u, t), p.token(f.C, t)
            kept = lax.dynamic_update_index_in_dim(kept, c.token(decays, t) * h, t - c.first, 0)
            # from what was just kept, so that the state is replaced where it lies
            h = kept_at(kept, t) + _outer(p.token(f.B, t), c.token(delta, t) * u)
            if f.z is not None:
                y = _sum(h[:, j] * C[:, j, None] for j in states) + D * u
                dz = p.put(dz, t, y * c.token(dz_per_y, t))
            return h, kept, dz, p.put(dC, t, _over_channels(h, c.token(dout, t)))

        def back(count: Array, carry: tuple) -> tuple:
            G, dAt, du, ddelta, dB = carry
            t = c.stop - 1 - count
            u, step, B = p.token(f.u, t), c.token(delta, t), p.token(f.B, t)
            decayed = kept_at(kept, t)
            dinput = _sum(G[:, j] * B[:, j, None] for j in states)
            draw = (_sum(G[:, j] * decayed[:, j] * At[j] for j in states) + dinput * u) * c.token(slope, t)
            du, ddelta = p.put(du, t, dinput * step + D * c.token(dout, t)), p.put(ddelta, t, draw)
            dB = p.put(dB, t, _over_channels(G, step * u))
            dAt = dAt + G * decayed * step[:, None, :]
            # what comes from the output of the token before, which the chunk before adds for its last one itself
            before = jnp.maximum(t - 1, c.first)
            out = jnp.where(t > c.first, c.token(dout, before), 0)
            return c.token(decays, t) * G + _outer(p.token(f.C, before), out), dAt, du, ddelta, dB

        h = lax.dynamic_index_in_dim(saved, index, 0, keepdims=False)
        _, kept, dz, dC = lax.fori_loop(c.first, c.stop, forth, (h, kept, dz, dC))
        last = c.stop - 1
        g = g + _outer(p.token(f.C, last), c.token(dout, last))
        g, dAt, du, ddelta, dB = lax.fori_loop(0, c.stop - c.first, back, (g, dAt, du, ddelta, dB))
        dD, dbias = dD + c.total(dout * c.block(f.u)), dbias + c.total(c.block(ddelta))
        return g, dAt, dD, dbias, du, ddelta, dz, dB, dC, kept

    by_channel, by_state = jnp.zeros(f.u.shape, dy.dtype), jnp.zeros_like(f.B)
    kept = jnp.zeros((p.chunk, *dlast.shape), dy.dtype)
    dvector = jnp.zeros(f.u.shape[2], dy.dtype)
    carry = (dlast, jnp.zeros_like(dlast), dvector, dvector, *(by_channel,) * 3, by_state, by_state, kept)
    return lax.fori_loop(0, p.chunks, chunk, carry)[:-1]
