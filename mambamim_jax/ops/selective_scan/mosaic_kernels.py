"""Bodies of the selective scan's kernels for the Mosaic GPU backend of Pallas.

A program is a warpgroup with one of 128 channels a thread. The thread holds its channel's whole state as n scalars in
registers and walks the tokens in time order, a chunk of tokens unrolled at a time. Only the gradients of B and C are
summed over the channels; the sums over programs are left to XLA, so that no atomics are needed.

Bodies find their refs by name; those of optional inputs are absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mambamim_jax.types import Array

CHANNELS = 128
"""Channels of a program, the threads of a warpgroup."""
LOG2E = math.log2(math.e)
State = list[Array]
"""n vectors (CHANNELS,)."""


class Walk(NamedTuple):
    """Static facts of one launch."""

    length: int  # tokens, whole chunks
    chunk: int  # tokens between two saved states
    reverse: bool  # time runs from the last token to the first


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)."""
    return 1 / (1 + jnp.exp2(x * -LOG2E))


def softplus(x: Array) -> Array:
    """log(1 + e^x) = max(x, 0) + 2 artanh(w / (2 + w)), w = e^-|x|: exact for tiny values too."""
    w = jnp.exp2(jnp.abs(x) * -LOG2E)
    s = w / (2 + w)
    square, series = s * s, 2 / 11 + 0 * s
    for odd in (9, 7, 5, 3, 1):
        series = series * square + 2 / odd
    return s * series + jnp.maximum(x, 0.0)


class Program:
    """One program's refs by name, and its place: block of channels and sample."""

    def __init__(self, refs: dict[str, Any], walk: Walk):
        self.refs, self.walk = refs, walk
        self.part, self.sample = jax.lax.axis_index("part"), jax.lax.axis_index("sample")
        self.cols = pl.ds(self.part * CHANNELS, CHANNELS)
        self.states = range(refs["A"].shape[0])
        self.A = [refs["A"][j, self.cols] * LOG2E for j in self.states]
        self.bias, self.D = self._vector("delta_bias"), self._vector("D")

    def _vector(self, name: str) -> Array | None:
        return self.refs[name][self.cols].astype(jnp.float32) if name in self.refs else None

    def zeros(self) -> Array:
        """A vector of zeros (CHANNELS,)."""
        return jnp.zeros(CHANNELS, jnp.float32)

    def state(self, name: str, *at: Any) -> State:
        """This program's part of a state, the last two axes; zeros where it was not given."""
        if name not in self.refs:
            return [self.zeros() for _ in self.states]
        return [self.refs[name][(*at, j, self.cols)] for j in self.states]

    def put_state(self, name: str, value: State, *at: Any) -> None:
        """Stores into a state, the last two axes."""
        for j in self.states:
            self.refs[name][(*at, j, self.cols)] = value[j]

    def decay(self, delta: Array, j: int) -> Array:
        """exp(Δ A) of the j-th state."""
        return jnp.exp2(delta * self.A[j])

    def fold(self, body: Callable[[Array, Any], Any], carry: Any, backwards: bool = False) -> Any:
        """Folds ``body(chunk, carry)`` over the chunks of tokens."""
        chunks = self.walk.length // self.walk.chunk

        def step(index: Array, carry: Any) -> Any:
            return body(chunks - 1 - index if backwards else index, carry)

        return jax.lax.fori_loop(0, chunks, step, carry)

    def tokens(self, chunk: Array) -> list[Token]:
        """A chunk's tokens in time order."""
        return [Token(self, chunk * self.walk.chunk + i) for i in range(self.walk.chunk)]


