"""Transposed convolution of kernel 2 and stride 2."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mambamim_jax.ops.upsample_conv import upsample2
from mambamim_jax.types import Array


class Upsample2(nnx.Module):
    """Transposed convolution 2x2x2, stride 2, in to out channels: a matrix product, as windows don't overlap."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        # Kaiming normal over PyTorch's "fan out" of a transposed convolution, which counts its inputs.
        std = math.sqrt(2.0 / (8 * inputs))
        self.kernel = nnx.Param(
            std * jax.random.normal(rngs.params(), (2, 2, 2, inputs, outputs), jnp.float32)
        )
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        """(..., h, w, d, in) to (..., 2h, 2w, 2d, out)."""
        y = upsample2(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
