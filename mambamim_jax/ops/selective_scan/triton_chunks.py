"""A `Program`'s walk over its tokens: chunks that are unrolled together, and the groups of tokens within them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from mambamim_jax.ops.selective_scan.triton_math import LANES
from mambamim_jax.ops.selective_scan.triton_program import QUAD, SET, Program, State, Vectors
from mambamim_jax.ops.selective_scan.triton_sums import WarpSums
from mambamim_jax.types import Array

Data = dict[str, list[Any]]
"""What was read of each array."""


class Chunk:
    """The tokens that are unrolled together, or some of them; past the end of the sequence their rows are 0."""

    def __init__(self, program: Program, index: Array, tail: bool, first: int = 0, count: int | None = None):
        self.program, self.index, self.tail, self.first = program, index, tail, first
        self.count = program.walk.chunk if count is None else count

    def halves(self) -> tuple[Chunk, Chunk]:
        """The earlier half of these tokens, and the later one."""
        half = self.count // 2
        earlier, later = (Chunk(self.program, self.index, self.tail, first, half) for first in (0, half))
        return earlier, later

    def time(self, i: int | Array) -> Array:
        """The number of one of these tokens in time order."""
        walk = self.program.walk
        start = self.index * walk.chunk
        return (jnp.minimum(start, walk.length - walk.chunk) if walk.overlaps else start) + self.first + i

    def at(self, i: int) -> Array:
        """Where that token is in the sequence."""
        walk = self.program.walk
        return walk.length - 1 - self.time(i) if walk.reverse else self.time(i)

    def steps(self, i: int) -> int:
        """From the place of the first of these tokens to that of token i."""
        return -i if self.program.walk.reverse else i

    def after(self) -> Chunk:
        """The chunk after this one; itself where that is not whole."""
        return Chunk(self.program, jnp.minimum(self.index + 1, self.program.walk.whole - 1), False)

    def own(self, name: str, i: int, store: bool = False) -> tuple[Any, Array | None]:
        """A ref (b, l e) at the lanes' own values of the group from token i on, and which are inside.

        The interpreter stores what was there where a lane is not inside, so that it needs other places for those.
        """
        p = self.program
        walk, turn = p.walk, p.turn if self.full(i) else jnp.minimum(p.turn, self.count - 1 - i)
        turn = self.steps(1) * turn
        first, step = (self.at(0) + turn) * p.width + p.channel, self.steps(i) * p.width
        inside = self.own_inside(i)
        elsewhere = self.tail or (store and walk.interpret and walk.abreast > 1)
        if inside is None or not elsewhere:
            return p.spot(name, first, step), inside
        past = walk.samples * walk.length * p.width + p.lane  # no two lanes at one place
        return p.spot(name, jnp.where(inside, first + step, past)), inside

    def own_inside(self, i: int) -> Array | None:
        """Whether the lanes' own values of the group from token i on are inside the sequence, and new; None for all."""
        p = self.program
        if p.walk.overlaps or not self.full(i):
            inside = self.time(i) + p.turn >= self.index * p.walk.chunk
            return inside if self.full(i) else inside & (p.turn < self.count - i)
        return self.time(i) + p.turn < p.walk.length if self.tail else None

    def full(self, i: int) -> bool:
        """Whether there is a token for every lane of a team in the group from token i on."""
        return i + self.program.walk.together <= self.count

    def inside(self, i: int) -> Array | None:
        """Whether token i is inside the sequence, for every lane; None for yes."""
        walk = self.program.walk
        return jnp.broadcast_to(self.time(i) < walk.length, (walk.block,)) if self.tail else None

    def read(self, names: tuple[str, ...]) -> Data:
        """Reads the named arrays, of those that were given: a vector a group.

        Of B and C a token has a vector a set, or where states are adjacent one a state of a lane.
        """
        p, data = self.program, Data()
        for name in names:
            if name in ("B", "C"):
                data[name] = [self._shared(name, i) for i in range(self.count)]
            elif name in p.refs:
                data[name] = [self._own(name, i) for i in range(0, self.count, p.walk.together)]
        return data

    def _own(self, name: str, i: int) -> Array:
        spot, inside = self.own(name, i)
        if not self.tail:
            return pltriton.load(spot)
        return pltriton.load(spot, mask=inside, other=0.0)

    def write(self, name: str, i: int, value: Array) -> None:
        """Stores the lanes' own values of the group from token i on into (b, l e)."""
        spot, inside = self.own(name, i, store=True)
        pltriton.store(spot, value.astype(self.program.refs[name].dtype), mask=inside)

    def _shared(self, name: str, i: int) -> Vectors:
        if self.program.walk.adjacent:
            return self._adjacent(name, i)
        p, mask = self.program, self.inside(i)
        n = len(p.states) * QUAD
        first, other = self.at(0) * n + p.quad * QUAD + p.lane % QUAD, None if mask is None else 0.0
        spots = [p.spot(name, first, self.steps(i) * n + s) for s in range(0, n, SET)]
        return [pltriton.load(spot, mask=mask, other=other) for spot in spots]

    def _adjacent(self, name: str, i: int) -> Vectors:
        p, mask = self.program, self.inside(i)
        sets = len(p.states) // p.each
        if mask is not None:
            mask = jnp.broadcast_to(mask[:, None], (p.walk.block, p.each))
        first, other = self.at(0) * sets, None if mask is None else 0.0
        first = first[:, None] if first.ndim else first  # each warp its own chunk
        found = [
            pltriton.load(p.adjacent(name, first, (self.steps(i) * sets + s) * SET), mask=mask, other=other)
            for s in range(sets)
        ]
        return [x.reshape(-1) for own in found for x in jnp.split(own, p.each, axis=1)]

    def put_sums(self, sums: WarpSums, i: int, dB: Vectors, dC: Vectors) -> list[Array]:
        """Token i's gradients of B and C, sums after `over_quads`, a row of ``sums`` for each set."""
        p, rows = self.program, []
        other = QUAD if p.walk.shift else SET
        upper = (p.lane & other) != 0
        for s, (b, c) in enumerate(zip(dB, dC)):
            total = jnp.where(upper, c, b) + p.math.exchange(jnp.where(upper, b, c), other)
            rows.append(sums.put(self.index, (self.first + i) * len(dB) + s, total))
        return rows

    def write_sums(self, sums: WarpSums, rows: list[Array]) -> None:
        """Stores the sums of what `put_sums` gave for all tokens into ``dBC`` (b, l sets programs 32)."""
        p, sets = self.program, len(self.program.states) // QUAD
        programs = p.width // p.walk.width
        for row, total in sums.totals(self.index, rows):
            i, inside = row // sets, None
            if self.tail or p.walk.overlaps or len(rows) % sums.warps:
                time = self.time(i)
                inside = (row < len(rows)) & (self.index * p.walk.chunk <= time) & (time < p.walk.length)
            at = (self.at(0) + self.steps(1) * i) * sets + row % sets
            spot = p.spot("dBC", (at * programs + p.block) * LANES + p.lane % LANES)
            pltriton.store(spot, total, mask=inside)

    def groups(self, data: Data, ready: Sequence[Any] = ()) -> list[Group]:
        """The tokens as groups, in time order; u and Δ are from ``ready``, a record for each, where that is given."""
        firsts = range(0, self.count, self.program.walk.together)
        return [Group(self, i, data, *made) for i, *made in zip(firsts, *([ready] if ready else []))]


