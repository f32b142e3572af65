"""Bodies of the selective scan's GPU kernels, written for the Triton backend of Pallas.

Four lanes, a quad, share ``Walk.channels`` channels (1, 2 or 4): each lane keeps a quarter of the states of every
one of them in registers and walks the tokens in time order, a chunk unrolled at a time. Work that a channel needs
once a token (softplus, gates, their gradients) is dealt out over the quad: a lane owns one channel of one token in
every ``4 / channels`` tokens, which make a `Group`. A warp has eight quads.

Lanes list their channels and states in orders of their own, so that most exchanges need no selection: channel k
of a lane is its own channel's number ^ k, and of the sixteen states of a set, state i of a lane is
4 (i ^ quad) + lane of the quad, with the quad's number modulo 4.

Bodies find their refs by name; those of optional inputs are absent.
"""

from __future__ import annotations

import copy
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

Vectors = list[Array]
State = list[Vectors]
"""Vectors (block,) for each channel, for each state, of a lane."""


class Walk(NamedTuple):
    """Static facts of one launch."""

    length: int  # tokens
    chunk: int  # tokens between two saved states
    part: int  # tokens unrolled in the kernel, all of a chunk's or a share of them
    channels: int  # channels of a quad of lanes
    block: int  # lanes of a program
    per_segment: int  # parts of a segment
    ahead: bool  # read a part while the one before it is worked on
    early: bool  # backward: what needs the state after a token while recomputing it, not later
    kept: int  # backward: tokens, the last ones of a part, whose decays stay in registers too
    again: bool  # backward: exchange a second time instead of keeping what was exchanged
    joined: bool  # backward: sum dB and dC over a program's warps in the kernel
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
        self.zero = jnp.minimum(lane, 0).astype(jnp.float32)  # unknown to the compiler
        self.A = [[a * LOG2E for a in channel] for channel in self._natural(refs["A"])]
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

    def _natural(self, ref: Any, *at: Any) -> State:
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
            self._natural(self.refs[name], self.segment, self.sample) if name in self.refs else self.nothing()
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

    def decays_again(self, deltas: Vectors) -> State:
        """`decays`, in a way that keeps the compiler from merging it with them and so from keeping those."""
        fma = self.math.fma
        return [[self.math.exp2(fma(delta, a, self.zero)) for a in A] for delta, A in zip(deltas, self.A)]

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

    def put_sums(self, tokens: Tokens, i: int, dB: Vectors, dC: Vectors) -> None:
        """Stores token i's gradients of B and C, sums after `over_quads`, into ``dBC`` (b, l, sets lanes)."""
        ref, upper, bit = self.refs["dBC"], (self.lane & SET) != 0, SET
        width = LANES if self.walk.joined else self.walk.block
        for s, (b, c) in enumerate(zip(dB, dC)):
            total = jnp.where(upper, c, b) + self.math.exchange(jnp.where(upper, b, c), bit)
            if self.walk.joined:
                total = jnp.sum(total.reshape(-1, LANES), axis=0)
            cols = pl.ds(s * (ref.shape[2] // len(dB)) + self.block * width, width)
            pltriton.store(ref.at[self.sample, tokens.at(i), cols], total, mask=tokens.inside(i, width))

    def fold(self, body: Any, carry: Any, read: Any, backwards: bool = False) -> Any:
        """Folds ``body(part, data, carry)`` over the segment's parts, with ``data = read(part)``."""
        walk = self.walk
        whole, parts = walk.length // walk.part, -(-walk.length // walk.part)
        start = self.segment * walk.per_segment
        end = jnp.minimum(start + walk.per_segment, whole)

        def plain(index: Array, tail: bool, carry: Any) -> Any:
            part = Tokens(self, index, tail)
            return body(part, read(part), carry)

        def tail(carry: Any) -> Any:
            stop = jnp.minimum(start + walk.per_segment, parts)
            first = jnp.maximum(start, whole)
            return jax.lax.fori_loop(first, stop, lambda index, carry: plain(index, True, carry), carry)

        def waiting(carry: Any) -> Any:
            def step(count: Array, carry: Any) -> Any:
                return plain(end - 1 - count if backwards else start + count, False, carry)

            return jax.lax.fori_loop(0, end - start, step, carry)

        def ahead(carry: Any) -> Any:
            def place(count: Array) -> Tokens:
                index = jnp.clip(end - 1 - count if backwards else start + count, 0, whole - 1)
                return Tokens(self, index, False)

            def step(count: Array, carry: Any) -> Any:
                carry, data = carry
                following = read(place(count + 1))
                return body(place(count), data, carry), following

            return jax.lax.fori_loop(0, end - start, step, (carry, read(place(jnp.int32(0)))))[0]

        loops = [ahead if walk.ahead else waiting] * (whole > 0) + [tail] * (whole < parts)
        for loop in reversed(loops) if backwards else loops:
            carry = loop(carry)
        return carry


Data = dict[str, list[Any]]
"""What was read of each array."""


class Tokens:
    """A part: the tokens that are unrolled together; past the end of the sequence their rows are 0."""

    def __init__(self, program: Program, index: Array, tail: bool):
        self.program, self.index, self.tail, self.count = program, index, tail, program.walk.part

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

    def inside(self, i: int, width: int) -> Array | None:
        """Whether token i is inside the sequence, for all of ``width`` values; None for yes."""
        return jnp.broadcast_to(self.time(i) < self.program.walk.length, (width,)) if self.tail else None

    def read(self, names: tuple[str, ...]) -> Data:
        """Reads the named arrays, of those that were given: a vector a group, or of B and C one a token and set."""
        p, data = self.program, {}
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
        p, mask = self.program, self.inside(i, self.program.walk.block)
        n = p.refs["A"].shape[0]
        ats = [self.at(i) * n + (s + p.lane % SET) for s in range(0, n, SET)]
        other = None if mask is None else 0.0
        return [pltriton.load(ref.at[p.sample, at], mask=mask, other=other) for at in ats]

    def groups(self, data: Data) -> list[Group]:
        """The tokens as groups, in time order."""
        return [Group(self, i, data) for i in range(0, self.count, self.program.walk.together)]


class Group:
    """As many tokens as a vector takes, ``Walk.together``: a lane has one channel of one of them."""

    def __init__(self, tokens: Tokens, first: int, data: Data):
        self.tokens, self.first, self.data, self.program = tokens, first, data, tokens.program
        self.math = self.program.math
        self.turns = range(self.program.walk.together)
        row = self.row("delta") if self.program.bias is None else self.row("delta") + self.program.bias
        self.raw, self.u = row, self.row("u")
        self.delta = self.or_zero(self.math.softplus(row))
        self.drive = self.delta * self.u

    def again(self) -> Group:
        """The same, for the compiler of other values, so that it exchanges them again instead of keeping them."""
        if not self.program.walk.again:
            return self
        new, zero = copy.copy(self), self.program.zero
        new.delta, new.drive = self.delta + zero, self.drive + zero
        B = [[x.astype(jnp.float32) + zero for x in sets] for sets in self.data["B"]]
        new.data = {**self.data, "B": B}
        return new

    def or_zero(self, value: Array) -> Array:
        """0 past the end."""
        mask = self.tokens.own(self.first)[1]
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
        ref, (at, inside) = self.program.refs[name], self.tokens.own(self.first)
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


def dot(p: Program, xs: Vectors, ys: Vectors) -> Array:
    """Σ x y over a lane's vectors."""
    total = xs[0] * ys[0]
    for x, y in zip(xs[1:], ys[1:]):
        total = p.math.fma(x, y, total)
    return total


def over_channels(p: Program, state: State, weights: Vectors) -> Vectors:
    """Σ weight x over a lane's channels, for each state."""
    totals = [x * weights[0] for x in state[0]]
    for xs, weight in zip(state[1:], weights[1:]):
        totals = [p.math.fma(x, weight, total) for x, total in zip(xs, totals)]
    return totals


def forward(p: Program) -> None:
    """y and the last state; also the state before every chunk, where there is a ref ``saved`` for it."""

    def read(part: Tokens) -> Data:
        return part.read(("u", "delta", "z", "B", "C"))

    def body(part: Tokens, data: Data, h: State) -> State:
        if "saved" in p.refs:
            p.put_saved(part.index, h)
        for group in part.groups(data):
            parts = []
            for turn in group.turns:
                h = group.step(h, turn)[1]
                C = group.shared("C", turn)
                parts.append([dot(p, xs, C) for xs in h])
            y = p.collect(parts)
            if p.D is not None:
                y = p.math.fma(p.D, group.u, y)
            if "z" in data:
                z = group.row("z")
                y = y * z * p.math.sigmoid(z)
            group.write("y", y)
        return h

    p.put_state("last", p.fold(body, p.state("first"), read))


def ends(p: Program, adjoint: bool) -> None:
    """What each segment makes of a zero state, ``end``, and its sum of delta, for `combine`.

    ``adjoint`` walks the gradient of the state from the segment's last token to its first.
    """

    def read(part: Tokens) -> Data:
        return part.read(("u", "delta", "dy", "z", "C") if adjoint else ("u", "delta", "B"))

    def body(part: Tokens, data: Data, carry: tuple[State, Array]) -> tuple[State, Array]:
        h, total = carry
        groups = part.groups(data)
        for group in reversed(groups) if adjoint else groups:
            for turn in reversed(group.turns) if adjoint else group.turns:
                h = _adjoint_step(p, group, h, turn) if adjoint else group.step(h, turn)[1]
            total = total + group.delta
        return h, total

    h, total = p.fold(body, (p.nothing(), p.zeros()), read, backwards=adjoint)
    p.put_state("end", h)
    p.put_vector("total", total)


def _adjoint_step(p: Program, group: Group, g: State, turn: int) -> State:
    """The gradient of the state before a token from the one after it."""
    douts, C = group.spread(group.gated()[0], turn), group.shared("C", turn)
    sums = [[p.math.fma(dout, c, x) for c, x in zip(C, xs)] for dout, xs in zip(douts, g)]
    decays = p.decays(group.spread(group.delta, turn))
    return [[d * x for d, x in zip(*pair)] for pair in zip(decays, sums)]


def combine(p: Program, segments: int, adjoint: bool) -> None:
    """From every segment's end to the state that enters every segment, ``entry`` (segments, b, n, e)."""

    def segment(index: Array, h: State) -> State:
        s = segments - 1 - index if adjoint else index
        total = [pltriton.load(p.refs["total"].at[s, p.sample, p.channel ^ k]) for k in p.channels]
        p.put_state("entry", h, s)
        end = p._natural(p.refs["end"], s, p.sample)
        decays = p.decays(total)
        return [[p.math.fma(*three) for three in zip(*channel)] for channel in zip(decays, h, end)]

    jax.lax.fori_loop(0, segments, segment, p.state("first"))


class Trail(NamedTuple):
    """What the recomputation of one token leaves for its gradients."""

    decays: State | None
    before: State
    after: State | None
    y: Vectors | None  # a lane's part of the ungated output, a channel each
    dC: Vectors | None  # a lane's sum over quads, a set each


def backward(p: Program) -> None:
    """Gradients of one segment, from its last part to its first.

    A part's states are recomputed from the saved one, for which the parts before it in its chunk are walked too, and
    stay in registers. G is the gradient of the state: G_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}.
    """
    shares = p.walk.chunk // p.walk.part

    def read(part: Tokens) -> tuple[State, Data]:
        return p.saved(part.index // shares), part.read(("u", "delta", "z", "dy", "B", "C"))

    def walk(index: Array, h: State) -> State:
        part = Tokens(p, index, False)
        for group in part.groups(part.read(("u", "delta", "B"))):
            for turn in group.turns:
                h = group.step(h, turn)[1]
        return h

    def body(part: Tokens, data: tuple[State, Data], carry: tuple) -> tuple:
        h, rows = data
        if shares > 1:
            h = jax.lax.fori_loop(part.index // shares * shares, part.index, walk, h)
        return _part_gradients(p, part, rows, h, carry)

    start = p.state("dlast"), p.nothing(), p.zeros(), p.zeros()
    g, dA, dD, dbias = p.fold(body, start, read, backwards=True)
    p.put_state("dfirst", g)
    p.put_state("dA", dA)
    p.put_vector("dD", dD)
    p.put_vector("dbias", dbias)


def _part_gradients(p: Program, part: Tokens, data: Data, h: State, carry: tuple) -> tuple:
    """Writes the gradients of a part's tokens, given the state before it; carries (g, dA, dD, dbias)."""
    trails, groups = [], part.groups(data)
    for group in groups:
        dout, _ = group.gated()
        trail = []
        for turn in group.turns:
            decays, after = group.step(h, turn)
            y, dC = _of_state(p, group, after, dout, turn) if p.walk.early else (None, None)
            kept = decays if group.first + turn >= part.count - p.walk.kept else None
            trail.append(Trail(kept, h, None if p.walk.early else after, y, dC))
            h = after
        trails.append(trail)
    for group in reversed(groups):
        carry = _group_gradients(p, group.again(), trails.pop(), carry)
    return carry


def _of_state(
    p: Program, group: Group, after: State, dout: Array, turn: int
) -> tuple[Vectors | None, Vectors]:
    """A lane's part of the ungated output, and the sums for C's gradient, from the state after a token."""
    C = group.shared("C", turn)
    y = [dot(p, xs, C) for xs in after] if "z" in group.data else None
    return y, p.over_quads(over_channels(p, after, group.spread(dout, turn)))


def _group_gradients(p: Program, group: Group, trail: list[Trail], carry: tuple) -> tuple:
    """Writes a group's gradients; carries (g, dA, dD, dbias)."""
    (g, dA, dD, dbias), fma = carry, p.math.fma
    dout, dz_per_y = group.gated()
    ys, inputs, steps = [], [], []
    for turn in reversed(group.turns):
        last = trail.pop()
        y, dC = (last.y, last.dC) if last.after is None else _of_state(p, group, last.after, dout, turn)
        g, dA, dinput, ddecay, dB = _state_gradients(p, group, last, dout, turn, g, dA)
        p.put_sums(group.tokens, group.first + turn, dB, dC)
        ys.insert(0, y)
        inputs.insert(0, dinput)
        steps.insert(0, ddecay)
    dinput, ddecay = p.collect(inputs), p.collect(steps)
    draw = fma(dinput, group.u, ddecay * (1 / LOG2E)) * p.math.sigmoid(group.raw)
    dbias = dbias + group.or_zero(draw)
    du = dinput * group.delta
    if dz_per_y is not None:
        y = p.collect(ys)
        group.write("dz", dz_per_y * (y if p.D is None else fma(p.D, group.u, y)))
    if p.D is not None:
        du, dD = fma(p.D, dout, du), fma(dout, group.u, dD)
    group.write("du", du)
    group.write("ddelta", draw)
    return g, dA, dD, dbias


def _state_gradients(
    p: Program, group: Group, trail: Trail, dout: Array, turn: int, g: State, dA: State
) -> tuple[State, State, Vectors, Vectors, Vectors]:
    """One token's part in the gradients of state and A; a lane's parts of Σ G B and Σ A dstate, and dB's sums."""
    B, C, fma = group.shared("B", turn), group.shared("C", turn), p.math.fma
    douts, deltas = group.spread(dout, turn), group.spread(group.delta, turn)
    drives = group.spread(group.drive, turn)
    G = [[fma(x, c, y) for c, y in zip(C, ys)] for x, ys in zip(douts, g)]
    decays = p.decays_again(deltas) if trail.decays is None else trail.decays
    g = [[d * x for d, x in zip(*pair)] for pair in zip(decays, G)]
    dstates = [[x * y for x, y in zip(*pair)] for pair in zip(g, trail.before)]
    dA = [[fma(x, delta, y) for x, y in zip(*pair)] for delta, pair in zip(deltas, zip(dstates, dA))]
    ddecay = [dot(p, *pair) for pair in zip(dstates, p.A)]
    return g, dA, [dot(p, xs, B) for xs in G], ddecay, p.over_quads(over_channels(p, G, drives))
