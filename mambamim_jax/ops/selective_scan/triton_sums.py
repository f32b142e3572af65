"""Sums of vectors over the warps of a program, through shared memory.

The Triton backend gives a kernel no shared memory of its own, a few lines of PTX do. To the compiler these are
instructions without side effects, so that their order is spelt out as data: a store gives a 0 that goes into the
barrier's argument, and what the barrier gives back is the address to load from. The interpreter keeps the vectors.
"""

from __future__ import annotations

import jax.numpy as jnp

from mambamim_jax.ops.selective_scan.triton_math import LANES, Math
from mambamim_jax.types import Array


class WarpSums:
    """Rows of a vector (block,) each, in two halves that are filled in turn: one barrier a turn is then enough."""

    def __init__(self, math: Math, lane: Array, rows: int):
        self.math, self.lane, self.rows = math, lane, rows
        self.warps = lane.shape[0] // LANES
        self.row_bytes = 4 * lane.shape[0]
        self.half_bytes = rows * self.row_bytes
        if not math.interpret:
            self.start = math.shared(lane, 2 * self.half_bytes)

    def put(self, turn: Array, row: int, value: Array) -> Array:
        """Stores a row in the half of this turn; gives what `totals` needs to know of it."""
        if self.math.interpret:
            return value
        half = self.start + turn % 2 * self.half_bytes
        return self.math.put(half + (row * self.row_bytes + self.lane * 4), value)

    def totals(self, turn: Array, rows: list[Array]) -> list[tuple[Array, Array]]:
        """Sums of this turn's ``rows``, all that `put` gave, in order: for each warp's share of them (row, sum).

        Where rows run out, the last one's sum comes again under a number past it.
        """
        lane, shares = self.lane % LANES, range(0, self.rows, self.warps)
        numbers = [self.lane // LANES + first for first in shares]
        inside = [jnp.minimum(number, self.rows - 1) for number in numbers]
        if self.math.interpret:
            sums = jnp.sum(jnp.stack(rows).reshape(self.rows, self.warps, LANES), axis=1)
            return [(number, sums[row, lane]) for number, row in zip(numbers, inside)]
        at = self.math.barrier(self.start + turn % 2 * self.half_bytes + sum(rows)) + lane * 4
        found = []
        for number, row in zip(numbers, inside):
            parts = [self.math.get(at + row * self.row_bytes, 4 * LANES * warp) for warp in range(self.warps)]
            found.append((number, sum(parts[1:], parts[0])))
        return found
