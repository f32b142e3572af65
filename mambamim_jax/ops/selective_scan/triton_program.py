"""What the selective scan's GPU kernels are written in: a program, its lanes and what they load, exchange and store.

Four lanes, a quad, share ``Walk.channels`` channels (1, 2 or 4): each lane keeps a quarter of the states of every
one of them in registers and walks the tokens in time order, a chunk unrolled at a time. Work that a channel needs
once a token (softplus, gates, their gradients) is dealt out over the quad: a lane owns one channel of one token in
every ``4 / channels`` tokens, which make a `triton_chunks.Group`. A warp has eight quads.

Lanes list their channels and states in orders of their own, so that most exchanges need no selection: channel k
of a lane is its own channel's number ^ k, and of the sixteen states of a set, state i of a lane is
4 (i ^ quad) + lane of the quad, with the quad's number modulo 4, halved first where ``Walk.shift`` is 1, as in the
backward pass: two of its quads then have the states and the channels of one of the forward pass, ``Walk.wide``.
Where nothing is summed over quads it is 4 * lane of the quad + i instead, ``Walk.adjacent``, so that a lane reads its
B and C in one go; there a team of eight lanes may take the quad's place, with half of the states each.

Kernels find their refs by name; those of optional inputs are absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from mambamim_jax.ops.selective_scan.triton_math import LANES, LOG2E, Math
from mambamim_jax.types import Array

QUAD = 4
SET = 16
"""States of a set: four lanes with four each."""
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
    channels: int  # channels of a team of lanes
    team: int  # lanes that share channels: a quad, or eight of which each has half as many states
    block: int  # lanes of a program
    per_segment: int  # chunks of a segment
    reverse: bool  # time runs from the last token to the first
    skip: int  # segments before the first program's
    adjacent: bool  # a lane's states of a set follow each other
    shift: int  # otherwise as many quads with the same states, 2**shift, stand side by side
    rejoins: bool  # a last chunk that is not full starts earlier, see `overlaps`
    wide: bool  # a forward pass that saves, a quad with the channels that two have in the backward pass
    abreast: int  # warps of a program that walk chunks of the same channels side by side; 1 where all have their own
    interpret: bool  # run by the Pallas interpreter, which knows no inline assembly

    @property
    def width(self) -> int:
        """Channels of a program."""
        return self.block // self.abreast // self.team * self.channels

    @property
    def overlaps(self) -> bool:
        """Whether the last chunk ends with the sequence and takes tokens of the one before again, without effect."""
        return self.rejoins and self.length >= self.chunk and self.length % (self.chunk * self.abreast) > 0

    @property
    def whole(self) -> int:
        """Chunks that have all their tokens in the sequence."""
        return -(-self.length // self.chunk) if self.overlaps else self.length // self.chunk

    @property
    def together(self) -> int:
        """Tokens of a group."""
        return self.team // self.channels


class Program:
    """One program's refs by name, and its place: block of channels, sample, segment of the length."""

    def __init__(self, refs: dict[str, Any], walk: Walk):
        self.refs, self.walk = refs, walk
        self.math = Math(walk.interpret)
        self.block, self.sample, segment = (pl.program_id(axis) for axis in range(3))
        self.segment = segment + walk.skip
        self.lanes = pl.ds(self.block * walk.block, walk.block)
        lane = jnp.arange(walk.block, dtype=jnp.int32)
        self.lane, self.channels = lane, range(walk.channels)
        within = lane if walk.abreast == 1 else lane % LANES
        self.channel = self.block * walk.width + within // walk.team * walk.channels + lane % walk.channels
        self.turn = lane % walk.team // walk.channels
        self.quad, self.apart_by = lane // (QUAD << walk.shift) % QUAD, QUAD << walk.shift
        self.width, n = refs["A"].shape
        self.states, self.each = range(n // walk.team), SET // walk.team
        self.A = [
            [pltriton.load(refs["A"].at[c, row]) * LOG2E for row, c in places] for places in self._places()
        ]
        self.bias, self.D = self._vector("delta_bias"), self._vector("D")
        if not walk.interpret:  # where `awaited` stores
            self.place = self.math.shared(lane, 4 * walk.block) + lane * 4

    def _vector(self, name: str) -> Array | None:
        return (
            pltriton.load(self.refs[name].at[self.channel]).astype(jnp.float32) if name in self.refs else None
        )

    def _places(self) -> list[list[tuple[Array, Array]]]:
        """(state, channel) for each channel and state of the lanes."""
        low, high, each = self.lane % self.walk.team, self.quad, self.each
        rows = [
            i // each * SET
            + (low * each + i % each if self.walk.adjacent else (high ^ i % QUAD) * QUAD + low)
            for i in self.states
        ]
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

    def adjacent(self, name: str, set: Array, offset: int) -> Any:
        """The ref of an array of tokens at each lane's states of a set, and ``offset`` after that.

        Cut as in `spot`, but as a number of sets, so that the compiler sees values that are read in one go.
        """
        ref, each = self.refs[name], self.each
        within = (self.lane % self.walk.team * each)[:, None] + jnp.arange(each, dtype=jnp.int32)[None]
        if len(ref.shape) == 2:
            return ref.at[self.sample, set * SET + offset + within]
        sets = self.sample * (ref.shape[0] // self.walk.samples // SET)
        return ref.at[(sets + set & PLACES // SET - 1) * SET + offset + within]

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

    def put_state(self, name: str, value: State, segment: int | Array | None = None) -> None:
        """Stores into a state per segment."""
        at = self.segment if segment is None else segment, self.sample
        for places, vectors in zip(self._places(), value):
            for place, vector in zip(places, vectors):
                pltriton.store(self.refs[name].at[(*at, *place)], vector)

    def put_vector(self, name: str, value: Array, *at: int) -> None:
        """Stores a sum over each lane's own tokens into an array (segments, b, ..., e)."""
        value = self.over_turns(value)
        pltriton.store(self.refs[name].at[(self.segment, self.sample, *at, self.channel)], value)

    def over_turns(self, value: Array) -> Array:
        """Sums over a team's lanes with the same own channel."""
        bits = self.walk.channels
        while bits < self.walk.team:
            value, bits = value + self.math.exchange(value, bits), bits * 2
        return value

    def put_saved(self, index: Array, value: State) -> None:
        """Stores a state as the lanes have it, into (b, saved, fours of vectors, lanes, 4)."""
        within, ref = jnp.arange(QUAD, dtype=jnp.int32)[None], self.refs["saved"]
        channels = self.walk.channels // 2 if self.walk.wide else self.walk.channels
        for k, vectors in enumerate(value):
            lanes = self._saved_lanes(k, channels)
            for first in range(0, len(vectors), QUAD):
                a, b, c, d = vectors[first : first + QUAD]
                four = jnp.stack((jnp.stack((a, c), -1), jnp.stack((b, d), -1)), -1).reshape(-1, QUAD)
                row = (k % channels * len(vectors) + first) // QUAD
                pltriton.store(ref.at[self.sample, index, row, lanes[:, None], within], four)

    def _saved_lanes(self, k: int, channels: int) -> Array:
        """The backward pass' lane that has this lane's channel k, as its channel k modulo ``channels``."""
        lanes = self.block * self.walk.block + self.lane
        if not self.walk.wide:
            return lanes
        own = lanes % QUAD
        quad = lanes // QUAD * 2 + (own % self.walk.channels // channels ^ k // channels)
        return quad * QUAD + own

    def saved(self, index: Array) -> State:
        """What `put_saved` stored."""
        ref, count = self.refs["saved"], len(self.states)
        fours = [ref[self.sample, index, row, self.lanes, :] for row in range(ref.shape[2])]
        vectors = [x.reshape(-1) for four in fours for x in jnp.split(four, QUAD, axis=1)]
        return [vectors[k * count : (k + 1) * count] for k in self.channels]

    def awaited(self, read: Any) -> Any:
        """What was read, once its reading has ended: what is read afterwards does not begin before.

        A warp waits for reads by counters, of which it has six: one that newer reads share is not done before these.
        """
        if self.walk.interpret:
            return read
        return jax.tree.map(lambda x: self.math.kept(self.place, x.astype(jnp.float32)), read)

    def apart(
        self, work: Callable[[Any], tuple[Any, Any]], carry: Any, time: Array, slack: int = 0
    ) -> tuple[Any, Any]:
        """``work(carry)``, a carry and more, in a branch of its own, so that loads before it stay there.

        It is always taken, as ``time`` is a chunk's number; but the compiler, which knows of no sample or segment
        but that it is below 65,535, cannot tell. Where there are several, each has a ``slack`` of its own, from 0 to
        2: otherwise it would see that one is taken where another was.
        """

        def never(carry: Any) -> tuple[Any, Any]:
            more = jax.eval_shape(work, carry)[1]
            return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), more)

        return jax.lax.cond(self._taken(time, slack), work, never, carry)

    def bound(self, value: Array, others: list[Array], time: Array) -> Array:
        """The same value, which the compiler has not before the others were read too; see `apart` for ``time``.

        It takes the ``slack`` of 1.
        """
        never = self._taken(time, 1).astype(jnp.int32) - 1

        def bits(x: Array) -> Array:
            return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)

        found = bits(value)
        for other in others:
            found = found | (bits(other) & never)
        return jax.lax.bitcast_convert_type(found, jnp.float32)

    def _taken(self, time: Array, slack: int) -> Array:
        """A truth that the compiler cannot know; see `apart`."""
        walk = self.walk
        chunks = -(-walk.length // walk.chunk)
        most = chunks + walk.samples - chunks // -walk.per_segment - slack
        return time + self.sample + self.segment < most

    def decays(self, deltas: Vectors) -> State:
        """exp(Δ A) of each channel and state."""
        return [[self.math.exp2(delta * a) for a in A] for delta, A in zip(deltas, self.A)]

    def dot(self, xs: Vectors, ys: Vectors) -> Array:
        """Σ x y over a lane's vectors."""
        total = xs[0] * ys[0]
        for x, y in zip(xs[1:], ys[1:]):
            total = self.math.fma(x, y, total)
        return total

    def collect(self, parts: list[Vectors]) -> Array:
        """Sums each token's channels over the team; a lane gets the sum of its own channel and token.

        ``parts`` has a vector for each token of a group and channel.
        """
        exchange, bit = self.math.exchange, self.walk.team // 2
        sums = [sum((exchange(x, k) for k, x in enumerate(part) if k), part[0]) for part in parts]
        while len(sums) > 1:
            half, upper = len(sums) // 2, (self.lane & bit) != 0
            sums = [
                jnp.where(upper, b, a) + exchange(jnp.where(upper, a, b), bit)
                for a, b in zip(sums[:half], sums[half:])
            ]
            bit //= 2
        return sums[0]

    def over_quads(self, values: Vectors) -> Vectors:
        """Sums a vector of each state over the four quads with different states; one sum a set and lane.

        A lane gets the first of its own states.
        """
        sets = [values[i : i + QUAD] for i in range(0, len(values), QUAD)]
        return [
            sum((self.math.exchange(x, self.apart_by * i) for i, x in enumerate(x) if i), x[0]) for x in sets
        ]
