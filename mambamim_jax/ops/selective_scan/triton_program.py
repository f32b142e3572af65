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
STRIDE = 2
"""Chunks from one saved state to the next."""
PLACES = 2**30
"""Arrays with fewer elements reach the kernels flat, see `Program.spot`."""

Vectors = list[Array]
State = list[Vectors]
"""Vectors (block,) for each channel, for each state, of a lane."""


class Walk(NamedTuple):
    """Static facts of one launch."""

    samples: int
    length: int  # tokens
    chunk: int  # tokens unrolled in the kernel
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
        self.width, n = refs["A"].shape
        self.states = range(n // QUAD)
        self.A = [
            [pltriton.load(refs["A"].at[c, row]) * LOG2E for row, c in places] for places in self._places()
        ]
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

    def spot(self, name: str, first: Array, step: int = 0) -> Any:
        """The ref of an array of tokens, a row a sample, at ``first + step`` in this program's row.

        One that is flat gets its number cut to the bits it has anyway: no sum with a step can then overflow, as
        the compiler sees, and steps become part of the instructions that load and store.
        """
        ref = self.refs[name]
        if len(ref.shape) == 2:
            return ref.at[self.sample, first + step]
        row = self.sample * (ref.shape[0] // self.walk.samples)
        return ref.at[(row + first & PLACES - 1) + step]

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

    def put_vector(self, name: str, value: Array, *at: int) -> None:
        """Stores a sum over each lane's own tokens into an array (segments, b, ..., e)."""
        bits = self.walk.channels
        while bits < QUAD:
            value, bits = value + self.math.exchange(value, bits), bits * 2
        pltriton.store(self.refs[name].at[(self.segment, self.sample, *at, self.channel)], value)

    def put_saved(self, index: Array, value: State) -> None:
        """Stores a state as the lanes have it, into (b, saved, fours of vectors, lanes, 4)."""
        vectors = [x for channel in value for x in channel]
        for row in range(len(vectors) // QUAD):
            a, b, c, d = vectors[row * QUAD : (row + 1) * QUAD]
            four = jnp.stack((jnp.stack((a, c), -1), jnp.stack((b, d), -1)), -1).reshape(-1, QUAD)
            self.refs["saved"][self.sample, index, row, self.lanes, :] = four

    def saved(self, index: Array) -> State:
        """What `put_saved` stored."""
        ref, count = self.refs["saved"], len(self.states)
        fours = [ref[self.sample, index, row, self.lanes, :] for row in range(ref.shape[2])]
        vectors = [x.reshape(-1) for four in fours for x in jnp.split(four, QUAD, axis=1)]
        return [vectors[k * count : (k + 1) * count] for k in self.channels]

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
        """Stores token i's gradients of B and C, sums after `over_quads`, into ``dBC`` (b, l sets lanes)."""
        upper, bit, walk = (self.lane & SET) != 0, SET, self.walk
        lanes = self.width // walk.channels * QUAD
        for s, (b, c) in enumerate(zip(dB, dC)):
            total = jnp.where(upper, c, b) + self.math.exchange(jnp.where(upper, b, c), bit)
            first = chunk.at(0) * (lanes * len(dB)) + self.block * walk.block + self.lane
            spot = self.spot("dBC", first, chunk.steps(i) * lanes * len(dB) + s * lanes)
            pltriton.store(spot, total, mask=chunk.inside(i))

    def fold(
        self,
        body: Any,
        carry: Any,
        read: Any,
        settle: Any = lambda chunk, data: data,
        backwards: bool = False,
    ) -> Any:
        """Folds ``body(chunk, data, carry)`` over the segment's chunks, with ``data = settle(chunk, read(chunk))``.

        A chunk is read while the one before it is worked on, and settled after that.
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
            carry = body(place(count), data, carry)
            return carry, settle(place(count + 1), following)

        def inner(carry: Any) -> Any:
            first = place(jnp.int32(0))
            return jax.lax.fori_loop(0, end - start, step, (carry, settle(first, read(first))))[0]

        def last(index: Array, carry: Any) -> Any:
            chunk = Chunk(self, index, True)
            return body(chunk, settle(chunk, read(chunk)), carry)

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

    def steps(self, i: int) -> int:
        """From the place of the first of these tokens to that of token i."""
        return -i if self.program.walk.reverse else i

    def before(self) -> Chunk:
        """The chunk before this one; the first one itself where there is none."""
        tail = self.count > self.program.walk.length
        return Chunk(self.program, jnp.maximum(self.index - 1, 0), tail)

    def own(self, name: str, i: int) -> tuple[Any, Array | None]:
        """A ref (b, l e) at the lanes' own values of the group from token i on, and which are inside."""
        p = self.program
        walk, turn = p.walk, self.steps(1) * p.turn
        first, step = (self.at(0) + turn) * p.width + p.channel, self.steps(i) * p.width
        inside = self.own_inside(i)
        if inside is None:
            return p.spot(name, first, step), None
        past = walk.samples * walk.length * p.width + p.lane  # no two lanes at one place
        return p.spot(name, jnp.where(inside, first + step, past)), inside

    def own_inside(self, i: int) -> Array | None:
        """Whether the lanes' own values of the group from token i on are inside the sequence; None for all."""
        p = self.program
        return self.time(i) + p.turn < p.walk.length if self.tail else None

    def inside(self, i: int) -> Array | None:
        """Whether token i is inside the sequence, for every lane; None for yes."""
        walk = self.program.walk
        return jnp.broadcast_to(self.time(i) < walk.length, (walk.block,)) if self.tail else None

    def read(self, names: tuple[str, ...]) -> Data:
        """Reads the named arrays, of those that were given: a vector a group, or of B and C one a token and set."""
        p, data = self.program, Data()
        for name in names:
            if name in ("B", "C"):
                data[name] = [self._shared(name, i) for i in range(self.count)]
            elif name in p.refs:
                data[name] = [self._own(name, i) for i in range(0, self.count, p.walk.together)]
        return data

    def _own(self, name: str, i: int) -> Array:
        spot, inside = self.own(name, i)
        return pltriton.load(spot, mask=inside, other=None if inside is None else 0.0)

    def _shared(self, name: str, i: int) -> Vectors:
        p, mask = self.program, self.inside(i)
        n = len(p.states) * QUAD
        first, other = self.at(0) * n + p.lane % SET, None if mask is None else 0.0
        spots = [p.spot(name, first, self.steps(i) * n + s) for s in range(0, n, SET)]
        return [pltriton.load(spot, mask=mask, other=other) for spot in spots]

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
        mask = self.chunk.own_inside(self.first)
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
        spot, inside = self.chunk.own(name, self.first)
        pltriton.store(spot, value.astype(self.program.refs[name].dtype), mask=inside)

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
