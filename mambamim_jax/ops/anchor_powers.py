"""Powers of a matrix applied to the anchors of every segment, each computed once: A**i x_p and A**i x_q.

Tokens between two anchors p < q need i = 0 .. q-p-1. By repeated squaring that costs a product per token
for every bit of i, and the squares of A besides. Here power i of an anchor is A times its power i-1, and serves
both segments that meet there. The anchors of all samples are sorted by the longer of their two gaps: those that need
power i are then the first so many of those that need power i-1, and a step is one product with the front of the
block of rows before. There are as many steps as the longest gap asks for; the backward pass runs them in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mambamim_jax.ops import partition
from mambamim_jax.types import Array

HIGHEST = lax.Precision.HIGHEST
SMALLEST = 4


def anchor_powers(x: Array, A: Array, start: Array, end: Array) -> tuple[Array, Array]:
    """For each token t between its anchors p = start[t] and q = end[t]: A**(q-1-t) x_p and A**(q-1-t) x_q.

    Args:
      x: (b, l, c), float32 or float64.
      A: (c, c), same dtype.
      start, end: int32 (b, l), p <= t < q, or p = t = q where the power is 0.

    Returns:
      two arrays (b, l, c), of x_p and of x_q.
    """
    rows, P = partition.rows(len(x)), PartitionSpec
    if rows is None:
        return _anchor_powers(x, A, start, end)
    # On a mesh every device sorts its own samples; the compiler would sort, and sum, those of all devices on each.
    specs, powers = (P(rows), P(), P(rows), P(rows)), (P(rows), P(rows))
    return jax.shard_map(_anchor_powers, in_specs=specs, out_specs=powers, check_vma=False)(x, A, start, end)


def _anchor_powers(x: Array, A: Array, start: Array, end: Array) -> tuple[Array, Array]:
    alone = (start == end)[..., None]  # both its own anchors
    found = _chains(x.reshape(-1, x.shape[2]), A, _plan(start, end))
    powers = [jnp.where(alone, x, side.reshape(x.shape)) for side in found]
    return powers[0], powers[1]


class _Plan(NamedTuple):
    """Where everything is. Rows are powers of anchors: all of power 0, all of power 1, …; n = b l tokens."""

    anchors: Array  # (n,) tokens, those first whose chains are longest; after the anchors the other tokens
    rank: Array  # (n,) of a token in `anchors`
    first: Array  # (l + 2,) the first row of a power
    last: Array  # the largest power that anybody needs
    start_row: Array  # (n,) the row that a token reads of its segment's start
    end_row: Array  # (n,) and of its end
    left: Array  # (n,) an anchor's distance from the one before, 0 where there is none
    right: Array  # (n,) and to the next one

    @property
    def rows(self) -> int:
        """Most rows that there can be: an anchor has at most as many as its two gaps together."""
        return 2 * len(self.rank)

    @property
    def widest(self) -> int:
        """Most anchors that need power 1: two at most for every token that is none."""
        return len(self.rank) - len(self.rank) // 3


def _plan(start: Array, end: Array) -> _Plan:
    b, length = start.shape
    place = jnp.arange(length, dtype=jnp.int32)
    anchor = start == place
    right = jnp.where(anchor, end - place, 0)
    before = jnp.pad(start, ((0, 0), (1, 0)))[:, :-1]
    left = jnp.where(anchor, place - before, 0)
    chain = jnp.where(anchor, jnp.maximum(jnp.maximum(left, right), 1), 0).reshape(-1)  # powers from 0 on
    order = jnp.argsort(-chain)
    rank = jnp.argsort(order).astype(jnp.int32)
    counts = jnp.searchsorted(-chain[order], -jnp.arange(1, length + 2), side="right")  # of rows of a power
    first = jnp.pad(jnp.cumsum(counts), (1, 0))[: length + 2].astype(jnp.int32)
    begins = first[jnp.maximum(end - 1 - place, 0)]
    sample = (jnp.arange(b, dtype=jnp.int32) * length)[:, None]
    rows = [
        (begins + rank[(side + sample).reshape(-1)].reshape(b, length)).reshape(-1) for side in (start, end)
    ]
    return _Plan(
        order, rank, first, jnp.max(chain) - 1, rows[0], rows[1], left.reshape(-1), right.reshape(-1)
    )


@jax.custom_vjp
def _chains(x: Array, A: Array, plan: _Plan) -> tuple[Array, Array]:
    """Tokens (n, c) to what each reads of its segment's start and end, (n, c) both."""
    return _chains_fwd(x, A, plan)[0]


