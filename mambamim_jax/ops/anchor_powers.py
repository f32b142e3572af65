"""Mixtures of the anchors of every segment, moved by powers of a matrix: A**i ((1 - alpha) x_p + alpha x_q).

A token between two anchors p < q needs i = q-1-t, from q-p-1 down to 0. By repeated squaring that costs a product per
token for every bit of i, and the squares of A besides. Here power i of an anchor is A times its power i-1, and serves
both segments that meet there: a chain of products for every anchor, as long as its longer segment needs.

A step of a loop multiplies one row of each of several chains. Which, says a table of steps and slots, filled by the
wrap-around rule of McNaughton (Scheduling with deadlines and loss functions, Management Science 6, 1959): chains lie
end to end, slot after slot, and one that does not fit into what is left of a slot starts at the first step of the next
slot and ends in the last steps of its own. As no chain is longer than a slot, it never waits for itself, and all slots
are full but the last. What a row comes from is then always in reach without a search: what the same slot made in the
step before, its token, or what the next slot has held for it. The backward pass runs the steps in reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mambamim_jax.ops import partition
from mambamim_jax.types import Array

HIGHEST = lax.Precision.HIGHEST
STEPS = 20
"""Of n tokens at most n / 20 slots: with more of them most would lie empty while the longest chain is made."""
SLOTS_CPU = 16
"""And on a CPU so many, which make products that are as fast, a row, as larger ones."""
UNROLLED, UNROLLED_CPU = 8, 1
"""Steps at a time: on a GPU the host waits for every turn of a loop, 50 µs."""
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
    # On a mesh every device orders its own samples; the compiler would sum those of all devices on each.
    specs = (P(rows), P(), P(rows), P(rows))
    return jax.shard_map(_anchor_powers, in_specs=specs, out_specs=P(rows), check_vma=False)(x, A, start, end)


def _anchor_powers(x: Array, A: Array, start: Array, end: Array) -> Array:
    place = jnp.arange(x.shape[1], dtype=jnp.int32)
    weights = (place - start).astype(x.dtype) / jnp.maximum(end - start - 1, 1).astype(x.dtype)
    on_cpu, elsewhere = partial(_plan, SLOTS_CPU), partial(_plan, None)
    plan = lax.platform_dependent(start, end, weights, cpu=on_cpu, default=elsewhere)
    return _mixtures(x.reshape(-1, x.shape[2]), A, plan).reshape(x.shape)


SAME, TOKEN, HELD, NONE = range(4)
"""Where the power before a row is, or the one after: in its own slot, a token, in the next slot or the one before."""


class _Table(NamedTuple):
    """Chains of n tokens in steps and slots; its rows are numbered step by step."""

    chain: Array  # (n,) powers of a token from 1 on
    begin: Array  # (n,) where they start, if all lie end to end
    ahead: Array  # (n,) of a chain that does not fit into its slot, the powers in the next one, which are its first
    steps: Array  # how many
    slots: Array  # how many
    full: Array  # steps in which the last slot is in use
    rows: Array  # how many are in use

    def first_row(self, step: Array) -> Array:
        """The first row of a step: as many to a step as slots in use."""
        return step * self.slots - jnp.maximum(step - self.full, 0)

    def row(self, token: Array, power: Array) -> Array:
        """Where a power of a token is."""
        number = power - 1 - self.ahead[token]
        cell = self.begin[token] + jnp.where(number < 0, number + self.chain[token], number)
        return self.first_row(cell % self.steps) + cell // self.steps


class _Rows(NamedTuple):
    """What the r rows of a table are."""

    token: Array  # (r,) 0 of rows not in use
    power: Array  # (r,) from 1 on, -1 of rows not in use
    parent: Array  # (r,) the row of the power before, 0 where that is the token
    source: Array  # (r,) where that is: SAME, TOKEN, HELD
    target: Array  # (r,) where the power after is: SAME, HELD, NONE


class _Plan(NamedTuple):
    """Where everything is, of n = b l tokens."""

    table: _Table
    rows: _Rows
    start: Array  # (n,) of a token, the anchor that its segment starts with
    end: Array  # (n,) and the one it ends with, or again the start where that has no part
    alpha: Array  # (n,) the end's weight
    power: Array  # (n,) of the anchors, that it reads
    left: Array  # (n,) powers 0 … left-1 of an anchor serve the segment before it
    right: Array  # (n,) and 0 … right-1 that behind it; -1 for the last one, of which the token itself reads power 1


def _most(n: int) -> int:
    """Rows that n tokens can need: a chain is at most as long as its two gaps together."""
    return 2 * n


def _slots(n: int, most: int | None) -> int:
    """Slots of a table, at most."""
    slots = -(-n // STEPS)
    return slots if most is None else min(slots, most)


def _plan(most: int | None, start: Array, end: Array, alpha: Array) -> _Plan:
    """The plan, with so many slots at most, for anchors (b, l) and the weights (b, l) of the ends."""
    (b, length), flat = start.shape, jnp.ravel
    place = jnp.arange(length, dtype=jnp.int32)
    final, anchor = place == length - 1, start == place
    right = jnp.where(anchor, end - place, 0)
    past = jnp.pad(start, ((0, 0), (1, 0)))[:, :-1]
    left = jnp.where(anchor, jnp.maximum(place - past - 1, 0), 0)  # where alpha is 0 the end has no part
    chain = jnp.where(anchor, jnp.maximum(jnp.maximum(left, right) - 1, final), 0)
    table = _table(flat(chain), most)
    sample = jnp.arange(b, dtype=jnp.int32)[:, None] * length
    return _Plan(
        table,
        _rows(table),
        start=flat(sample + start),
        end=flat(sample + jnp.where(alpha == 0, start, end)),
        alpha=flat(alpha),
        power=flat(jnp.where(final, 1, jnp.maximum(end - 1 - place, 0))),
        left=flat(left),
        right=flat(jnp.where(final, -1, right)),
    )


def _table(chain: Array, most: int | None) -> _Table:
    stop = jnp.cumsum(chain, dtype=jnp.int32)
    begin, rows = stop - chain, stop[-1]
    steps = jnp.maximum(jnp.maximum(jnp.max(chain), -(-rows // _slots(len(chain), most))), 1)
    slots = -(-rows // steps)
    ahead = jnp.maximum(stop - (begin // steps + 1) * steps, 0)
    return _Table(chain, begin, ahead, steps, slots, rows - (slots - 1) * steps, rows)


def _rows(table: _Table) -> _Rows:
    n = len(table.chain)
    # with some to spare: the last step, and those that a loop takes too much, may write behind the rows in use
    row = jnp.arange(_most(n) + _slots(n, None), dtype=jnp.int32)
    late, narrow = row - table.full * table.slots, jnp.maximum(table.slots - 1, 1)
    step = jnp.where(late < 0, row // table.slots, table.full + late // narrow)
    cell = jnp.where(late < 0, row % table.slots, late % narrow) * table.steps + step
    used, stop = row < table.rows, table.begin + table.chain
    token = jnp.searchsorted(stop, cell, side="right", method="scan_unrolled").astype(jnp.int32)
    token = jnp.where(used, jnp.minimum(token, n - 1), 0)
    chain, ahead = table.chain[token], table.ahead[token]
    power = cell - table.begin[token] + ahead
    power = jnp.where(used, jnp.where(power < chain, power, power - chain) + 1, -1)
    split = used & (ahead > 0)
    source = jnp.where(power <= 1, TOKEN, jnp.where(split & (power == ahead + 1), HELD, SAME))
    target = jnp.where(~used | (power == chain), NONE, jnp.where(split & (power == ahead), HELD, SAME))
    parent = jnp.where(source == TOKEN, 0, table.row(token, power - 1))
    return _Rows(token, power, parent, source.astype(jnp.int32), target.astype(jnp.int32))


@jax.custom_vjp
def _mixtures(x: Array, A: Array, plan: _Plan) -> Array:
    """Tokens (n, c) to what `anchor_powers` says of them, (n, c)."""
    return _mixtures_fwd(x, A, plan)[0]


def _mixtures_fwd(x: Array, A: Array, plan: _Plan) -> tuple[Array, tuple[Array, Array, Array, _Plan]]:
    transposed = lax.optimization_barrier(A.T)  # once, and not at every step
    y = _steps(_powers, x[plan.rows.token], transposed, plan)
    alpha, itself = plan.alpha[:, None], plan.power[:, None] == 0
    start, end = (
        jnp.where(itself, x[side], y[plan.table.row(side, plan.power)]) for side in (plan.start, plan.end)
    )
    return (1 - alpha) * start + alpha * end, (x, y, A, plan)


def _mixtures_bwd(saved: tuple[Array, Array, Array, _Plan], g: Array) -> tuple[Array, Array, None]:
    x, y, A, plan = saved
    n = len(g)
    total, moved = _steps(_gradients, _readers(g, plan.rows.token, plan.rows.power, plan), A, plan)
    part = -(-_most(n) // PARTS)
    sizes = [min(part * number, _most(n)) for number in range(1, PARTS + 1)]
    size = sum((plan.table.rows > size).astype(jnp.int32) for size in sizes[:-1])
    grad_A = lax.switch(size, [partial(_grad_A, size) for size in sizes], total, x, y, plan)
    tokens = jnp.arange(n, dtype=jnp.int32)
    grad_x = _readers(g, tokens, jnp.zeros_like(tokens), plan)
    first = plan.table.row(tokens, jnp.ones_like(tokens))
    return grad_x + jnp.where((plan.table.chain > 0)[:, None], moved[first], 0), grad_A, None


_mixtures.defvjp(_mixtures_fwd, _mixtures_bwd)


def _readers(g: Array, token: Array, power: Array, plan: _Plan) -> Array:
    """Gradients of powers of tokens from the two tokens that read each, in the segments behind and before."""
    right, left = plan.right[token], plan.left[token]
    final = right < 0
    behind = jnp.where(final, token, jnp.maximum(token + right - 1 - power, 0))
    before = jnp.maximum(token - 1 - power, 0)
    reads = (power >= 0) & jnp.where(final, power == 1, power < right)
    weights = (
        jnp.where(reads, 1 - plan.alpha[behind], 0),
        jnp.where((power >= 0) & (power < left), plan.alpha[before], 0),
    )
    return weights[0][:, None] * g[behind] + weights[1][:, None] * g[before]


def _steps(run: Callable[..., Any], rows: Array, A: Array, plan: _Plan) -> Any:
    n = len(plan.alpha)
    on_cpu = partial(run, _slots(n, SLOTS_CPU), UNROLLED_CPU)
    return lax.platform_dependent(rows, A, plan, cpu=on_cpu, default=partial(run, _slots(n, None), UNROLLED))


def _own(step: Array, width: int, table: _Table) -> Array:
    """(width, 1): a row is one of the step's, and not already of the next one."""
    count = jnp.where(step < 0, 0, table.slots - (step >= table.full))
    return (jnp.arange(width, dtype=jnp.int32) < count)[:, None]


