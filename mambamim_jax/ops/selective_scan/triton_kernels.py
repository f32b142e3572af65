"""Bodies of the selective scan's GPU kernels, written for the Triton backend of Pallas."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from mambamim_jax.ops.selective_scan.triton_chunks import Chunk, Data, Group, fold
from mambamim_jax.ops.selective_scan.triton_math import LANES, LOG2E
from mambamim_jax.ops.selective_scan.triton_program import QUAD, Program, State, Vectors
from mambamim_jax.ops.selective_scan.triton_sums import WarpSums
from mambamim_jax.types import Array

Fetch = Callable[[], Any]
"""Reads the next chunk; None where there is none."""

Carry = tuple[State, State, Array, Array]
"""The gradient of the state, and what was summed of those of A, D and delta_bias."""

AT_ONCE = 32
"""Segments that `combine` reads at once."""


def over_channels(p: Program, state: State, weights: Vectors) -> Vectors:
    """Σ weight x over a lane's channels, for each state."""
    totals = [x * weights[0] for x in state[0]]
    for xs, weight in zip(state[1:], weights[1:]):
        totals = [p.math.fma(x, weight, total) for x, total in zip(xs, totals)]
    return totals


def forward(p: Program) -> None:
    """y and the last state; also the state before every chunk, where there is a ref ``saved`` for it."""

    def read(chunk: Chunk) -> Data:
        return chunk.read(("u", "delta", "dt", "z", "B", "C"))

    def body(chunk: Chunk, data: Data, h: State, fetch: Fetch) -> tuple[State, Data]:
        following = fetch()

        def work(h: State) -> tuple[State, None]:
            if "saved" in p.refs:
                p.put_saved(chunk.index, h)
            for group in chunk.groups(data):
                parts = []
                for turn in group.turns:
                    h = group.step(h, turn)[1]
                    C = group.shared("C", turn)
                    parts.append([p.dot(xs, C) for xs in h])
                y = p.collect(parts)
                if p.D is not None:
                    y = p.math.fma(p.D, group.u, y)
                if "z" in data:
                    z = group.row("z")
                    y = y * z * p.math.sigmoid(z)
                group.write("y", y)
            return h, None

        return p.apart(work, h, chunk.index)[0], following

    p.put_state("last", fold(p, body, p.state("first"), read))


def ends(p: Program, adjoint: bool) -> None:
    """What each segment makes of a zero state, ``end``, and its sum of delta, for `combine`.

    ``adjoint`` walks the gradient of the state from the segment's last token to its first. Where there is a ref ``dt``,
    Δ is stored for `forward`.
    """

    def read(chunk: Chunk) -> Data:
        return chunk.read(("u", "delta", "dy", "z", "C") if adjoint else ("u", "delta", "B"))

    def body(chunk: Chunk, data: Data, carry: tuple[State, Array], fetch: Fetch) -> tuple[Any, Data]:
        following = fetch()

        def work(carry: tuple[State, Array]) -> tuple[tuple[State, Array], None]:
            (h, total), groups = carry, chunk.groups(data)
            for group in reversed(groups) if adjoint else groups:
                for turn in reversed(group.turns) if adjoint else group.turns:
                    h = _adjoint_step(p, group, h, turn) if adjoint else group.step(h, turn)[1]
                total = total + group.delta
                if "dt" in p.refs:
                    group.write("dt", group.delta)
            return (h, total), None

        return p.apart(work, carry, chunk.index)[0], following

    h, total = fold(p, body, (p.nothing(), p.zeros()), read, backwards=adjoint)
    p.put_state("end", h)
    p.put_vector("total", total)


def _adjoint_step(p: Program, group: Group, g: State, turn: int) -> State:
    """The gradient of the state before a token from the one after it."""
    douts, C = group.spread(group.gated()[0], turn), group.shared("C", turn)
    sums = [[p.math.fma(dout, c, x) for c, x in zip(C, xs)] for dout, xs in zip(douts, g)]
    decays = p.decays(group.spread(group.delta, turn))
    return [[d * x for d, x in zip(*pair)] for pair in zip(decays, sums)]


def combine(p: Program, segments: int, adjoint: bool) -> None:
    """From the ends of segments to the state that enters every segment, ``entry`` (segments, b, n, e).

    A program has one state of a sample, a lane one channel of it. Several segments are read at once, since otherwise
    each would wait for memory.
    """
    refs, state = p.refs, p.segment
    channel = jnp.minimum(p.block * LANES + p.lane, p.width - 1)
    A = pltriton.load(refs["A"].at[channel, state]) * LOG2E

    def spot(name: str, segment: int | Array) -> Any:
        return refs[name].at[segment, p.sample, state, channel]

    def some(first: int | Array, count: int, h: Array) -> Array:
        places = [segments - 1 - first - i if adjoint else first + i for i in range(count)]
        totals = [pltriton.load(refs["total"].at[s, p.sample, channel]) for s in places]
        ends = [pltriton.load(spot("end", s)) for s in places]
        for s, total, end in zip(places, totals, ends):
            pltriton.store(spot("entry", s), h)
            h = p.math.fma(p.math.exp2(total * A), h, end)
        return h

    whole, rest = divmod(segments - 1, AT_ONCE)
    h = pltriton.load(spot("first", 0)) if "first" in refs else p.zeros()
    if whole:
        h = jax.lax.fori_loop(0, whole, lambda i, h: some(i * AT_ONCE, AT_ONCE, h), h)
    h = some(whole * AT_ONCE, rest, h)
    pltriton.store(spot("entry", 0 if adjoint else segments - 1), h)


class Trail(NamedTuple):
    """What the recomputation of one token leaves for its gradients."""

    decays: State
    before: State
    after: State


