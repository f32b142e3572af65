"""The sums that the backward kernel leaves to do, of all programs' dB and dC and of all samples' dA, in one launch.

XLA would make four launches of them, which at small sizes take longer than the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from mambamim_jax.ops.selective_scan.triton_math import LANES
from mambamim_jax.ops.selective_scan.triton_program import SET
from mambamim_jax.types import Array

THREADS = 128
FOUR = 4
"""Values that a thread reads in one go."""
AT_ONCE = 8
"""Terms of a sum that are read before they are added."""


class Totals(NamedTuple):
    """Gradients in float32; A's (e, n), B's and C's (b, l, n), the others (e,)."""

    A: Array
    B: Array
    C: Array
    D: Array
    delta_bias: Array


def totals(dBC: Array, sums: Array, shape: tuple[int, int, int], shift: int, interpret: bool) -> Totals:
    """Sums what the backward kernel has stored.

    Args:
      dBC: (b, l sets programs 32), or flat; of each token, set of 16 states and program 16 values of dB and of dC, one
        after the other or by fours.
      sums: (segments, b, n + 2, e), the rows of dA and one each of the gradients of delta_bias and D.
      shape: b, l, n.
      shift: 1 for those by fours (`Walk.shift`).
    """
    (b, length, n), e = shape, sums.shape[3]
    rows, terms = length * (n // SET), sums.reshape(-1, n + 2, e)
    part = _Part(b, rows, dBC.size // (b * rows * LANES), shift)
    columns = -(-e // THREADS)

    def kernel(dBC: Any, terms: Any, dA: Any, dB: Any, dC: Any, dD: Any, dbias: Any) -> None:
        number, first = pl.program_id(0), part.blocks * b
        pl.when(number < first)(lambda: _tokens(part, number, dBC, dB, dC))
        pl.when(number >= first)(lambda: _channels(number - first, columns, terms, dA, dD, dbias))

    def out(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    call = pl.pallas_call(
        kernel,
        out_shape=(out(e, n), out(b * rows * SET), out(b * rows * SET), out(e), out(e)),
        grid=(part.blocks * b + columns * (n + 2),),
        interpret=interpret,
        name="selective_scan_totals",
        compiler_params=pltriton.CompilerParams(num_warps=THREADS // LANES, num_stages=1),
    )
    dA, dB, dC, dD, dbias = call(dBC, terms)
    return Totals(dA, dB.reshape(b, length, n), dC.reshape(b, length, n), dD, dbias)


class _Part(NamedTuple):
    """What is summed of the tokens: rows of 32 values a sample, for each a term of every program."""

    samples: int
    rows: int
    programs: int
    shift: int

    @property
    def blocks(self) -> int:
        """Programs of this kernel for a sample."""
        return -(-self.rows * LANES // (THREADS * FOUR))


def _tokens(part: _Part, number: Array, dBC: Any, dB: Any, dC: Any) -> None:
    """Some rows of dB and dC, summed over the backward kernel's programs; four values a thread."""
    lane, thread, flat = jnp.arange(THREADS, dtype=jnp.int32), LANES // FOUR, len(dBC.shape) == 1
    sample, row = number // part.blocks, number % part.blocks * (THREADS // thread) + lane // thread
    inside = jnp.broadcast_to((row < part.rows)[:, None], (THREADS, FOUR))
    four = (lane % thread * FOUR)[:, None] + jnp.arange(FOUR, dtype=jnp.int32)[None]
    first = (row * (part.programs * LANES))[:, None] + four
    if flat:
        first = sample * (part.rows * part.programs * LANES) + first

    def read(i: int | Array) -> Array:
        at = first + i * LANES
        return pltriton.load(dBC.at[at] if flat else dBC.at[sample, at], mask=inside, other=0.0)

    total = _sum(read, part.programs, jnp.zeros((THREADS, FOUR), jnp.float32))
    state, of_C = four % SET, four >= SET
    if part.shift:
        state, of_C = four // (2 * FOUR) * FOUR + four % FOUR, four // FOUR % 2 == 1
    at = ((sample * part.rows + row) * SET)[:, None] + state
    for ref, own in ((dB, inside & ~of_C), (dC, inside & of_C)):
        past = (
            part.samples * part.rows * SET + lane[:, None] * FOUR + four % FOUR
        )  # no two values at one place
        pltriton.store(ref.at[jnp.where(own, at, past)], total, mask=own)


def _channels(number: Array, columns: int, terms: Any, dA: Any, dD: Any, dbias: Any) -> None:
    """Some channels of a row of dA, or of what follows its rows, summed over segments and samples."""
    count, rows, e = terms.shape
    row, n = number // columns, rows - 2
    column = number % columns * THREADS + jnp.arange(THREADS, dtype=jnp.int32)
    inside = column < e

    def read(i: int | Array) -> Array:
        return pltriton.load(terms.at[i, row, column], mask=inside, other=0.0)

    total = _sum(read, count, jnp.zeros(THREADS, jnp.float32))
    pltriton.store(dA.at[column, jnp.minimum(row, n - 1)], total, mask=inside & (row < n))
    pltriton.store(dbias.at[column], total, mask=inside & (row == n))
    pltriton.store(dD.at[column], total, mask=inside & (row == n + 1))


def _sum(read: Callable[[int | Array], Array], count: int, zero: Array) -> Array:
    """The sum of ``count`` terms."""

    def some(first: int | Array, count: int, total: Array) -> Array:
        terms = [read(first + i) for i in range(count)]
        while len(terms) > 1:
            terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
        return total + terms[0] if terms else total

    whole, rest = divmod(count, AT_ONCE)
    total = jax.lax.fori_loop(0, whole, lambda i, t: some(i * AT_ONCE, AT_ONCE, t), zero) if whole else zero
    return some(whole * AT_ONCE, rest, total)
