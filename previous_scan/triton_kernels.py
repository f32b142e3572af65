"""Bodies of the selective scan's GPU kernels, written for the Triton backend of Pallas.

A program is one warp, or a few, with one channel a lane. The lane holds its channel's whole state as n
scalars in registers and walks the tokens in time order, a chunk of tokens unrolled at a time. So sums over
the state need no communication, every access to (b, l, e) is one coalesced row, and only the gradients of B
and C cross lanes.

Bodies find their refs by name; those of optional inputs are absent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from previous_scan.triton_math import LANES, LOG2E, Math, State
from mambamim_jax.types import Array


class Walk(NamedTuple):
    """Static facts of one launch."""

    length: int  # tokens
    chunk: int  # tokens between two saved states
    block: int  # channels of a program, one a lane
    per_segment: int  # chunks of a segment
    reverse: bool  # time runs from the last token to the first
    interpret: bool  # run by the Pallas interpreter, which knows no inline assembly


class Program:
    """One program's refs by name, and its place: block of channels, sample, segment of the length."""

    def __init__(self, refs: dict[str, Any], walk: Walk):
        self.refs, self.walk, self.math = refs, walk, Math(walk.interpret)
        self.part, self.sample, self.segment = (pl.program_id(axis) for axis in range(3))
        self.cols = pl.ds(self.part * walk.block, walk.block)
        self.states = range(refs["A"].shape[0])
        self.A = [refs["A"][j, self.cols] * LOG2E for j in self.states]
        self.bias, self.D = self._vector("delta_bias"), self._vector("D")

    def _vector(self, name: str) -> Array | None:
        return self.refs[name][self.cols].astype(jnp.float32) if name in self.refs else None

    def zeros(self) -> Array:
        """A vector of zeros (block,)."""
        return jnp.zeros(self.walk.block, jnp.float32)

    def state(self, name: str) -> State:
        """This program's part of a state per segment (segments, b, n, e); zeros where it was not given."""
        if name not in self.refs:
            return [self.zeros() for _ in self.states]
        return [self.refs[name][self.segment, self.sample, j, self.cols] for j in self.states]

    def put_state(self, name: str, value: State) -> None:
        """Stores into a state per segment."""
        for j in self.states:
            self.refs[name][self.segment, self.sample, j, self.cols] = value[j]

    def put_vector(self, name: str, value: Array) -> None:
        """Stores (block,) into an array (segments, b, e), where there is one."""
        if name in self.refs:
            self.refs[name][self.segment, self.sample, self.cols] = value

    def decay(self, delta: Array, j: int) -> Array:
        """exp(Δ A) of the j-th state."""
        return self.math.exp2(delta * self.A[j])

    def fold(self, body: Any, carry: Any, names: tuple[str, ...], backwards: bool = False) -> Any:
        """Folds ``body(chunk, carry)`` over the segment's chunks of tokens, with the named arrays read.

        A chunk is read while the one before it is worked on, so that no warp waits for the memory.
        """
        walk = self.walk
        whole, chunks = walk.length // walk.chunk, -(-walk.length // walk.chunk)
        start = self.segment * walk.per_segment
        end = jnp.minimum(start + walk.per_segment, whole)

        def tail(carry: Any) -> Any:
            def step(index: Array, carry: Any) -> Any:
                return body(Chunk(self, index, True).read(names), carry)

            stop = jnp.minimum(start + walk.per_segment, chunks)
            return jax.lax.fori_loop(jnp.maximum(start, whole), stop, step, carry)

        def main(carry: Any) -> Any:
            def place(count: Array) -> Array:
                return jnp.clip(end - 1 - count if backwards else start + count, 0, whole - 1)

            def step(count: Array, carry: Any) -> Any:
                carry, data = carry
                following = Chunk(self, place(count + 1), False).read(names).data
                return body(Chunk(self, place(count), False, data), carry), following

            first = Chunk(self, place(jnp.int32(0)), False).read(names).data
            return jax.lax.fori_loop(0, end - start, step, (carry, first))[0]

        parts = [main] * (whole > 0) + [tail] * (whole < chunks)
        for part in reversed(parts) if backwards else parts:
            carry = part(carry)
        return carry