def backward(p: Program) -> None:
    """Gradients of one segment, from its last chunk to its first.

    The state before a chunk was saved. One walk through the chunk makes all its states, which stay in registers, and
    the decays of the later half; those of the earlier half are made again when its turn comes, with what lanes
    exchange, since registers are full until then.
    G is the gradient of the state: G_t = C_t dy_t + exp(Δ_{t+1} A) G_{t+1}.
    """

    def read(chunk: Chunk) -> tuple[State, Data, Data]:
        earlier, later = chunk.halves()
        names = ("u", "delta", "B")
        return p.saved(chunk.index), earlier.read(names), later.read((*names, "z", "dy", "C"))

    def body(chunk: Chunk, data: tuple[State, Data, Data], carry: Carry, fetch: Fetch) -> tuple[Carry, Any]:
        (saved, first_rows, rows), (earlier, later) = data, chunk.halves()
        more = earlier.read(("z", "dy", "C"))
        early, late = earlier.groups(first_rows), later.groups(rows)

        def second(carry: Carry) -> tuple[Carry, Any]:
            trails = _recomputed(early + late, saved)
            carry, found = _gradients(p, late, trails[len(early) :], carry, sums)
            return carry, (found, [token.after for trail in trails[: len(early)] for token in trail])

        carry, (behind, states) = p.apart(second, carry, chunk.index)
        more = p.awaited(more)
        following, states = fetch(), [saved, *states]

        def first(carry: Carry) -> tuple[Carry, list[Array]]:
            found: list[Array] = []
            for group in reversed(early):
                group = group.afresh(more, carry[0][0][0] * 0.0)
                steps = itertools.pairwise(states[group.first : group.first + len(group.turns) + 1])
                trail = [
                    Trail(p.decays(group.spread(group.delta, turn)), *step)
                    for turn, step in zip(group.turns, steps)
                ]
                carry, some = _group_gradients(p, group, trail, carry, sums)
                found = some + found
            return carry, found

        carry, before = p.apart(first, carry, chunk.index, 2)
        chunk.write_sums(sums, before + behind)
        return carry, following

    sums = WarpSums(p.math, p.lane, p.walk.chunk * len(p.states) // QUAD)
    start = p.state("dlast"), p.nothing(), p.zeros(), p.zeros()
    g, dA, dD, dbias = fold(p, body, start, read, backwards=True)
    if "dfirst" in p.refs:
        p.put_state("dfirst", g)
    p.put_state("sums", dA)
    for row, vector in enumerate((dbias, dD)):
        p.put_vector("sums", vector, len(p.states) * QUAD + row)


def _recomputed(groups: list[Group], h: State) -> list[list[Trail]]:
    """Walks through a chunk from the state h before it."""
    trails = []
    for group in groups:
        trail = []
        for turn in group.turns:
            decays, after = group.step(h, turn)
            trail.append(Trail(decays, h, after))
            h = after
        trails.append(trail)
    return trails


def _gradients(
    p: Program, groups: list[Group], trails: list[list[Trail]], carry: Carry, sums: WarpSums
) -> tuple[Carry, list[Array]]:
    """Writes the gradients of groups; carries (g, dA, dD, dbias), and gives the rows of ``sums``."""
    rows: list[Array] = []
    for group, trail in zip(reversed(groups), reversed(trails)):
        carry, found = _group_gradients(p, group, trail, carry, sums)
        rows = found + rows
    return carry, rows


def _group_gradients(
    p: Program, group: Group, trail: list[Trail], carry: Carry, sums: WarpSums
) -> tuple[Carry, list[Array]]:
    """Writes a group's gradients; carries (g, dA, dD, dbias), and gives the rows of ``sums``."""
    (g, dA, dD, dbias), fma = carry, p.math.fma
    dout, dz_per_y = group.gated()
    rows: list[Array] = []
    ys: list[Vectors] = []
    inputs: list[Vectors] = []
    steps: list[Vectors] = []
    for turn, last in zip(reversed(group.turns), reversed(trail)):
        C = group.shared("C", turn)
        if dz_per_y is not None:
            ys.insert(0, [p.dot(xs, C) for xs in last.after])
        dC = p.over_quads(over_channels(p, last.after, group.spread(dout, turn)))
        g, dA, of_input, of_decay, dB = _state_gradients(p, group, last, dout, turn, g, dA)
        rows = group.chunk.put_sums(sums, group.first + turn, dB, dC) + rows
        inputs.insert(0, of_input)
        steps.insert(0, of_decay)
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
    return (g, dA, dD, dbias), rows


def _state_gradients(
    p: Program, group: Group, trail: Trail, dout: Array, turn: int, g: State, dA: State
) -> tuple[State, State, Vectors, Vectors, Vectors]:
    """One token's part in the gradients of state and A; a lane's parts of Σ G B and Σ A dstate, and dB's sums."""
    B, C, fma = group.shared("B", turn), group.shared("C", turn), p.math.fma
    douts, deltas = group.spread(dout, turn), group.spread(group.delta, turn)
    drives = group.spread(group.drive, turn)
    G = [[fma(x, c, y) for c, y in zip(C, ys)] for x, ys in zip(douts, g)]
    g = [[d * x for d, x in zip(*pair)] for pair in zip(trail.decays, G)]
    dstates = [[x * y for x, y in zip(*pair)] for pair in zip(g, trail.before)]
    dA = [[fma(x, delta, y) for x, y in zip(*pair)] for delta, pair in zip(deltas, zip(dstates, dA))]
    ddecay = [p.dot(*pair) for pair in zip(dstates, p.A)]
    return g, dA, [p.dot(xs, B) for xs in G], ddecay, p.over_quads(over_channels(p, G, drives))