class Group:
    """As many tokens as a vector takes, ``Walk.together``: a lane has one channel of one of them."""

    def __init__(self, chunk: Chunk, first: int, data: Data, ready: Any = None):
        self.chunk, self.first, self.data, self.program = chunk, first, data, chunk.program
        self.math = self.program.math
        self.turns = range(min(self.program.walk.together, chunk.count - first))
        self.u = self.row("u") if ready is None else ready.u
        if ready is not None:
            self.delta = ready.delta
        elif "dt" in data:
            self.delta = self.or_zero(self.row("dt"))
        else:
            row = self.row("delta")
            self.raw = row if self.program.bias is None else row + self.program.bias
            self.delta = self.or_zero(self.math.softplus(self.raw))
        self.drive = self.delta * self.u

    def afresh(self, more: Data, zero: Array) -> Group:
        """The same tokens and ``more`` of what was read; delta and B have a zero added that is none to the compiler.

        It would keep what lanes have exchanged of them, and what follows from that, in registers.
        """
        group, B = copy.copy(self), [[x.astype(jnp.float32) + zero for x in sets] for sets in self.data["B"]]
        group.data = {**self.data, **more, "B": B}
        group.delta = self.delta + zero
        group.drive = group.delta * group.u
        return group

    def or_zero(self, value: Array) -> Array:
        """0 past the end, and of tokens that come again."""
        mask = self.chunk.own_inside(self.first)
        return value if mask is None else jnp.where(mask, value, 0.0)

    def row(self, name: str) -> Array:
        """The lanes' own values of an array (b, l, e)."""
        return self.data[name][self.first // self.program.walk.together].astype(jnp.float32)

    def shared(self, name: str, turn: int) -> Vectors:
        """A token's values of an array (b, l, n), for each of a lane's states."""
        sets = [x.astype(jnp.float32) for x in self.data[name][self.first + turn]]
        if self.program.walk.adjacent:
            return sets
        return [self.math.exchange(x, self.program.apart_by * i) for x in sets for i in range(QUAD)]

    def spread(self, value: Array, turn: int) -> Vectors:
        """A token's values, for each of a lane's channels, from the lanes that own them."""
        p = self.program
        if p.walk.together == 1:
            return [self.math.exchange(value, k) for k in p.channels]
        own = p.lane % p.walk.channels
        return [self.math.of_team(value, (own ^ k) + turn * p.walk.channels, p.walk.team) for k in p.channels]

    def write(self, name: str, value: Array) -> None:
        """Stores the lanes' own values into (b, l e)."""
        self.chunk.write(name, self.first, value)

    def gated(self) -> tuple[Array, Array | None]:
        """The gradient before the gate, and the factor that turns the ungated y into the gate's gradient."""
        dy = self.or_zero(self.row("dy"))
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


def whole_chunks(program: Program) -> Array:
    """How many of the segment's chunks lie in the sequence whole."""
    walk = program.walk
    start = program.segment * walk.per_segment
    return jnp.clip(walk.whole - start, 0, walk.per_segment)


def fold(
    program: Program,
    body: Any,
    carry: Any,
    read: Any,
    backwards: bool = False,
    at_once: int = 1,
) -> Any:
    """Folds over the segment's chunks ``carry, fetched = body(chunk, data, carry, fetch)``.

    ``data = read(chunk)``: a chunk is read while the one before it is worked on, where ``body`` calls ``fetch()``. With
    several chunks ``at_once``, in one turn of the loop, what one leaves to the next stays in its registers.
    """
    walk = program.walk
    whole, chunks = walk.whole, -(-walk.length // walk.chunk)
    start = program.segment * walk.per_segment
    end = start + whole_chunks(program)

    def place(count: Array) -> Chunk:
        index = jnp.clip(end - 1 - count if backwards else start + count, 0, whole - 1)
        return Chunk(program, index, False)

    def step(count: Array, carry: Any) -> Any:
        return body(place(count), carry[1], carry[0], lambda: read(place(count + 1)))

    def several(turn: Array, carry: Any) -> Any:
        for i in range(at_once):
            carry = step(at_once * turn + i, carry)
        return carry

    def inner(carry: Any) -> Any:
        carry, count = (carry, read(place(jnp.int32(0)))), end - start
        if at_once == 1:
            return jax.lax.fori_loop(0, count, step, carry)[0]
        turns = count // at_once
        carry = jax.lax.fori_loop(0, turns, several, carry)
        return jax.lax.fori_loop(at_once * turns, count, step, carry)[0]

    def last(index: Array, carry: Any) -> Any:
        chunk = Chunk(program, index, True)
        return body(chunk, read(chunk), carry, lambda: None)[0]

    def tail(carry: Any) -> Any:
        stop = jnp.minimum(start + walk.per_segment, chunks)
        return jax.lax.fori_loop(jnp.maximum(start, whole), stop, last, carry)

    loops = [inner] * (whole > 0) + [tail] * (whole < chunks)
    for loop in reversed(loops) if backwards else loops:
        carry = loop(carry)
    return carry
