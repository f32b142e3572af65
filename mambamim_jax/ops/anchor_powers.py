"""Mixtures of the anchors of every segment, moved by powers of a matrix: A**i ((1 - alpha) x_p + alpha x_q).

A token between two anchors p < q needs i = q-1-t, from q-p-1 down to 0. By repeated squaring that costs a product per
token for every bit of i, and the squares of A besides. Here power i of an anchor is A times its power i-1, and serves
both segments that meet there. The anchors of all samples are sorted by how many powers are needed of them: those that
need power i are then the first so many of those that need power i-1. Rows are powers of anchors, all of power 0, all
of power 1, and so on; a loop makes a tile of consecutive rows at a time as a product with the rows of the power
before. What a tile has too many of is written over by the next one. The backward pass runs in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mambamim_jax.ops import partition
from mambamim_jax.types import Array

HIGHEST = lax.Precision.HIGHEST
TILE, TILES = 32, 4
"""Rows a sample of a tile, and tiles of a step: on a GPU, where the host waits for every step of a loop, 50 µs."""
TILE_CPU, TILES_CPU = 4, 1
LARGEST_CPU = 32
"""Rows of a tile of any batch on a CPU, whose products of few rows are as fast, a row, as larger ones."""
PARTS = 16
"""Sizes that the gradient of A is compiled for: products with rows that nobody needs are its only waste."""


def anchor_powers(x: Array, A: Array, start: Array, end: Array) -> Array:
    """For each token t = p..q-1 between its anchors p = start[t] and q = end[t]: A**(q-1-t) applied to their mixture.

    That is (1 - alpha) x_p + alpha x_q, alpha = (t-p) / (q-p-1), or 0 where q = p+1 (METHOD section 4). The last
    token, p = q = t, gets A x_t.

    Args:
      x: (b, l, c), float32 or float64.
      A: (c, c), same dtype.
      start, end: int32 (b, l).

    Returns:
      (b, l, c)
    """
    rows, P = partition.rows(len(x)), PartitionSpec
    if rows is None:
        return _anchor_powers(x, A, start, end)
    # On a mesh every device sorts its own samples; the compiler would sort, and sum, those of all devices on each.
    specs = (P(rows), P(), P(rows), P(rows))
    return jax.shard_map(_anchor_powers, in_specs=specs, out_specs=P(rows), check_vma=False)(x, A, start, end)


def _anchor_powers(x: Array, A: Array, start: Array, end: Array) -> Array:
    return _mixtures(x.reshape(-1, x.shape[2]), A, _plan(start, end, x.dtype)).reshape(x.shape)


class _Plan(NamedTuple):
    """Where everything is; n = b l tokens."""

    anchors: Array  # (n,) tokens, first those of which most powers are needed; behind the anchors all others
    rank: Array  # (n,) of a token in `anchors`
    first: Array  # (l + 2,) the first row of a power
    end: Array  # the number of rows
    power: Array  # (rows,) of a row
    parent: Array  # (rows,) the row of the power before, 0 where there is none
    start_row: Array  # (n,) the row that a token reads of its segment's start
    end_row: Array  # (n,) and of its end
    alpha: Array  # (n,) the end's weight
    left: Array  # (n,) powers 0 … left-1 of an anchor serve the segment before it
    right: Array  # (n,) and 0 … right-1 that behind it; -1 for the last one, of which the token itself reads power 1
    sample: Array  # (b,) its number; its length is what counts


def _most(n: int) -> int:
    """Rows that n tokens can have: an anchor has at most as many as its two gaps together."""
    return 2 * n


def _part(n: int) -> int:
    """Rows by which the sizes differ that the gradient of A is compiled for."""
    return -(-_most(n) // PARTS)


def _plan(start: Array, end: Array, dtype: jnp.dtype) -> _Plan:
    b, length = start.shape
    place = jnp.arange(length, dtype=jnp.int32)
    final, anchor = place == length - 1, start == place
    right = jnp.where(anchor, end - place, 0)
    before = jnp.pad(start, ((0, 0), (1, 0)))[:, :-1]
    left = jnp.where(anchor, jnp.maximum(place - before - 1, 0), 0)  # where alpha is 0 the end has no part
    needed = jnp.maximum(jnp.maximum(left, right), jnp.where(final, 2, 1))
    needed = jnp.where(anchor, needed, 0).reshape(-1)
    order = jnp.argsort(-needed).astype(jnp.int32)
    rank = jnp.argsort(order).astype(jnp.int32)
    counts = jnp.sum(needed[:, None] > jnp.arange(length + 1), axis=0, dtype=jnp.int32)  # of rows of a power
    first = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    alpha = (place - start).astype(dtype) / jnp.maximum(end - start - 1, 1).astype(dtype)
    sample = jnp.arange(b, dtype=jnp.int32)
    begins = first[jnp.where(final, 1, jnp.maximum(end - 1 - place, 0))]
    start_row, end_row = (begins + rank[side + length * sample[:, None]] for side in (start, end))
    end_row = jnp.where(alpha == 0, start_row, end_row)
    spare = max(TILE * b, _part(b * length))  # for what is read or written too much
    row = jnp.arange(_most(b * length) + spare, dtype=jnp.int32)
    power = jnp.searchsorted(first, row, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    parent = jnp.where((power > 0) & (row < first[-1]), row - first[power] + first[power - 1], 0)
    flat = jnp.ravel
    read = flat(start_row), flat(end_row), flat(alpha)
    right = flat(jnp.where(final, -1, right))
    return _Plan(order, rank, first, first[-1], power, parent, *read, flat(left), right, sample)


@jax.custom_vjp
def _mixtures(x: Array, A: Array, plan: _Plan) -> Array:
    """Tokens (n, c) to what `anchor_powers` says of them, (n, c)."""
    return _mixtures_fwd(x, A, plan)[0]


def _mixtures_fwd(x: Array, A: Array, plan: _Plan) -> tuple[Array, tuple[Array, Array, _Plan]]:
    y = jnp.pad(x[plan.anchors], ((0, len(plan.power) - len(x)), (0, 0)))
    transposed = lax.optimization_barrier(A.T)  # once, and not at every step
    y = _by_tiles(_powers, y, transposed, plan)
    alpha = plan.alpha[:, None]
    return (1 - alpha) * y[plan.start_row] + alpha * y[plan.end_row], (y, A, plan)


def _mixtures_bwd(saved: tuple[Array, Array, _Plan], g: Array) -> tuple[Array, Array, None]:
    y, A, plan = saved
    total = _by_tiles(_gradients, _readers(g, plan), A, plan)
    # of all rows but those of power 0, and of few more than there are
    sizes = [min(_part(len(g)) * number, _most(len(g))) for number in range(1, PARTS + 1)]
    size = sum((plan.end - plan.first[1] > size).astype(jnp.int32) for size in sizes[:-1])
    grad_A = lax.switch(size, [partial(_grad_A, size) for size in sizes], total, y, plan)
    is_anchor = (plan.rank < plan.first[1])[:, None]
    return jnp.where(is_anchor, total[plan.rank], 0), grad_A, None


_mixtures.defvjp(_mixtures_fwd, _mixtures_bwd)


def _readers(g: Array, plan: _Plan) -> Array:
    """For each row the gradient (rows, c) from the two tokens that read it, in the segments behind and before."""
    row, power = jnp.arange(len(plan.power)), plan.power
    token = plan.anchors[jnp.clip(row - plan.first[power], 0, len(plan.rank) - 1)]
    right, left, valid = plan.right[token], plan.left[token], row < plan.end
    final = right < 0
    behind = jnp.where(final, token, token + right - 1 - power)
    before = jnp.maximum(token - 1 - power, 0)
    reads = valid & jnp.where(final, power == 1, power < right)
    weights = (
        jnp.where(reads, 1 - plan.alpha[behind], 0),
        jnp.where(valid & (power < left), plan.alpha[before], 0),
    )
    return weights[0][:, None] * g[behind] + weights[1][:, None] * g[before]


def _by_tiles(run: Callable[..., Array], rows: Array, A: Array, plan: _Plan) -> Array:
    b = len(plan.sample)
    on_cpu = partial(run, min(TILE_CPU * b, LARGEST_CPU), TILES_CPU)
    return lax.platform_dependent(rows, A, plan, cpu=on_cpu, default=partial(run, TILE * b, TILES))


def _powers(tile: int, tiles: int, y: Array, transposed: Array, plan: _Plan) -> Array:
    """Rows y with those of power 0 in place to all rows; the last step may write behind them."""
    following = jnp.minimum(jnp.arange(len(y), dtype=jnp.int32) + tile, plan.first[plan.power + 1])

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        row, y = state
        for _ in range(tiles):
            parents = lax.dynamic_slice_in_dim(y, plan.parent[row], tile, 0)
            y = lax.dynamic_update_slice_in_dim(y, _times(parents, transposed), row, 0)
            row = following[row]
        return row, y

    return lax.while_loop(lambda state: state[0] < plan.end, step, (plan.first[1], y))[1]


def _gradients(tile: int, tiles: int, total: Array, A: Array, plan: _Plan) -> Array:
    """Gradients of rows from what reads them to those from the rows of the next power too.

    What the last step does too much stays at power 0, and adds nothing.
    """
    first, row = plan.first, jnp.arange(len(total), dtype=jnp.int32)
    number = jnp.arange(tile, dtype=jnp.int32)[:, None]
    begin, stop, before = first[plan.power], first[plan.power + 1], first[jnp.maximum(plan.power - 1, 0)]
    previous = jnp.where(row > begin, row - tile, before + (begin - 1 - before) // tile * tile)
    previous = jnp.maximum(previous, 0)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        row, total = state
        for _ in range(tiles):
            more = _times(lax.dynamic_slice_in_dim(total, row, tile, 0), A)
            valid = (number < stop[row] - row) & (row >= first[1])
            place = plan.parent[row]
            parents = lax.dynamic_slice_in_dim(total, place, tile, 0) + jnp.where(valid, more, 0)
            total = lax.dynamic_update_slice_in_dim(total, parents, place, 0)
            row = previous[row]
        return row, total

    last = begin[plan.end - 1]
    last = last + (plan.end - 1 - last) // tile * tile
    return lax.while_loop(lambda state: state[0] >= first[1], step, (last, total))[1]


def _grad_A(size: int, total: Array, y: Array, plan: _Plan) -> Array:
    """(c, c), of ``size`` rows from power 1 on; those beyond the last one are none."""
    begin = plan.first[1]
    valid = (begin + jnp.arange(size) < plan.end)[:, None]
    products = jnp.where(valid, lax.dynamic_slice_in_dim(total, begin, size, 0), 0)
    parents = y[lax.dynamic_slice_in_dim(plan.parent, begin, size, 0)]
    return jnp.einsum("re,rc->ec", products, parents, precision=HIGHEST)


def _times(rows: Array, A: Array) -> Array:
    return jnp.matmul(rows, A, precision=HIGHEST)