def _chains_fwd(x: Array, A: Array, plan: _Plan) -> tuple[tuple[Array, Array], tuple[Array, Array, _Plan]]:
    y = _powers(x, A, plan)
    return (y[plan.start_row], y[plan.end_row]), (y, A, plan)


def _powers(x: Array, A: Array, plan: _Plan) -> Array:
    """The rows (rows, c)."""
    first, widest = plan.first, plan.widest
    transposed = lax.optimization_barrier(A.T)  # once, and not at every step

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        i, block, y = state
        block = _front_times(block, transposed, 0, first[i + 1] - first[i])
        return i + 1, block, lax.dynamic_update_slice_in_dim(y, block, first[i], 0)

    x = x[plan.anchors]
    y = jnp.pad(x, ((0, plan.rows + widest - len(x)), (0, 0)))
    return lax.while_loop(lambda state: state[0] <= plan.last, step, (jnp.int32(1), x[:widest], y))[2]


def _chains_bwd(saved: tuple[Array, Array, _Plan], g: tuple[Array, Array]) -> tuple[Array, Array, None]:
    y, A, plan = saved
    first, widest = plan.first, plan.widest
    row = jnp.arange(plan.rows + widest, dtype=jnp.int32)
    power = jnp.searchsorted(first, row, side="right").astype(jnp.int32) - 1
    token = plan.anchors[jnp.clip(row - first[power], 0, len(plan.rank) - 1)]
    valid = row < first[plan.last + 1]
    # a row is read by one token of the segment behind its anchor and by one of that before
    sides = ((g[0], plan.right[token], token + plan.right[token]), (g[1], plan.left[token], token))
    parts = [
        jnp.where((valid & (power < gap))[:, None], side[jnp.maximum(end - 1 - power, 0)], 0)
        for side, gap, end in sides
    ]
    total = parts[0] + parts[1]

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        i, block, total = state
        count = first[i + 1] - first[i]
        more = jnp.where((jnp.arange(widest) < count)[:, None], _front_times(block, A, 0, count), 0)
        block = lax.dynamic_slice_in_dim(total, first[i - 1], widest, 0) + more
        return i - 1, block, lax.dynamic_update_slice_in_dim(total, block, first[i - 1], 0)

    block = lax.dynamic_slice_in_dim(total, first[plan.last], widest, 0)
    total = lax.while_loop(lambda state: state[0] >= 1, step, (plan.last, block, total))[2]
    # rows beyond all powers are there for the steps to write into
    row, power, valid = (part[: plan.rows] for part in (row, power, valid))
    later = valid & (power > 0)
    parent = jnp.where(later, row - first[power] + first[power - 1], 0)
    products = jnp.where(later[:, None], total[: plan.rows], 0)
    grad_A = jnp.einsum("re,rc->ec", products, y[parent], precision=HIGHEST)
    is_anchor = (plan.rank < first[1])[:, None]
    return jnp.where(is_anchor, total[plan.rank], 0), grad_A, None


_chains.defvjp(_chains_fwd, _chains_bwd)


def _front_times(rows: Array, A: Array, axis: int, count: Array) -> Array:
    """rows (n, c) times A, contracted along this axis of A, for at least the first ``count``; the rest is void."""
    sizes = [len(rows)]
    while sizes[-1] > SMALLEST:
        sizes.append(sizes[-1] - max(1, sizes[-1] // 4))

    def product(size: int) -> Callable[[Array], Array]:
        def apply(rows: Array) -> Array:
            y = lax.dot_general(rows[:size], A, (((1,), (axis,)), ((), ())), precision=HIGHEST)
            return jnp.pad(y, ((0, len(rows) - size), (0, 0)))

        return apply

    smallest = sum((count <= size).astype(jnp.int32) for size in sizes) - 1
    return lax.switch(smallest, [product(size) for size in sizes], rows)
