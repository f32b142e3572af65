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
    rows, programs = length * (n // SET), dBC.size // (b * length * (n // SET) * LANES)
    flat = dBC.ndim == 1
    blocks = -(-rows // (THREADS // (LANES // FOUR)))
    columns = -(-e // THREADS)
    terms = sums.reshape(-1, n + 2, e)
    thread = LANES // FOUR

    def kernel(dBC: Any, terms: Any, dA: Any, dB: Any, dC: Any, dD: Any, dbias: Any) -> None:
        number = pl.program_id(0)
        lane = jnp.arange(THREADS, dtype=jnp.int32)

        def tokens() -> None:
            sample, row = number // blocks, number % blocks * (THREADS // thread) + lane // thread
            inside = jnp.broadcast_to((row < rows)[:, None], (THREADS, FOUR))
            four = (lane % thread * FOUR)[:, None] + jnp.arange(FOUR, dtype=jnp.int32)[None]
            first = (row * (programs * LANES))[:, None] + four
            if flat:
                first = sample * (rows * programs * LANES) + first

            def read(i: int | Array) -> Array:
                at = first + i * LANES
                return pltriton.load(dBC.at[at] if flat else dBC.at[sample, at], mask=inside, other=0.0)

            total = _sum(read, programs, jnp.zeros((THREADS, FOUR), jnp.float32))
            state, of_C = four % SET, four >= SET
            if shift:
                state, of_C = four // (2 * FOUR) * FOUR + four % FOUR, four // FOUR % 2 == 1
            at = ((sample * rows + row) * SET)[:, None] + state
            for ref, own in ((dB, inside & ~of_C), (dC, inside & of_C)):
                past = b * rows * SET + lane[:, None] * FOUR + four % FOUR  # no two values at one place
                pltriton.store(ref.at[jnp.where(own, at, past)], total, mask=own)

        def channels() -> None:
            row, column = (number - blocks * b) // columns, (number - blocks * b) % columns * THREADS + lane
            inside = column < e

            def read(i: int | Array) -> Array:
                return pltriton.load(terms.at[i, row, column], mask=inside, other=0.0)

            total = _sum(read, terms.shape[0], jnp.zeros(THREADS, jnp.float32))
            pltriton.store(dA.at[column, jnp.minimum(row, n - 1)], total, mask=inside & (row < n))
            pltriton.store(dbias.at[column], total, mask=inside & (row == n))
            pltriton.store(dD.at[column], total, mask=inside & (row == n + 1))

        pl.when(number < blocks * b)(tokens)
        pl.when(number >= blocks * b)(channels)

    def out(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    call = pl.pallas_call(
        kernel,
        out_shape=(out(e, n), out(b * rows * SET), out(b * rows * SET), out(e), out(e)),
        grid=(blocks * b + columns * (n + 2),),
        interpret=interpret,
        name="selective_scan_totals",
        compiler_params=pltriton.CompilerParams(num_warps=THREADS // LANES, num_stages=1),
    )
    dA, dB, dC, dD, dbias = call(dBC, terms)
    return Totals(dA, dB.reshape(b, length, n), dC.reshape(b, length, n), dD, dbias)


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
