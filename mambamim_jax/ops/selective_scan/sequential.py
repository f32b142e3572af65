"""The selective scan in plain XLA, token by token: the fastest on CPUs.

The state is laid out (b, n, e), so that the longest axis is contiguous and a token's state stays in the cache. Only
the state before every chunk of tokens is kept; the backward pass recomputes the states inside a chunk. Tokens are read
from the inputs and written to the results where they lie, without copies in another order.

The channels may be split into parts, each a loop of its own.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mambamim_jax.ops.selective_scan.contract import ScanInputs, in_state_dtype
from mambamim_jax.types import Array

CHUNK = 16
"""Most tokens in a chunk: one state is kept a chunk, and the others are recomputed inside it."""
PARTS = 1
"""Loops that a scan of at least ``WIDE`` channels is split into.

Two took 1.1 to 1.2 times as long: XLA plans memory for one order, so that loops share their scratch buffers and wait
for each other."""
WIDE = 512


def forward(inputs: ScanInputs, reverse: bool, save: bool) -> tuple[Array, Array, list[Array] | None]:
    """`reference.scan`; saves the state before every chunk, (chunks, b, n, channels) for each part."""
    f = in_state_dtype(inputs)
    if f.initial_state is None:
        f = f._replace(initial_state=jnp.zeros((f.u.shape[0], *f.A.shape), f.u.dtype))
    parts = [_forward(part, save) for part in _parts(f, reverse)]
    y, last, saved = zip(*parts)
    return _joined(y).astype(inputs.u.dtype), _joined(last).mT, list(saved) if save else None


def backward(inputs: ScanInputs, saved: list[Array], dy: Array, dlast: Array, reverse: bool) -> ScanInputs:
    """Gradients, chunk by chunk from the last one run.

    With G_t the gradient of h_t:  G_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}.
    """
    f = in_state_dtype(inputs)
    dy, dlast = dy.astype(f.u.dtype), dlast.astype(f.u.dtype).mT
    parts = [_backward(part, states, dy, part.of(dlast)) for part, states in zip(_parts(f, reverse), saved)]
    gradients: Any = [[part[i] for part in parts] for i in range(len(ScanInputs._fields))]
    du, ddelta, dAt, dB, dC, _, dz, dbias, dfirst = gradients
    dgated = dy if f.z is None else dy * jax.nn.silu(f.z)
    return ScanInputs(
        u=_joined(du),
        delta=_joined(ddelta),
        A=_joined(dAt).T,
        B=_sum(dB),
        C=_sum(dC),
        D=jnp.sum(dgated * f.u, axis=(0, 1)),
        z=_joined(dz),
        delta_bias=_joined(dbias),
        initial_state=_joined(dfirst).mT,
    )


class _Part(NamedTuple):
    """Some of the channels, and how they walk the tokens; time t is the t-th token run."""

    inputs: ScanInputs
    start: int
    width: int
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

    def of(self, x: Array) -> Array:
        """This part's channels, the last axis."""
        return x[..., self.start : self.start + self.width]

    def vector(self, x: Array | None) -> Array:
        """This part of an optional vector (e,)."""
        return jnp.zeros(self.width, self.inputs.u.dtype) if x is None else self.of(x)

    def at(self, t: Array) -> Array:
        """Where the token of time t lies."""
        return self.length - 1 - t if self.reverse else t

    def token(self, x: Array, t: Array) -> Array:
        """This part of the token of time t of (b, l, e): (b, width)."""
        return lax.dynamic_slice(x, (0, self.at(t), self.start), (x.shape[0], 1, self.width))[:, 0]

    def shared(self, x: Array, t: Array) -> Array:
        """The token of time t of (b, l, n): (b, n)."""
        return lax.dynamic_index_in_dim(x, self.at(t), 1, keepdims=False)

    def put(self, x: Array, t: Array, value: Array) -> Array:
        """Writes (b, f) as the token of time t into (b, l, f)."""
        return lax.dynamic_update_index_in_dim(x, value, self.at(t), 1)


