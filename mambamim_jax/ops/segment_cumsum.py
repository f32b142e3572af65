"""Running sums along tokens that restart at every segment, in two small matrix products.

XLA for CPUs computes a sum by doubling, log2 l shifted additions, in passes that each repeat what the ones before did.
Here tokens are cut into blocks of about sqrt(l). Sums inside a block are a product with a matrix of zeros and
ones; what a block's first segment has gathered in the blocks before is another, over the blocks' last sums.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from mambamim_jax.types import Array

HIGHEST = lax.Precision.HIGHEST


@jax.custom_vjp
def segment_cumsum(x: Array, offset: Array) -> Array:
    """Running sum of x (b, l, c) along l that restarts where offset is 0.

    Args:
      x: float32 or float64.
      offset: int32 (b, l), a token's distance from the start of its segment.
    """
    blocks, reach = _blocks(x), _blocks(offset[..., None])[..., 0]
    inside, between, joined = _masks(reach, x.dtype)
    sums = jnp.einsum("bkrs,bksc->bkrc", inside, blocks, precision=HIGHEST)
    before = jnp.einsum("bij,bjc->bic", between, sums[:, :, -1], precision=HIGHEST)
    sums = sums + jnp.where(joined, before[:, :, None], 0)
    return sums.reshape(len(x), -1, x.shape[2])[:, : x.shape[1]]


def _forward(x: Array, offset: Array) -> tuple[Array, Array]:
    return segment_cumsum(x, offset), offset


def _backward(offset: Array, g: Array) -> tuple[Array, None]:
    blocks, reach = _blocks(g), _blocks(offset[..., None])[..., 0]
    inside, between, joined = _masks(reach, g.dtype)
    before = jnp.sum(jnp.where(joined, blocks, 0), axis=2)
    ends = jnp.einsum("bij,bic->bjc", between, before, precision=HIGHEST)
    last = jnp.arange(blocks.shape[2])[:, None] == blocks.shape[2] - 1
    blocks = blocks + jnp.where(last, ends[:, :, None], 0)
    # transposed beforehand, where XLA calculates it; as part of the product it costs more than the product
    x = jnp.einsum("bksr,bkrc->bksc", inside.swapaxes(2, 3), blocks, precision=HIGHEST)
    return x.reshape(len(g), -1, g.shape[2])[:, : g.shape[1]], None


segment_cumsum.defvjp(_forward, _backward)


def _blocks(x: Array) -> Array:
    """(b, l, c) to (b, k, r, c): k blocks of r tokens, the last one filled up with zeros."""
    b, length, channels = x.shape
    side = max(1, math.isqrt(3 * length // 2))
    count = -(-length // side)
    x = jnp.pad(x, ((0, 0), (0, count * side - length), (0, 0)))
    return x.reshape(b, count, side, channels)


def _masks(reach: Array, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
    """Of offsets (b, k, r), which sums are made of what.

    Returns:
      (b, k, r, s): token s of a block is in the sum of token r.
      (b, k, j): the last sum of block j is in the sums of block k's first tokens, j < k.
      (b, k, r, 1): token r has part in these.
    """
    count, side = reach.shape[1:]
    token, block = jnp.arange(side), jnp.arange(count)
    back = token[:, None] - token
    inside = (back >= 0) & (reach[..., None] >= back)
    back = (block[:, None] - block - 1) * side + 1  # from a block's first token to the last one of another
    between = (back > 0) & (reach[:, :, :1] >= back)
    return inside.astype(dtype), between.astype(dtype), (reach > token)[..., None]
