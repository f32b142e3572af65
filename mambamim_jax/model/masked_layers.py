"""Layers of the convolutional stages on packed maps (see `packed`): convolution, MedNeXt block, residual block."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mambamim_jax.model.mask import Mask
from mambamim_jax.model.packed import masked_conv3, masked_depthwise_conv3
from mambamim_jax.types import Array


def torch_uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """PyTorch's default for convolutions and biases: uniform within 1/sqrt(fan_in), float32."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def layer_norm(channels: int, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over channels, statistics in float32."""
    return nnx.LayerNorm(channels, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


class Pointwise(nnx.Module):
    """1x1x1 convolution: a matrix product over channels, (..., in) to (..., out)."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(torch_uniform(rngs.params(), (inputs, outputs), inputs))
        self.bias = nnx.Param(torch_uniform(rngs.params(), (outputs,), inputs)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Conv3(nnx.Module):
    """3x3x3 convolution with padding 1 on a packed map: (b, k, p, p, p, in) to (b, k, p, p, p, out).

    Called with the mask of the map, None for an unmasked one.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.kernel = nnx.Param(torch_uniform(rngs.params(), (3, 3, 3, inputs, outputs), 27 * inputs))
        self.bias = nnx.Param(torch_uniform(rngs.params(), (outputs,), 27 * inputs)) if bias else None

    def __call__(self, x: Array, mask: Mask | None = None) -> Array:
        y = masked_conv3(x.astype(self.dtype), self.kernel[...].astype(self.dtype), mask)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class DepthwiseConv3(nnx.Module):
    """Depthwise 3x3x3 convolution with padding 1 and a bias on a packed map."""

    def __init__(self, channels: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(torch_uniform(rngs.params(), (3, 3, 3, channels), 27))
        self.bias = nnx.Param(torch_uniform(rngs.params(), (channels,), 27))

    def __call__(self, x: Array, mask: Mask | None = None) -> Array:
        y = masked_depthwise_conv3(x.astype(self.dtype), self.kernel[...].astype(self.dtype), mask)
        return y + self.bias[...].astype(self.dtype)


class MedNeXtBlock(nnx.Module):
    """x + project(GELU(expand(LayerNorm(depthwise(x))))), width kept (METHOD section 3; Roy et al., MICCAI 2023)."""

    def __init__(self, channels: int, expansion: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.depthwise = DepthwiseConv3(channels, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(channels, 1e-6, dtype, rngs)
        self.expand = Pointwise(channels, expansion * channels, dtype=dtype, rngs=rngs)
        self.project = Pointwise(expansion * channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, mask: Mask | None = None) -> Array:
        y = self.expand(self.norm(self.depthwise(x, mask)))
        return x + self.project(jax.nn.gelu(y, approximate=False))


class ResBlock(nnx.Module):
    """Two 3x3x3 convolutions with LayerNorm and LeakyReLU(0.01) around a shortcut, 1x1x1 where widths differ."""

    def __init__(self, inputs: int, outputs: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.conv1 = Conv3(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(outputs, 1e-6, dtype, rngs)
        self.conv2 = Conv3(outputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(outputs, 1e-6, dtype, rngs)
        self.shortcut = Pointwise(inputs, outputs, dtype=dtype, rngs=rngs) if inputs != outputs else None
        self.norm3 = layer_norm(outputs, 1e-6, dtype, rngs) if inputs != outputs else None

    def __call__(self, x: Array, mask: Mask | None = None) -> Array:
        y = jax.nn.leaky_relu(self.norm1(self.conv1(x, mask)), 0.01)
        y = self.norm2(self.conv2(y, mask))
        if self.shortcut is not None and self.norm3 is not None:
            x = self.norm3(self.shortcut(x))
        return jax.nn.leaky_relu(x + y, 0.01)