class _Chunk(NamedTuple):
    """A chunk's times, and the block of tokens, as many as a whole chunk has, that holds them."""

    part: _Part
    first: Array  # time of the first token
    stop: Array  # time after the last one
    base: Array  # where the block starts

    def block(self, x: Array) -> Array:
        """(b, chunk, width) of (b, l, e)."""
        p = self.part
        return lax.dynamic_slice(x, (0, self.base, p.start), (x.shape[0], p.chunk, p.width))

    def token(self, block: Array, t: Array) -> Array:
        """The token of time t in a block: (b, width)."""
        return lax.dynamic_index_in_dim(block, self.part.at(t) - self.base, 1, keepdims=False)


def _parts(f: ScanInputs, reverse: bool) -> list[_Part]:
    """The channels in parts of about equal width; one where several devices may hold pieces of an array."""
    e = f.u.shape[2]
    count = PARTS if e >= WIDE and jax.device_count() == 1 else 1
    edges = [e * i // count for i in range(count + 1)]
    return [_Part(f, start, stop - start, reverse) for start, stop in itertools.pairwise(edges)]


def _chunk(part: _Part, index: Array) -> _Chunk:
    first = index * part.chunk
    stop = jnp.minimum(first + part.chunk, part.length)
    base = jnp.maximum(part.length - first - part.chunk, 0) if part.reverse else stop - part.chunk
    return _Chunk(part, first, stop, jnp.maximum(base, 0))


def _joined(parts: Iterable[Array]) -> Array:
    return jnp.concatenate(list(parts), axis=-1)


def _sum(terms: Iterable[Array]) -> Array:
    """A sum written out, which XLA fuses with its terms; of a reduction it would first store them all."""
    return functools.reduce(operator.add, terms)


def _step(h: Array, u: Array, delta: Array, B: Array, At: Array) -> Array:
    """One step of the recurrence on a state (b, n, width); At is A transposed (n, width)."""
    return jnp.exp(delta[:, None, :] * At) * h + B[:, :, None] * (delta * u)[:, None, :]


def _over_channels(state: Array, x: Array) -> Array:
    """(b, n, width) · (b, width) → (b, n)."""
    return jnp.einsum("bne,be->bn", state, x, precision="highest")


def _forward(p: _Part, save: bool) -> tuple[Array, Array, Array]:
    """y (b, l, width), the last state (b, n, width) and the saved ones of one part."""
    f, At, bias, D = p.inputs, p.of(p.inputs.A.T), p.vector(p.inputs.delta_bias), p.vector(p.inputs.D)
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
            u, C = p.token(f.u, t), p.shared(f.C, t)
            h = _step(h, u, c.token(delta, t), p.shared(f.B, t), At)
            out = _sum(h[:, j] * C[:, j, None] for j in range(h.shape[1])) + D * u
            return h, p.put(y, t, out if gate is None else out * c.token(gate, t))

        return *lax.fori_loop(c.first, c.stop, token, (h, y)), saved

    h = p.of(f.initial_state.mT)
    y = jnp.zeros((*f.u.shape[:2], p.width), h.dtype)
    saved = jnp.zeros((p.chunks if save else 0, *h.shape), h.dtype)
    h, y, saved = lax.fori_loop(0, p.chunks, chunk, (h, y, saved))
    return y, h, saved


def _backward(p: _Part, saved: Array, dy: Array, dlast: Array) -> ScanInputs:
    """One part's gradients, those of A and the initial state transposed to (n, width) and (b, n, width)."""
    f, At, bias, D = p.inputs, p.of(p.inputs.A.T), p.vector(p.inputs.delta_bias), p.vector(p.inputs.D)
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
            u, C = p.token(f.u, t), p.shared(f.C, t)
            h = _step(h, u, c.token(delta, t), p.shared(f.B, t), At)
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
            B, C = p.shared(f.B, t), p.shared(f.C, t)
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

    by_channel = jnp.zeros((*f.u.shape[:2], p.width), dy.dtype)
    by_state, before = jnp.zeros_like(f.B), jnp.zeros((p.chunk, *dlast.shape), dy.dtype)
    carry = dlast, jnp.zeros_like(dlast), by_channel, by_channel, by_channel, by_state, by_state, before
    g, dAt, du, ddelta, dz, dB, dC, _ = lax.fori_loop(0, p.chunks, chunk, carry)
    return ScanInputs(
        u=du,
        delta=ddelta,
        A=jnp.sum(dAt, axis=0),
        B=dB,
        C=dC,
        D=None,
        z=dz,
        delta_bias=jnp.sum(ddelta, axis=(0, 1)),
        initial_state=g,
    )