class Chunk:
    """A chunk of tokens and what was read of it, a list of vectors (block,) for each array.

    Of (b, l, e) a vector is a token's row. Of (b, l, n) the chunk's values lie one after the other over the lanes of
    as many vectors as it takes, the same in every warp. Of ``saved`` they are the states before the chunk.
    """

    def __init__(self, program: Program, index: Array, tail: bool, data: dict[str, State] | None = None):
        self.program, self.index, self.data = program, index, data or {}
        walk = program.walk
        times = [index * walk.chunk + i for i in range(walk.chunk)]
        self.inside = [time < walk.length if tail else None for time in times]
        self.at = [walk.length - 1 - time if walk.reverse else time for time in times]

    def read(self, names: tuple[str, ...]) -> Chunk:
        """Reads the named arrays, of those that were given; past the end of the sequence it reads zeros."""
        for name in names:
            if name == "saved":
                p = self.program
                self.data[name] = [p.refs[name][p.sample, self.index, j, p.cols] for j in p.states]
            elif name in ("B", "C"):
                self.data[name] = self._read_flat(name)
            elif name in self.program.refs:
                self.data[name] = [self._read_row(name, i) for i in range(self.program.walk.chunk)]
        return self

    def _read_row(self, name: str, i: int) -> Array:
        p = self.program
        ref = p.refs[name].at[p.sample, self.at[i], p.cols]
        return pltriton.load(ref, mask=self._mask(i), other=None if self.inside[i] is None else 0.0)

    def _read_flat(self, name: str) -> State:
        p, n = self.program, len(self.program.states)
        ref, count = p.refs[name], p.walk.chunk * n
        lane = jnp.arange(p.walk.block, dtype=jnp.int32) % LANES
        start = (self.at[-1] if p.walk.reverse else self.at[0]) * n
        vectors = []
        for offset in range(0, count, LANES):
            at = start + offset + lane
            mask = (at >= 0) & (at < p.walk.length * n) & (offset + lane < count)
            whole = self.inside[0] is None and offset + LANES <= count
            at_ref = ref.at[p.sample, at]
            vectors.append(pltriton.load(at_ref) if whole else pltriton.load(at_ref, mask=mask, other=0.0))
        return vectors

    def _mask(self, i: int) -> Array | None:
        inside = self.inside[i]
        return None if inside is None else jnp.broadcast_to(inside, (self.program.walk.block,))

    def tokens(self) -> list[Token]:
        """The chunk's tokens in time order."""
        return [Token(self, i) for i in range(self.program.walk.chunk)]


