"""The forward kernel for few and short sequences: a program's warps walk chunks side by side and hand the state on.

Each warp walks a chunk of the same channels from a zero state, and keeps its decays and inputs in registers. From
what every chunk leaves of a state and what it adds, the states that enter them follow; with its own each warp walks
its chunk again. So a sequence takes a fraction of the time that one warp needs for it, and exponentials are made
once, where segments in launches of their own need them twice.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from mambamim_jax.ops.selective_scan.triton_chunks import Chunk, Data, Group
from mambamim_jax.ops.selective_scan.triton_math import LANES
from mambamim_jax.ops.selective_scan.triton_program import SET, Program, Vectors
from mambamim_jax.types import Array

ROWS = frozenset(("u", "delta", "z", "B", "C"))


class Made(NamedTuple):
    """Of a warp's chunk, what the second walk needs: each token's decays and inputs, each group's skip and gate."""

    decays: list[Vectors]
    inputs: list[Vectors]
    skips: list[Array | None]
    gates: list[Array | None]


class Relay:
    """What chunks make of a state, for all warps, through shared memory.

    It has two halves, which turns take alternately, so that one barrier a turn is enough.
    """

    def __init__(self, p: Program):
        self.program, self.math, self.warps = p, p.math, p.walk.abreast
        self.rank = p.lane // LANES
        if self.math.interpret:
            return
        self.row = 4 * LANES
        self.own = 2 * len(p.states) * self.row
        self.half = self.own * self.warps
        self.start = self.math.shared(p.lane, 2 * self.half) + p.lane % LANES * 4

    def enter(self, turn: Array, h: Vectors, keep: Vectors, add: Vectors) -> tuple[Vectors, Vectors]:
        """From the state before a turn those before each warp's chunk, and after the turn."""
        mine, count = [*keep, *add], len(keep)
        if self.math.interpret:
            rows = [x.reshape(self.warps, LANES) for x in mine]
            found = [[jnp.tile(x[i], self.warps) for x in rows] for i in range(self.warps)]
        else:
            half = self.start + (turn & 1) * self.half
            at = half + self.rank * self.own
            done = sum(self.math.put(at + i * self.row, x) for i, x in enumerate(mine))
            at = self.math.barrier(half + done)
            found = [
                [self.math.get(at, warp * self.own + i * self.row) for i in range(2 * count)]
                for warp in range(self.warps)
            ]
        states = [h]
        for xs in found:
            states.append(_step(self.program, xs[:count], states[-1], xs[count:]))
        return self._of_rank(states[:-1]), states[-1]

    def _of_rank(self, states: list[Vectors]) -> Vectors:
        """Of a state for each warp a lane's own warp's."""
        bit = 1
        while len(states) > 1:
            upper = (self.rank & bit) != 0
            states = [
                [jnp.where(upper, *two) for two in zip(b, a)] for a, b in zip(states[::2], states[1::2])
            ]
            bit *= 2
        return states[0]


def forward(p: Program) -> None:
    """y and the last state, of sequences that are one segment, with one set of states and a channel a team."""
    walk, relay = p.walk, Relay(p)
    turns = -(-walk.length // (walk.chunk * walk.abreast))
    rank = p.lane // LANES

    def place(turn: Array) -> Chunk:
        return Chunk(p, jnp.minimum(turn, turns - 1) * walk.abreast + rank, False)

    def read(turn: Array) -> Data:
        return place(turn).read(("u", "delta", "z", "B"))

    def first(turn: Array, rows: Data, touched: list[Array], h: Vectors) -> tuple[Vectors, Any]:
        late, gates = touched if p.D is None else [*touched, p.D], rows.get("z", [])
        delta = [p.bound(x, [*late, *gates[i : i + 1]], turn) for i, x in enumerate(rows["delta"])]
        made, keep, add = _first_walk(p, place(turn).groups({**rows, "delta": delta}))
        own, h = relay.enter(turn, h, keep, add)
        return h, (made, own)

    def body(turn: Array, carry: tuple[Vectors, Any, Any]) -> tuple[Vectors, Any, Any]:
        h, data, touched = carry
        if turns == 1:
            h, left = first(turn, data, touched, h)
            _second_walk(place(turn), *left)
            return h, data, touched
        ahead = _touched(place(turn + 1))
        h, left = p.apart(lambda h: first(turn, data, touched, h), h, turn)
        following = read(turn + 1)

        def rest(carry: None) -> tuple[None, None]:
            _second_walk(place(turn), *left)
            return carry, None

        p.apart(rest, None, turn, 2)
        return h, following, ahead

    (h,), start = p.state("first"), jnp.int32(0)
    data, C = read(start), _touched(place(start), {"C"})
    # the first rows are read anyway, but those of C; later turns carry a value of each
    carry = h, data, C * (1 if turns == 1 else len(ROWS & p.refs.keys()))
    carry = body(start, carry) if turns == 1 else jax.lax.fori_loop(0, turns, body, carry)
    p.put_state("last", [carry[0]])


def _touched(chunk: Chunk, names: Set[str] = ROWS) -> list[Array]:
    """A value of every 32 bytes of a warp's rows, so that the L1 cache has them when they are needed."""
    p, found = chunk.program, []
    first, rank = chunk.at(chunk.count - 1 if p.walk.reverse else 0), p.lane % LANES
    for name in sorted(names & p.refs.keys()):
        if name in ("B", "C"):
            at = first * SET + jnp.minimum(rank, 2 * chunk.count - 1) * 8
        else:
            at = (first + jnp.minimum(rank, chunk.count - 1)) * p.width + p.block * p.walk.width
        found.append(pltriton.load(p.spot(name, at)).astype(jnp.float32))
    return found


def _first_walk(p: Program, groups: list[Group]) -> tuple[Made, Vectors, Vectors]:
    """What the second walk needs; what the chunk leaves of a state, and what it adds."""
    h: Vectors = []
    made = Made([], [], [], [])
    for group in groups:
        for turn in group.turns:
            (delta,), (drive,) = group.spread(group.delta, turn), group.spread(group.drive, turn)
            (decays,) = p.decays([delta])
            inputs = [drive * b for b in group.shared("B", turn)]
            h = _step(p, decays, h, inputs) if h else inputs
            made.decays.append(decays)
            made.inputs.append(inputs)
        made.skips.append(None if p.D is None else p.D * group.u)
        z = group.row("z") if "z" in group.data else None
        made.gates.append(None if z is None else z * p.math.sigmoid(z))
    total = sum((group.delta for group in groups[1:]), groups[0].delta)
    (keep,) = p.decays([p.over_turns(total)])
    return made, keep, h


def _second_walk(chunk: Chunk, made: Made, h: Vectors) -> None:
    """Stores y, of a chunk that the given state enters."""
    p, C = chunk.program, chunk.read(("C",))["C"]
    for first, skip, gate in zip(range(0, chunk.count, p.walk.together), made.skips, made.gates):
        parts = []
        for i in range(first, min(first + p.walk.together, chunk.count)):
            h = _step(p, made.decays[i], h, made.inputs[i])
            parts.append([p.dot(h, [x.astype(jnp.float32) for x in C[i]])])
        y = p.collect(parts + parts[-1:] * (p.walk.together - len(parts)))
        y = y if skip is None else y + skip
        chunk.write("y", first, y if gate is None else y * gate)


def _step(p: Program, decays: Vectors, h: Vectors, inputs: Vectors) -> Vectors:
    return [p.math.fma(*three) for three in zip(decays, h, inputs)]