class Token:
    """One token, read where it lies."""

    def __init__(self, program: Program, time: Array):
        self.program = program
        self.at = program.walk.length - 1 - time if program.walk.reverse else time
        self.raw, self.u = self.row("delta"), self.row("u")
        if program.bias is not None:
            self.raw = self.raw + program.bias
        self.delta = softplus(self.raw)
        self.drive = self.delta * self.u

    def row(self, name: str) -> Array:
        """(CHANNELS,) of an array (b, l, e)."""
        p = self.program
        return p.refs[name][p.sample, self.at, p.cols].astype(jnp.float32)

    def shared(self, name: str, j: int) -> Array:
        """The j-th value, the same for all channels, of an array (b, l, n)."""
        p = self.program
        return p.refs[name][p.sample, self.at, j].astype(jnp.float32)

    def write(self, name: str, value: Array) -> None:
        """Stores (CHANNELS,) into (b, l, e)."""
        ref, p = self.program.refs[name], self.program
        ref[p.sample, self.at, p.cols] = value.astype(ref.dtype)

    def write_sums(self, name: str, values: State) -> None:
        """Stores the sum over the channels of each vector into (parts, b, l, n)."""
        p = self.program
        for j, value in enumerate(values):
            p.refs[name][p.part, p.sample, self.at, j] = jnp.sum(value)

    def gated(self) -> tuple[Array, Array | None]:
        """The gradient before the gate, and the factor that turns the ungated y into the gate's gradient."""
        dy = self.row("dy")
        if "z" not in self.program.refs:
            return dy, None
        z = self.row("z")
        s = sigmoid(z)
        return dy * z * s, dy * s * (1 + z * (1 - s))

    def step(self, h: State) -> State:
        """The recurrence."""
        p = self.program
        return [p.decay(self.delta, j) * h[j] + self.drive * self.shared("B", j) for j in p.states]


def forward(p: Program) -> None:
    """y and the last state; also the state before every chunk, where there is a ref ``saved`` for it."""

    def body(chunk: Array, h: State) -> State:
        if "saved" in p.refs:
            p.put_state("saved", h, p.sample, chunk)
        for token in p.tokens(chunk):
            h = token.step(h)
            y = p.zeros() if p.D is None else p.D * token.u
            for j in p.states:
                y = y + h[j] * token.shared("C", j)
            if "z" in p.refs:
                z = token.row("z")
                y = y * z * sigmoid(z)
            token.write("y", y)
        return h

    p.put_state("last", p.fold(body, p.state("first", p.sample)), p.sample)


def backward(p: Program) -> None:
    """Gradients, from the last chunk to the first, whose states are recomputed from the saved one.

    G is the gradient of the state: G_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}.
    """

    def body(chunk: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        states, tokens = [p.state("saved", p.sample, chunk)], p.tokens(chunk)
        for token in tokens:
            states.append(token.step(states[-1]))
        for token in reversed(tokens):
            after = states.pop()
            carry = _token_gradients(p, token, states[-1], after, carry)
        return carry

    start = p.state("dlast", p.sample), [p.zeros() for _ in p.states], p.zeros(), p.zeros()
    g, dA, dD, dbias = p.fold(body, start, backwards=True)
    p.put_state("dfirst", g, p.sample)
    p.put_state("dA", dA, p.sample)
    p.refs["dbias"][p.sample, p.cols] = dbias
    if p.D is not None:
        p.refs["dD"][p.sample, p.cols] = dD


def _token_gradients(p: Program, token: Token, before: State, after: State, carry: tuple) -> tuple[Any, ...]:
    """Writes one token's gradients, given the states around it; carries (state's gradient, dA, dD, dbias)."""
    (g, dA, dD, dbias), u, delta = carry, token.u, token.delta
    dout, dz_per_y = token.gated()
    y = p.zeros() if p.D is None else p.D * u
    dinput, ddecay, dB, dC, g, dA = p.zeros(), p.zeros(), [], [], list(g), list(dA)
    for j in p.states:
        B, C = token.shared("B", j), token.shared("C", j)
        G = g[j] + dout * C
        g[j] = p.decay(delta, j) * G
        dstate = g[j] * before[j]
        dA[j] = dA[j] + dstate * delta
        ddecay = ddecay + dstate * p.A[j]
        dinput = dinput + G * B
        y = y + after[j] * C
        dB.append(G * token.drive)
        dC.append(after[j] * dout)
    draw = (dinput * u + ddecay * (1 / LOG2E)) * sigmoid(token.raw)
    du = dinput * delta
    if dz_per_y is not None:
        token.write("dz", dz_per_y * y)
    if p.D is not None:
        du, dD = du + p.D * dout, dD + dout * u
    token.write("du", du)
    token.write("ddelta", draw)
    token.write_sums("dB", dB)
    token.write_sums("dC", dC)
    return g, dA, dD, dbias + draw
