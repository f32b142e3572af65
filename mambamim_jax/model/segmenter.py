"""The fine-tuning network: any encoder, unmasked, and a UNETR decoder (METHOD section 8)."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mambamim_jax.model.encoder import Encoder
from mambamim_jax.model.masked_layers import Conv3, Pointwise, ResBlock, torch_uniform
from mambamim_jax.model.upsample import Upsample2
from mambamim_jax.types import Array


def instance_norm(x: Array, eps: float = 1e-5) -> Array:
    """Normalises each sample's channels over the voxels, no affine parameters; statistics in float32."""
    axes = tuple(range(1, x.ndim - 1))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axes, keepdims=True)
    return (centred * lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + eps)).astype(x.dtype)


class UpBlock(nnx.Module):
    """UNETR up-block: upsample, concatenate the skip, residual block with InstanceNorm and LeakyReLU(0.01)."""

    def __init__(self, inputs: int, skip: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.upsample = Upsample2(inputs, outputs, bias=False, dtype=dtype, rngs=rngs)
        # PyTorch's default for a transposed convolution: uniform, its fan counts the outputs.
        shape = self.upsample.kernel[...].shape
        self.upsample.kernel = nnx.Param(torch_uniform(rngs.params(), shape, 8 * outputs))
        self.conv1 = Conv3(outputs + skip, outputs, bias=False, dtype=dtype, rngs=rngs)
        self.conv2 = Conv3(outputs, outputs, bias=False, dtype=dtype, rngs=rngs)
        self.shortcut = Pointwise(outputs + skip, outputs, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, skip: Array) -> Array:
        x = jnp.concatenate([self.upsample(x), skip], axis=-1)
        y = jax.nn.leaky_relu(instance_norm(self.conv1(x[:, None])[:, 0]), 0.01)
        y = instance_norm(self.conv2(y[:, None])[:, 0])
        return jax.nn.leaky_relu(y + instance_norm(self.shortcut(x)), 0.01)


class Segmenter(nnx.Module):
    """Encoder, four up-blocks, a residual block to half the finest width, 1x1x1 to the classes.

    Args:
      encoder: any encoder (`model.encoder.Encoder`).
      classes: output channels.
      head_width: width of the last residual block; half the encoder's finest map by default.
      deep_supervision: further 1x1x1 classifiers, `aux`, of the decoder's maps at strides 2 and 4.
      dtype: compute dtype of the decoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        classes: int,
        head_width: int | None = None,
        deep_supervision: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths = encoder.channels
        head_width = widths[4] // 2 if head_width is None else head_width
        self.encoder = encoder
        self.ups = nnx.List([UpBlock(a, b, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.head = ResBlock(widths[4], head_width, dtype=dtype, rngs=rngs)
        self.classify = Pointwise(head_width, classes, dtype=dtype, rngs=rngs)
        if deep_supervision:
            inner = (widths[3], widths[2])
            self.aux = nnx.List([Pointwise(width, classes, dtype=dtype, rngs=rngs) for width in inner])

    def __call__(self, x: Array) -> Array:
        """Class logits (b, h, w, d, classes), float32, of crops (b, h, w, d, c) with sides divisible by the stride."""
        return self._classified(self._decode(x)[-1])

    def supervised(self, x: Array) -> tuple[Array, ...]:
        """Logits at full resolution and, under deep supervision, at strides 2 and 4; all float32."""
        *_, quarter, half, full = self._decode(x)
        logits: tuple[Array, ...] = (self._classified(full),)
        if hasattr(self, "aux"):
            logits += tuple(_wide(head(y)) for head, y in zip(self.aux, (half, quarter), strict=True))
        return logits

    def _decode(self, x: Array) -> list[Array]:
        """The decoder's maps at strides 8, 4, 2, 1."""
        deepest, *skips = self.encoder(x, None)
        maps = [deepest]
        for up, skip in zip(self.ups, skips, strict=True):
            maps.append(up(maps[-1], skip))
        return maps[1:]

    def _classified(self, y: Array) -> Array:
        return _wide(self.classify(self.head(y[:, None])[:, 0]))


def _wide(logits: Array) -> Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def parameter_count(tree: object) -> int:
    """Number of parameters in a tree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