def _choose(where: Array, same: Array, held: Array, other: Array | float) -> Array:
    where = where[:, None]
    return jnp.where(where == SAME, same, jnp.where(where == HELD, held, other))


def _powers(width: int, unrolled: int, y: Array, transposed: Array, plan: _Plan) -> Array:
    """Rows y, each its token, to the powers."""
    empty = jnp.zeros((width + 1, y.shape[1]), y.dtype)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        number, y, last, held = state
        for _ in range(unrolled):
            row = plan.table.first_row(number)
            part = partial(lax.dynamic_slice_in_dim, start_index=row, slice_size=width)
            own, given = _own(number, width, plan.table), part(y)
            last = _times(_choose(part(plan.rows.source), last, held[1:], given), transposed)
            y = lax.dynamic_update_slice_in_dim(y, jnp.where(own, last, given), row, 0)
            hold = jnp.where(own & (part(plan.rows.target) == HELD)[:, None], last, held[:-1])
            held = lax.dynamic_update_slice_in_dim(held, hold, 0, 0)
            number = number + 1
        return number, y, last, held

    start: tuple[Any, ...] = jnp.int32(0), y, empty[1:], empty
    return lax.while_loop(lambda state: state[0] < plan.table.steps, step, start)[1]


def _gradients(width: int, unrolled: int, total: Array, A: Array, plan: _Plan) -> tuple[Array, Array]:
    """Gradients of rows from what reads them to those from the power after too, and these times A."""
    empty = jnp.zeros((width + 1, total.shape[1]), total.dtype)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        number, total, moved, last, held = state
        for _ in range(unrolled):
            row = plan.table.first_row(jnp.maximum(number, 0))
            part = partial(lax.dynamic_slice_in_dim, start_index=row, slice_size=width)
            own = _own(number, width, plan.table)
            rows = part(total) + jnp.where(own, _choose(part(plan.rows.target), last, held[:-1], 0.0), 0.0)
            total = lax.dynamic_update_slice_in_dim(total, rows, row, 0)
            last = _times(rows, A)
            moved = lax.dynamic_update_slice_in_dim(moved, last, row, 0)
            hold = jnp.where(own & (part(plan.rows.source) == HELD)[:, None], last, held[1:])
            held = lax.dynamic_update_slice_in_dim(held, hold, 1, 0)
            number = number - 1
        return number, total, moved, last, held

    start: tuple[Any, ...] = plan.table.steps - 1, total, jnp.zeros_like(total), empty[1:], empty
    return lax.while_loop(lambda state: state[0] >= 0, step, start)[1:3]


def _grad_A(size: int, total: Array, x: Array, y: Array, plan: _Plan) -> Array:
    """(c, c), of the first ``size`` rows; those not in use have no gradient."""
    rows = jax.tree.map(lambda x: x[:size], plan.rows)
    parents = jnp.where((rows.source == TOKEN)[:, None], x[rows.token], y[rows.parent])
    return jnp.einsum("re,rc->ec", total[:size], parents, precision=HIGHEST)


def _times(rows: Array, A: Array) -> Array:
    return jnp.matmul(rows, A, precision=HIGHEST)
