"""Arithmetic of the GPU kernels on vectors with one element a lane.

The Triton backend contracts no products into sums and has slow accurate versions of the elementary
functions, so that a few one-instruction operations are spelt out here, with their equivalents for the
Pallas interpreter.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from mambamim_jax.types import Array

LANES = 32
LOG2E = math.log2(math.e)
LOG1P = (
    0.99999994,
    -0.49999493,
    0.33319098,
    -0.24842979,
    0.19105993,
    -0.13663214,
    0.078225560,
    -0.029504986,
    0.0052326294,
)
"""P of log(1 + w) = w P(w), 0 ≤ w ≤ 1, with the smallest relative error of its degree: 3e-8, in float32 2e-7."""


class Math:
    """Single instructions on vectors (block,), or what the interpreter computes in their place."""

    def __init__(self, interpret: bool):
        self.interpret = interpret

    def _asm(self, code: str, *args: Array, dtype: Any = jnp.float32) -> Array:
        out, *inputs = ("r" if kind == jnp.int32 else "f" for kind in (dtype, *(arg.dtype for arg in args)))
        (found,) = pltriton.elementwise_inline_asm(
            code,
            args=args,
            constraints=",".join([f"={out}", *inputs]),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
        )
        return found

    def exp2(self, x: Array) -> Array:
        """2^x."""
        return jnp.exp2(x) if self.interpret else self._asm("ex2.approx.ftz.f32 $0, $1;", x)

    def reciprocal(self, x: Array) -> Array:
        """1 / x."""
        return 1 / x if self.interpret else self._asm("rcp.approx.ftz.f32 $0, $1;", x)

    def fma(self, x: Array, y: Array, z: Array) -> Array:
        """x y + z."""
        if self.interpret:
            return x * y + z
        return self._asm("fma.rn.f32 $0, $1, $2, $3;", x, y, z)

    def exchange(self, x: Array, bits: int) -> Array:
        """The value of the lane whose number differs in these bits."""
        if bits == 0:
            return x
        if self.interpret:
            return x[jnp.arange(x.shape[0]) ^ bits]
        return self._asm(f"shfl.sync.bfly.b32 $0, $1, {bits}, 0x1f, 0xffffffff;", x)

    def of_team(self, x: Array, lane: Array, team: int) -> Array:
        """The value of a lane, numbered from 0, of the lane's team of 4 or 8."""
        if self.interpret:
            return x[(jnp.arange(x.shape[0]) & -team) + lane]
        return self._asm(f"shfl.sync.idx.b32 $0, $1, $2, {LANES - team << 8 | 0x1F}, 0xffffffff;", x, lane)

    def shared(self, like: Array, size: int) -> Array:
        """The address of ``size`` bytes of the program's shared memory, in every lane of a vector like this one."""
        code = f"{{ .shared .align 16 .b8 kept[{size}]; mov.u32 $0, kept; }}"
        return self._asm(code, like, dtype=jnp.int32)

    def put(self, at: Array, value: Array) -> Array:
        """Stores each lane's value at its address of shared memory; gives 0."""
        return self._asm("st.shared.f32 [$1], $2; mov.u32 $0, 0;", at, value, dtype=jnp.int32)

    def kept(self, at: Array, value: Array) -> Array:
        """Stores each lane's value, and gives it back; the compiler cannot tell that it is the same."""
        return self._asm("st.shared.f32 [$1], $2; mov.f32 $0, $2;", at, value)

    def barrier(self, at: Array) -> Array:
        """Waits for all lanes of the program; gives its argument back."""
        return self._asm("bar.sync 0; mov.u32 $0, $1;", at, dtype=jnp.int32)

    def get(self, at: Array, offset: int) -> Array:
        """Each lane's value at its address of shared memory, and as many bytes further."""
        return self._asm(f"ld.shared.f32 $0, [$1+{offset}];", at)

    def sigmoid(self, x: Array) -> Array:
        """1 / (1 + e^-x)."""
        return self.reciprocal(1.0 + self.exp2(x * -LOG2E))

    def softplus(self, x: Array) -> Array:
        """log(1 + e^x) = max(x, 0) + w P(w), w = e^-|x|: exact for tiny values too, and no reciprocal."""
        w = self.exp2(jnp.abs(x) * -LOG2E)
        *rest, last = LOG1P
        series = jnp.full(x.shape, last, jnp.float32)
        for factor in reversed(rest):
            series = self.fma(series, w, jnp.full(x.shape, factor, jnp.float32))
        return self.fma(w, series, jnp.maximum(x, 0.0))
