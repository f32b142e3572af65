"""What the selective scan's GPU kernels are written in: a program, its chunks of tokens, their groups.

Four lanes, a quad, share ``Walk.channels`` channels (1, 2 or 4): each lane keeps a quarter of the states of every
one of them in registers and walks the tokens in time order, a chunk unrolled at a time. Work that a channel needs
once a token (softplus, gates, their gradients) is dealt out over the quad: a lane owns one channel of one token in
every ``4 / channels`` tokens, which make a `Group`. A warp has eight quads.

Lanes list their channels and states in orders of their own, so that most exchanges need no selection: channel k
of a lane is its own channel's number ^ k, and of the sixteen states of a set, state i of a lane is
4 (i ^ quad) + lane of the quad, with the quad's number modulo 4.

Kernels find their refs by name; those of optional inputs are absent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from mambamim_jax.ops.selective_scan.triton_math import LOG2E, Math
from mambamim_jax.types import Array

QUAD = 4
SET = 16
"""States of a set: four lanes with four each."""

Vectors = list[Array]
State = list[Vectors]
"""Vectors (block,) for each channel, for each state, of a lane."""


class Walk(NamedTuple):
    """Static facts of one launch."""

    length: int  # tokens
    chunk: int  # tokens unrolled in the kernel, between two saved states where there are any
    channels: int  # channels of a quad of lanes
    block: int  # lanes of a program
    per_segment: int  # chunks of a segment
    reverse: bool  # time runs from the last token to the first
    interpret: bool  # run by the Pallas interpreter, which knows no inline assembly

    @property
    def together(self) -> int:
        """Tokens of a group."""
        return QUAD // self.channels


class Program:
    """One program's refs by name, and its place: block of channels, sample, segment of the length."""

    def __init__(self, refs: dict[str, Any], walk: Walk):
        self.refs, self.walk = refs, walk
        self.math = Math(walk.interpret)
        self.block, self.sample, self.segment = (pl.program_id(axis) for axis in range(3))
        self.lanes = pl.ds(self.block * walk.block, walk.block)
        lane = jnp.arange(walk.block, dtype=jnp.int32)
        self.lane, self.channels = lane, range(walk.channels)
        first = self.block * (walk.block // QUAD * walk.channels)
        self.channel = first + lane // QUAD * walk.channels + lane % walk.channels
        self.turn = lane % QUAD // walk.channels
        self.states = range(refs["A"].shape[0] // QUAD)
        self.A = [[a * LOG2E for a in channel] for channel in self.natural(refs["A"])]
        self.bias, self.D = self._vector("delta_bias"), self._vector("D")

    def _vector(self, name: str) -> Array | None:
        return (
            pltriton.load(self.refs[name].at[self.channel]).astype(jnp.float32) if name in self.refs else None
        )

    def _places(self) -> list[list[tuple[Array, Array]]]:
        """(state, channel) for each channel and state of the lanes."""
        low, high = self.lane % QUAD, self.lane // QUAD % QUAD
        rows = [i // QUAD * SET + ((high ^ (i % QUAD)) * QUAD + low) for i in self.states]
        return [[(row, self.channel ^ k) for row in rows] for k in self.channels]

    def natural(self, ref: Any, *at: Any) -> State:
        """The lanes' part of an array (..., n, e)."""
        return [[pltriton.load(ref.at[(*at, *place)]) for place in channel] for channel in self._places()]

    def zeros(self) -> Array:
        """A vector of zeros (block,)."""
        return jnp.zeros(self.walk.block, jnp.float32)

    def nothing(self) -> State:
        """A state of zeros."""
        return [[self.zeros() for _ in self.states] for _ in self.channels]

    def state(self, name: str) -> State:
        """This program's part of a state per segment (segments, b, n, e); zeros where it was not given."""
        return (
            self.natural(self.refs[name], self.segment, self.sample) if name in self.refs else self.nothing()
        )

    def put_state(self, name: str, value: State, segment: Array | None = None) -> None:
        """Stores into a state per segment."""
        at = self.segment if segment is None else segment, self.sample
        for places, vectors in zip(self._places(), value):
            for place, vector in zip(places, vectors):
                pltriton.store(self.refs[name].at[(*at, *place)], vector)

    def put_vector(self, name: str, value: Array) -> None:
        """Stores a sum over each lane's own tokens into an array (segments, b, e), where there is one."""
        if name not in self.refs:
            return
        bits = self.walk.channels
        while bits < QUAD:
            value, bits = value + self.math.exchange(value, bits), bits * 2
        pltriton.store(self.refs[name].at[self.segment, self.sample, self.channel], value)

    def put_saved(self, index: Array, value: State) -> None:
        """Stores a state as the lanes have it, into (b, chunks, vectors, lanes)."""
        for row, vector in enumerate(x for channel in value for x in channel):
            self.refs["saved"][self.sample, index, row, self.lanes] = vector

    def saved(self, index: Array) -> State:
        """What `put_saved` stored."""
        ref, count = self.refs["saved"], len(self.states)
        return [
            [ref[self.sample, index, k * count + i, self.lanes] for i in self.states] for k in self.channels
        ]

    def decays(self, deltas: Vectors) -> State:
        """exp(Δ A) of each channel and state."""
        return [[self.math.exp2(delta * a) for a in A] for delta, A in zip(deltas, self.A)]

    def collect(self, parts: list[Vectors]) -> Array:
        """Sums each token's channels over the quad; a lane gets the sum of its own channel and token.

        ``parts`` has a vector for each token of a group and channel.
        """
        exchange, bit = self.math.exchange, QUAD // 2
        while len(parts) > 1:
            half, upper = len(parts) // 2, (self.lane & bit) != 0
            parts = [
                [jnp.where(upper, b, a) + exchange(jnp.where(upper, a, b), bit) for a, b in zip(*pair)]
                for pair in zip(parts[:half], parts[half:])
            ]
            bit //= 2
        return sum((exchange(x, k) for k, x in enumerate(parts[0]) if k), parts[0][0])

    def over_quads(self, values: Vectors) -> Vectors:
        """Sums a vector of each state over quads with the same parity of number // 4; one sum a set and lane.

        Lane 4 q + s gets state 4 q + s, q modulo 4.
        """
        sets = [values[i : i + QUAD] for i in range(0, len(values), QUAD)]
        return [sum((self.math.exchange(x, QUAD * i) for i, x in enumerate(x) if i), x[0]) for x in sets]

    def put_sums(self, chunk: Chunk, i: int, dB: Vectors, dC: Vectors) -> None:
        """Stores token i's gradients of B and C, sums after `over_quads`, into ``dBC`` (b, l, sets lanes)."""
        ref, upper, bit = self.refs["dBC"], (self.lane & SET) != 0, SET
        for s, (b, c) in enumerate(zip(dB, dC)):
            total = jnp.where(upper, c, b) + self.math.exchange(jnp.where(upper, b, c), bit)
            cols = pl.ds(s * (ref.shape[2] // len(dB)) + self.block * self.walk.block, self.walk.block)
            pltriton.store(ref.at[self.sample, chunk.at(i), cols], total, mask=chunk.inside(i))

    def fold(self, body: Any, carry: Any, read: Any, backwards: bool = False) -> Any:
        """Folds ``body(chunk, data, carry)`` over the segment's chunks, with ``data = read(chunk)``.

        A chunk is read while the one before it is worked on.
        """
        walk = self.walk
        whole, chunks = walk.length // walk.chunk, -(-walk.length // walk.chunk)
        start = self.segment * walk.per_segment
        end = jnp.minimum(start + walk.per_segment, whole)

        def place(count: Array) -> Chunk:
            index = jnp.clip(end - 1 - count if backwards else start + count, 0, whole - 1)
            return Chunk(self, index, False)

        def step(count: Array, carry: Any) -> Any:
            carry, data = carry
            following = read(place(count + 1))
            return body(place(count), data, carry), following

        def inner(carry: Any) -> Any:
            return jax.lax.fori_loop(0, end - start, step, (carry, read(place(jnp.int32(0)))))[0]

        def last(index: Array, carry: Any) -> Any:
            chunk = Chunk(self, index, True)
            return body(chunk, read(chunk), carry)

        def tail(carry: Any) -> Any:
            stop = jnp.minimum(start + walk.per_segment, chunks)
            return jax.lax.fori_loop(jnp.maximum(start, whole), stop, last, carry)

        loops = [inner] * (whole > 0) + [tail] * (whole < chunks)
        for loop in reversed(loops) if backwards else loops:
            carry = loop(carry)
        return carry


Data = dict[str, list[Any]]
"""What was read of each array."""


class Chunk:
    """The tokens that are unrolled together; past the end of the sequence their rows are 0."""

    def __init__(self, program: Program, index: Array, tail: bool):
        self.program, self.index, self.tail, self.count = program, index, tail, program.walk.chunk

    def time(self, i: int) -> Array:
        """The number of one of these tokens in time order."""
        return self.index * self.count + i

    def at(self, i: int) -> Array:
        """Where that token is in the sequence."""
        walk = self.program.walk
        return walk.length - 1 - self.time(i) if walk.reverse else self.time(i)

    def own(self, i: int) -> tuple[Array, Array | None]:
        """Where in (l e) the lanes' own values of the group from token i on are, and which are inside."""
        p = self.program
        walk, width = p.walk, p.refs["A"].shape[1]
        turn = -p.turn if walk.reverse else p.turn
        at = self.at(i) * width + (turn * width + p.channel)
        if not self.tail:
            return at, None
        inside = self.time(i) + p.turn < walk.length
        return jnp.where(inside, at, walk.length * width + p.lane), inside  # no two lanes at one place

    def inside(self, i: int) -> Array | None:
        """Whether token i is inside the sequence, for every lane; None for yes."""
        walk = self.program.walk
        return jnp.broadcast_to(self.time(i) < walk.length, (walk.block,)) if self.tail else None

    def read(self, names: tuple[str, ...]) -> Data:
        """Reads the named arrays, of those that were given: a vector a group, or of B and C one a token and set."""
        p, data = self.program, Data()
        for name in names:
            if name in ("B", "C"):
                data[name] = [self._shared(p.refs[name], i) for i in range(self.count)]
            elif name in p.refs:
                data[name] = [self._own(p.refs[name], i) for i in range(0, self.count, p.walk.together)]
        return data

    def _own(self, ref: Any, i: int) -> Array:
        at, inside = self.own(i)
        return pltriton.load(
            ref.at[self.program.sample, at], mask=inside, other=None if inside is None else 0.0
        )

    def _shared(self, ref: Any, i: int) -> Vectors:
        p, mask = self.program, self.inside(i)
        n = p.refs["A"].shape[0]
        ats = [self.at(i) * n + (s + p.lane % SET) for s in range(0, n, SET)]
        other = None if mask is None else 0.0
        return [pltriton.load(ref.at[p.sample, at], mask=mask, other=other) for at in ats]

    def groups(self, data: Data) -> list[Group]:
        """The tokens as groups, in time order."""
        return [Group(self, i, data) for i in range(0, self.count, self.program.walk.together)]


class Group:
    """As many tokens as a vector takes, ``Walk.together``: a lane has one channel of one of them."""

    def __init__(self, chunk: Chunk, first: int, data: Data):
        self.chunk, self.first, self.data, self.program = chunk, first, data, chunk.program
        self.math = self.program.math
        self.turns = range(self.program.walk.together)
        row = self.row("delta") if self.program.bias is None else self.row("delta") + self.program.bias
        self.raw, self.u = row, self.row("u")
        self.delta = self.or_zero(self.math.softplus(row))
        self.drive = self.delta * self.u

    def or_zero(self, value: Array) -> Array:
        """0 past the end."""
        mask = self.chunk.own(self.first)[1]
        return value if mask is None else jnp.where(mask, value, 0.0)

    def row(self, name: str) -> Array:
        """The lanes' own values of an array (b, l, e)."""
        return self.data[name][self.first // len(self.turns)].astype(jnp.float32)

    def shared(self, name: str, turn: int) -> Vectors:
        """A token's values of an array (b, l, n), for each of a lane's states."""
        sets = [x.astype(jnp.float32) for x in self.data[name][self.first + turn]]
        return [self.math.exchange(x, QUAD * i) for x in sets for i in range(QUAD)]

    def spread(self, value: Array, turn: int) -> Vectors:
        """A token's values, for each of a lane's channels, from the lanes that own them."""
        p = self.program
        if len(self.turns) == 1:
            return [self.math.exchange(value, k) for k in p.channels]
        own = p.lane % p.walk.channels
        return [self.math.of_quad(value, (own ^ k) + turn * p.walk.channels) for k in p.channels]

    def write(self, name: str, value: Array) -> None:
        """Stores the lanes' own values into (b, l e)."""
        ref, (at, inside) = self.program.refs[name], self.chunk.own(self.first)
        pltriton.store(ref.at[self.program.sample, at], value.astype(ref.dtype), mask=inside)

    def gated(self) -> tuple[Array, Array | None]:
        """The gradient before the gate, and the factor that turns the ungated y into the gate's gradient."""
        dy = self.row("dy")
        if "z" not in self.data:
            return dy, None
        z = self.row("z")
        s = self.math.sigmoid(z)
        return dy * z * s, dy * s * (1 + z * (1 - s))

    def step(self, h: State, turn: int) -> tuple[State, State]:
        """One token of the recurrence: exp(Δ A) and the state after."""
        deltas, drives = self.spread(self.delta, turn), self.spread(self.drive, turn)
        B, fma = self.shared("B", turn), self.math.fma
        decays = self.program.decays(deltas)
        kept = [[d * x for d, x in zip(*pair)] for pair in zip(decays, h)]
        return decays, [[fma(drive, b, x) for b, x in zip(B, xs)] for drive, xs in zip(drives, kept)]
