"""Powers of a matrix applied to the anchors of every segment, each computed once: A**i x_p and A**i x_q.

Tokens between two anchors p < q need i = 0 .. q-p-1. By repeated squaring that costs a product per token
for every bit of i, and the squares of A besides. Here power i of an anchor is A times its power i-1: one
product per token. All tokens of all samples are sorted by power and, within a power, longest segment first:
power i is then a block of rows, its predecessors are the front of the block before, and a step is a slice,
a product and a slice. There are as many steps as the longest gap asks for, each as large as the segments
that get so far; the backward runs the same steps in reverse.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mambamim_jax.ops import partition
from mambamim_jax.types import Array

HIGHEST = lax.Precision.HIGHEST
SMALLEST = 16


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
    b, length, c = x.shape
    power = jnp.maximum(end - 1 - jnp.arange(length, dtype=jnp.int32), 0).reshape(-1)
    order = jnp.lexsort((-(end - start).reshape(-1), power))
    first = jnp.searchsorted(power[order], jnp.arange(length + 1)).astype(jnp.int32)
    rows, sample = x.reshape(b * length, c), (jnp.arange(b) * length)[:, None]
    anchors = [rows[(anchor + sample).reshape(-1)[order]] for anchor in (start, end)]
    powers = _powers(jnp.stack(anchors, axis=1), A, first, jnp.max(power))
    powers = powers[jnp.argsort(order)].reshape(b, length, 2, c)
    return powers[:, :, 0], powers[:, :, 1]


@jax.custom_vjp
def _powers(rows: Array, A: Array, first: Array, last: Array) -> Array:
    """Rows (n, 2, c), of which only those of power 0 are read, to rows of every power.

    Power i has the rows first[i] .. first[i+1]-1; the largest is ``last``.
    """
    half = max(1, len(rows) // 2)  # power 1 and above: segments of at least two tokens

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        i, y = state
        new = _front_times(_slice(y, first[i - 1], half), A.T, first[i + 1] - first[i])
        return i + 1, lax.dynamic_update_slice_in_dim(y, new, first[i], 0)

    start = jnp.int32(1), jnp.pad(rows, ((0, half), (0, 0), (0, 0)))
    return lax.while_loop(lambda state: state[0] <= last, body, start)[1][: len(rows)]


def _powers_fwd(rows: Array, A: Array, first: Array, last: Array) -> tuple[Array, tuple[Array, ...]]:
    y = _powers(rows, A, first, last)
    return y, (y, A, first, last)


def _powers_bwd(saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, None, None]:
    y, A, first, last = saved
    n, half = len(y), max(1, len(y) // 2)

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        i, g = state
        count = first[i + 1] - first[i]
        before = _slice(g, first[i - 1], half)
        more = _front_times(_slice(g, first[i], half), A, count)
        sent = jnp.where((jnp.arange(half) < count)[:, None, None], before + more, before)
        return i - 1, lax.dynamic_update_slice_in_dim(g, sent, first[i - 1], 0)

    start = last, jnp.pad(g, ((0, half), (0, 0), (0, 0)))
    g = lax.while_loop(lambda state: state[0] >= 1, body, start)[1][:n]
    place = jnp.arange(n)
    anchor = place < first[1]
    power = jnp.searchsorted(first, place, side="right") - 1
    parent = jnp.where(anchor, place, place - first[power] + first[power - 1])
    products = jnp.where(anchor[:, None, None], 0, g)
    grad_A = jnp.einsum("nae,nac->ec", products, y[parent], precision=HIGHEST)
    # Only one row of power 0 reads an anchor from each side: transposed, the gathers add one number to zeros.
    return jnp.where(anchor[:, None, None], g, 0), grad_A, None, None


_powers.defvjp(_powers_fwd, _powers_bwd)


def _slice(rows: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(rows, start, size, 0)


def _front_times(rows: Array, matrix: Array, count: Array) -> Array:
    """rows @ matrix for at least the first ``count`` rows, at a cost in proportion; the rest is void."""
    n, a, c = rows.shape
    sizes = [n]
    while sizes[-1] > SMALLEST:
        sizes.append(sizes[-1] - max(1, sizes[-1] // 4))

    def product(size: int) -> Callable[[Array], Array]:
        def apply(rows: Array) -> Array:
            y = jnp.matmul(rows[:size].reshape(size * a, c), matrix, precision=HIGHEST)
            return jnp.pad(y.reshape(size, a, c), ((0, n - size), (0, 0), (0, 0)))

        return apply

    smallest = sum((count <= size).astype(jnp.int32) for size in sizes) - 1
    return lax.switch(smallest, [product(size) for size in sizes], rows)