class Token:
    """One token of a chunk; past the end of the sequence its rows are 0, and nothing is written."""

    def __init__(self, chunk: Chunk, i: int):
        self.chunk, self.i, self.program = chunk, i, chunk.program
        self.math = chunk.program.math
        row = self.row("delta") if self.program.bias is None else self.row("delta") + self.program.bias
        self.raw, self.u = row, self.row("u")
        self.delta = self.or_zero(self.math.softplus(row))
        self.drive = self.delta * self.u

    def or_zero(self, value: Array) -> Array:
        """0 past the end."""
        mask = self.chunk._mask(self.i)
        return value if mask is None else jnp.where(mask, value, 0.0)

    def row(self, name: str) -> Array:
        """(block,) of an array (b, l, e)."""
        return self.chunk.data[name][self.i].astype(jnp.float32)

    def shared(self, name: str, j: int) -> Array:
        """The j-th value of an array (b, l, n), for all lanes."""
        walk, n = self.program.walk, len(self.program.states)
        at = (walk.chunk - 1 - self.i if walk.reverse else self.i) * n + j
        return self.math.broadcast(self.chunk.data[name][at // LANES].astype(jnp.float32), at % LANES)

    def write(self, name: str, value: Array) -> None:
        """Stores (block,) into (b, l, e)."""
        ref, p = self.program.refs[name], self.program
        at = ref.at[p.sample, self.chunk.at[self.i], p.cols]
        pltriton.store(at, value.astype(ref.dtype), mask=self.chunk._mask(self.i))

    def write_sums(self, values: State) -> None:
        """Stores the lane sums of the gradients of B and C, 32 a group, into ``dBC`` (b, l, groups e)."""
        groups = -(-len(values) // LANES)
        values = values + [self.program.zeros()] * (groups * LANES - len(values))
        ref, p = self.program.refs["dBC"], self.program
        for i in range(groups):
            cols = pl.ds(i * (ref.shape[2] // groups) + p.part * p.walk.block, p.walk.block)
            sums = self.math.lane_sums(values[i * LANES : (i + 1) * LANES])
            pltriton.store(ref.at[p.sample, self.chunk.at[self.i], cols], sums, mask=self.chunk._mask(self.i))

    def gated(self) -> tuple[Array, Array | None]:
        """The gradient before the gate, and the factor that turns the ungated y into the gate's gradient."""
        dy = self.row("dy")
        if "z" not in self.chunk.data:
            return dy, None
        z = self.row("z")
        s = self.math.sigmoid(z)
        return dy * z * s, dy * s * (1 + z * (1 - s))

    def step(self, h: State) -> State:
        """The recurrence."""
        p, fma = self.program, self.math.fma
        return [fma(p.decay(self.delta, j), h[j], self.drive * self.shared("B", j)) for j in p.states]


def forward(p: Program) -> None:
    """y and the last state; also the state before every chunk, where there is a ref ``saved`` for it."""

    def body(chunk: Chunk, h: State) -> State:
        if "saved" in p.refs:
            for j in p.states:
                p.refs["saved"][p.sample, chunk.index, j, p.cols] = h[j]
        for token in chunk.tokens():
            h = token.step(h)
            y = p.zeros() if p.D is None else p.D * token.u
            for j in p.states:
                y = p.math.fma(h[j], token.shared("C", j), y)
            if "z" in chunk.data:
                z = token.row("z")
                y = y * z * p.math.sigmoid(z)
            token.write("y", y)
        return h

    p.put_state("last", p.fold(body, p.state("first"), ("u", "delta", "z", "B", "C")))


def ends(p: Program, adjoint: bool) -> None:
    """What each segment makes of a zero state, ``end``, and its sum of delta, for `combine`.

    ``adjoint`` walks the gradient of the state from the segment's last token to its first.
    """

    def body(chunk: Chunk, carry: tuple[State, Array]) -> tuple[State, Array]:
        h, total = carry
        for token in reversed(chunk.tokens()) if adjoint else chunk.tokens():
            if adjoint:
                dout, _ = token.gated()
                sums = [p.math.fma(dout, token.shared("C", j), h[j]) for j in p.states]
                h = [p.decay(token.delta, j) * sums[j] for j in p.states]
            else:
                h = token.step(h)
            total = total + token.delta
        return h, total

    names = ("u", "delta", "dy", "z", "C") if adjoint else ("u", "delta", "B")
    h, total = p.fold(body, ([p.zeros() for _ in p.states], p.zeros()), names, backwards=adjoint)
    p.put_state("end", h)
    p.put_vector("total", total)


def combine(p: Program, segments: int, adjoint: bool) -> None:
    """From every segment's end to the state that enters every segment, ``entry`` (segments, b, n, e)."""

    def segment(index: Array, h: State) -> State:
        s = segments - 1 - index if adjoint else index
        total = p.refs["total"][s, p.sample, p.cols]
        for j in p.states:
            p.refs["entry"][s, p.sample, j, p.cols] = h[j]
        return [p.math.fma(p.decay(total, j), h[j], p.refs["end"][s, p.sample, j, p.cols]) for j in p.states]

    jax.lax.fori_loop(0, segments, segment, p.state("first"))


def backward(p: Program) -> None:
    """Gradients of one segment, from its last chunk to its first.

    A chunk's states are recomputed from the saved one and stay in registers. G is the gradient of the state:
    G_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}.
    """

    def body(chunk: Chunk, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        states, tokens = [chunk.data["saved"]], chunk.tokens()
        for token in tokens:
            states.append(token.step(states[-1]))
        for token in reversed(tokens):
            after = states.pop()
            carry = _token_gradients(p, token, states[-1], after, carry)
        return carry

    start = p.state("dlast"), [p.zeros() for _ in p.states], p.zeros(), p.zeros()
    names = ("u", "delta", "z", "dy", "B", "C", "saved")
    g, dA, dD, dbias = p.fold(body, start, names, backwards=True)
    p.put_state("dfirst", g)
    p.put_state("dA", dA)
    p.put_vector("dD", dD)
    p.put_vector("dbias", dbias)


def _token_gradients(p: Program, token: Token, before: State, after: State, carry: tuple) -> tuple[Any, ...]:
    """Writes one token's gradients, given the states around it; carries (state's gradient, dA, dD, dbias)."""
    (g, dA, dD, dbias), fma, u, delta = carry, p.math.fma, token.u, token.delta
    dout, dz_per_y = token.gated()
    y = p.zeros() if p.D is None else p.D * u
    dinput, ddecay, dB, dC, g, dA = p.zeros(), p.zeros(), [], [], list(g), list(dA)
    for j in p.states:
        B, C = token.shared("B", j), token.shared("C", j)
        G = fma(dout, C, g[j])
        g[j] = p.decay(delta, j) * G
        dstate = g[j] * before[j]
        dA[j] = fma(dstate, delta, dA[j])
        ddecay = fma(dstate, p.A[j], ddecay)
        dinput = fma(G, B, dinput)
        if dz_per_y is not None:
            y = fma(after[j], C, y)
        dB.append(G * token.drive)
        dC.append(after[j] * dout)
    draw = fma(dinput, u, ddecay * (1 / LOG2E)) * p.math.sigmoid(token.raw)
    dbias = dbias + token.or_zero(draw)
    du = dinput * delta
    if dz_per_y is not None:
        token.write("dz", dz_per_y * y)
    if p.D is not None:
        du, dD = fma(p.D, dout, du), fma(dout, u, dD)
    token.write("du", du)
    token.write("ddelta", draw)
    token.write_sums(dB + dC)
    return g, dA, dD, dbias
