"""The forward kernel for launches of few warps, where nothing else runs while a warp waits for its own results.

What a chunk needs before its recurrence, Δ and the gate, is made while the chunk before it is walked, and what is done
after it, sums over a quad and their storing, while the next one is. So u, delta and z are read two chunks ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from mambamim_jax.ops.selective_scan.triton_chunks import Chunk, Data, fold, whole_chunks
from mambamim_jax.ops.selective_scan.triton_program import Program, State, Vectors
from mambamim_jax.types import Array

ROWS = ("u", "delta", "dt", "z")


class Ready(NamedTuple):
    """Of a group, what its recurrence and its outputs need; a gate of None is 1."""

    u: Array
    delta: Array
    gate: Array | None


class Carry(NamedTuple):
    """The state, what is ready for the next chunk, and of the one before parts of y and what these need."""

    h: State
    ready: list[Ready]
    parts: list[list[Vectors]]
    last: list[Ready]


def forward(p: Program) -> None:
    """y and the last state, of sequences that are a chunk or longer."""
    first, count = p.segment * p.walk.per_segment, whole_chunks(p)

    def rows(chunk: Chunk) -> Data:
        return chunk.read(ROWS)

    def read(chunk: Chunk) -> tuple[Data, Data]:
        return chunk.read(("B", "C")), rows(chunk.after())

    def body(
        chunk: Chunk, data: tuple[Data, Data], carry: Carry, fetch: Callable[[], Any]
    ) -> tuple[Carry, Any]:
        shared, after = data
        coming = _prepare(chunk.after(), after)
        following = fetch()

        def work(carry: Carry) -> tuple[Carry, None]:
            # the first chunk stores zeros in its own place, and the next one what belongs there
            _finish(Chunk(p, jnp.maximum(chunk.index - 1, first), False), carry.parts, carry.last)
            h, parts = _walk(chunk, shared, carry.ready, carry.h)
            return Carry(h, coming, parts, carry.ready), None

        return p.apart(work, carry, chunk.index)[0], following

    start = Chunk(p, jnp.minimum(first, p.walk.whole - 1), False)
    ready = _prepare(start, rows(start))
    nothing = [[[p.zeros() for _ in p.channels] for _ in range(p.walk.together)] for _ in ready]
    carry = fold(p, body, Carry(p.state("first"), ready, nothing, ready), read, at_once=2)
    end = Chunk(p, first + count - 1, False)
    pl.when(count > 0)(lambda: _finish(end, carry.parts, carry.last))
    p.put_state("last", carry.h)


def _prepare(chunk: Chunk, rows: Data) -> list[Ready]:
    found = []
    for group in chunk.groups(rows):
        gate = None
        if "z" in rows:
            z = group.row("z")
            gate = z * group.math.sigmoid(z)
        found.append(Ready(group.u, group.delta, gate))
    return found


def _walk(chunk: Chunk, shared: Data, ready: list[Ready], h: State) -> tuple[State, list[list[Vectors]]]:
    """The state after a chunk, and each group's parts of y."""
    found = []
    for group in chunk.groups(shared, ready):
        parts = []
        for turn in group.turns:
            h = group.step(h, turn)[1]
            parts.append([group.program.dot(xs, group.shared("C", turn)) for xs in h])
        found.append(parts)
    return h, found


def _finish(chunk: Chunk, parts: list[list[Vectors]], ready: list[Ready]) -> None:
    """Stores y."""
    p = chunk.program
    for group, part, (u, _, gate) in zip(chunk.groups({}, ready), parts, ready):
        y = p.collect(part)
        if p.D is not None:
            y = p.math.fma(p.D, u, y)
        group.write("y", y if gate is None else y * gate)
