"""The reconstruction decoder: batch-normalised convolutions from a densified pyramid up to full resolution."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mambamim_jax.model.mask import Mask
from mambamim_jax.model.masked_layers import Conv3
from mambamim_jax.model.packed import masked_conv3
from mambamim_jax.model.upsample import Upsample2
from mambamim_jax.ops.batch_norm import batch_norm_relu
from mambamim_jax.ops.upsample_conv import upsample_conv3
from mambamim_jax.types import Array

_REACH = 5.5
"""Deviations that a float32 normal stays within, and beyond which the share of it that is left out rounds to 0."""


def truncated_normal(key: Array, shape: tuple[int, ...], std: float, bound: float) -> Array:
    """Normal of deviation std cut at ±bound (in the same unit), not rescaled, as timm's `trunc_normal_`; float32.

    JAX cuts by drawing the normal's distribution function between its values at the bounds. Far out these are exactly
    0 and 1, whose inverse is infinite, so that one value in 2²³ would be the bound itself: there nothing is cut.
    """
    if bound > _REACH * std:
        return std * jax.random.normal(key, shape, jnp.float32)
    return std * jax.random.truncated_normal(key, -bound / std, bound / std, shape, jnp.float32)


class BatchNormReLU(nnx.Module):
    """relu(BatchNorm(x + bias)) over all axes but the last: eps 1e-5, momentum 0.1 in PyTorch's sense.

    Statistics are in float32. In training the running variance takes the unbiased variance of the batch. Under
    `jax.jit` on a mesh a batch sharded over devices is one batch: its statistics are global.
    """

    def __init__(self, channels: int, *, dtype: DTypeLike = jnp.float32):
        self.dtype, self.eps, self.momentum = dtype, 1e-5, 0.1
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros((channels,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: Array, bias: Array, train: bool) -> Array:
        """x: (..., c); bias: (c,), that of the convolution before, whose gradient in training is zero."""
        if not train:
            slope = self.scale[...] * lax.rsqrt(self.var[...] + self.eps)
            y = x * slope + (self.bias[...] + (bias - self.mean[...]) * slope)
            return jax.nn.relu(y).astype(self.dtype)
        y, mean, var = batch_norm_relu(x, bias, self.scale[...], self.bias[...], self.eps)
        count = math.prod(x.shape[:-1])
        keep = 1.0 - self.momentum
        self.mean.set_value(keep * self.mean[...] + self.momentum * mean)
        unbiased = var * (count / max(count - 1, 1))
        self.var.set_value(keep * self.var[...] + self.momentum * unbiased)
        return y.astype(self.dtype)


class DecoderConv3(Conv3):
    """Dense 3x3x3 convolution on (b, h, w, d, c), weights of deviation 0.02; its bias is left to the norm behind it."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, dtype=dtype, rngs=rngs)
        self.kernel = nnx.Param(truncated_normal(rngs.params(), (3, 3, 3, inputs, outputs), 0.02, 2.0))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Array, mask: Mask | None = None) -> Array:
        kernel = self.kernel[...].astype(self.dtype)
        return masked_conv3(x[:, None].astype(self.dtype), kernel, mask)[:, 0]

    def after_upsampling(self, x: Array, upsample: Upsample2) -> Array:
        """self(upsample(x)), computed as one operation."""
        assert upsample.bias is not None
        return upsample_conv3(
            x.astype(self.dtype), upsample.kernel[...], upsample.bias[...], self.kernel[...]
        )


class ConvPair(nnx.Module):
    """2 x [3x3x3 convolution, BatchNorm, ReLU], the first convolution joined with an upsampling before it if given."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = DecoderConv3(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm1 = BatchNormReLU(outputs, dtype=dtype)
        self.conv2 = DecoderConv3(outputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = BatchNormReLU(outputs, dtype=dtype)

    def __call__(self, x: Array, train: bool, upsample: Upsample2 | None = None) -> Array:
        y = self.conv1(x) if upsample is None else self.conv1.after_upsampling(x, upsample)
        assert self.conv1.bias is not None
        assert self.conv2.bias is not None
        x = self.norm1(y, self.conv1.bias[...], train)
        return self.norm2(self.conv2(x), self.conv2.bias[...], train)


class ReconstructionDecoder(nnx.Module):
    """Four steps from stride 16 to 1: fuse with the pyramid's map, upsample, halve the width; then 1x1x1 to voxels.

    METHOD section 5. Takes maps at strides 16, 8, 4, 2 of widths W, W/2, W/4, W/8 and gives (b, h, w, d, outputs).
    """

    def __init__(self, width: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        widths = [width // 2**i for i in range(5)]
        self.fuse = nnx.List([ConvPair(2 * w, w, dtype=dtype, rngs=rngs) for w in widths[1:4]])
        self.upsample = nnx.List([Upsample2(w, w, dtype=dtype, rngs=rngs) for w in widths[:4]])
        self.refine = nnx.List(
            [ConvPair(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.kernel = nnx.Param(truncated_normal(rngs.params(), (widths[4], outputs), 0.02, 2.0))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, maps: tuple[Array, ...], train: bool) -> Array:
        x = maps[0]
        for i in range(4):
            if i > 0:
                x = self.fuse[i - 1](jnp.concatenate([x, maps[i]], axis=-1), train)
            x = self.refine[i](x, train, self.upsample[i])
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y.astype(jnp.promote_types(y.dtype, jnp.float32)) + self.bias[...]
