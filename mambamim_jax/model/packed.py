"""Feature maps that hold the visible patches alone, and the few operations that need their neighbours.

A masked network as published computes on the whole map and multiplies by the mask after each convolution: with
three quarters hidden, three quarters of the work is thrown away. Here a map is *packed*: (b, k, p, p, p, c), the k
active patches in raster order, p voxels a side at that stage. Whatever is local to a voxel needs nothing else. A
3x3x3 convolution needs a border of one voxel (`halo`), taken from neighbouring patches, zero where these are hidden
or outside: the same numbers as on the masked map, at a quarter of the cost, and a hidden voxel can't leak because
it is never read. An unmasked map is the case without a mask: (b, 1, h, w, d, c), one patch, zero border.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from mambamim_jax.model.mask import Mask
from mambamim_jax.ops.conv3d import convolve, convolve_padded, kernel_gradient
from mambamim_jax.ops.depthwise_conv import depthwise, depthwise_kernel_gradient
from mambamim_jax.types import Array, Size3

_OFFSETS = tuple(itertools.product((-1, 0, 1), repeat=3))
_RADIX = np.array([9, 3, 1])  # (offset + 1) @ _RADIX is an offset's place in _OFFSETS


def take_blocks(blocks: Array, slots: Array) -> Array:
    """Gathers whole blocks per sample; a slot past the end gives zeros.

    Args:
      blocks: (b, k, ...).
      slots: int32 (b, m), each in 0..k.

    Returns:
      (b, m, ...).
    """
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(blocks, slots)


def split_patches(x: Array, grid: Size3) -> Array:
    """(b, h, w, d, c) to (b, l, p, q, r, c): the map's patches in raster order."""
    gh, gw, gd = grid
    return rearrange(x, "b (gh p) (gw q) (gd r) c -> b (gh gw gd) p q r c", gh=gh, gw=gw, gd=gd)


def join_patches(blocks: Array, grid: Size3) -> Array:
    """Inverse of `split_patches`."""
    gh, gw, gd = grid
    return rearrange(blocks, "b (gh gw gd) p q r c -> b (gh p) (gw q) (gd r) c", gh=gh, gw=gw, gd=gd)


@jax.custom_vjp
def _pack(x: Array, mask: Mask) -> Array:
    return take_blocks(split_patches(x, mask.grid), mask.indices)


@jax.custom_vjp
def _unpack(blocks: Array, mask: Mask) -> Array:
    return join_patches(take_blocks(blocks, mask.slots), mask.grid)


# Packing and unpacking are each other's transposes; as gathers both ways they stay deterministic on a GPU.
_pack.defvjp(lambda x, mask: (_pack(x, mask), mask), lambda mask, g: (_unpack(g, mask), None))
_unpack.defvjp(lambda x, mask: (_unpack(x, mask), mask), lambda mask, g: (_pack(g, mask), None))


def pack(x: Array, mask: Mask | None) -> Array:
    """The active patches of a map: (b, h, w, d, c) to (b, k, p, p, p, c); without a mask (b, 1, h, w, d, c)."""
    return x[:, None] if mask is None else _pack(x, mask)


def unpack(blocks: Array, mask: Mask | None) -> Array:
    """Inverse of `pack`, zero at hidden places: (b, k, p, p, p, c) to (b, h, w, d, c)."""
    return blocks[:, 0] if mask is None else _unpack(blocks, mask)


def neighbours(mask: Mask) -> Array:
    """int32 (b, k, 27): the slot of each patch's neighbour at every offset in {-1, 0, 1}^3, k if there is none."""
    gh, gw, gd = mask.grid
    padded = np.full((gh + 2, gw + 2, gd + 2), mask.tokens, np.int32)
    padded[1:-1, 1:-1, 1:-1] = np.arange(mask.tokens).reshape(mask.grid)
    windows = [padded[1 + i : 1 + i + gh, 1 + j : 1 + j + gw, 1 + m : 1 + m + gd] for i, j, m in _OFFSETS]
    table = jnp.asarray(np.stack([window.ravel() for window in windows], axis=1))
    slots = jnp.pad(mask.slots, ((0, 0), (0, 1)), constant_values=mask.kept)
    return jax.vmap(lambda s, i: s[table[i]])(slots, mask.indices)


def halo(blocks: Array, mask: Mask) -> Array:
    """Adds the border that a 3x3x3 window needs: (b, k, p, p, p, c) to (b, k, p+2, p+2, p+2, c).

    One gather of whole voxels; the barrier keeps it from being computed again in every tap of what follows.
    """
    b, k, *side, c = blocks.shape
    shape = np.asarray(side)
    place = np.stack(np.meshgrid(*(np.arange(n + 2) for n in side), indexing="ij"), -1).reshape(-1, 3) - 1
    offset = np.where(place < 0, -1, np.where(place >= shape, 1, 0))
    inside = np.ravel_multi_index((place % shape).T, side)
    rows = neighbours(mask)[:, :, (offset + 1) @ _RADIX] * math.prod(side) + inside
    bordered = take_blocks(blocks.reshape(b, -1, c), rows.reshape(b, -1))
    return lax.optimization_barrier(bordered.reshape(b, k, *(n + 2 for n in side), c))


def _dense(blocks: Array, mask: Mask | None) -> bool:
    """Whether a convolution better runs on the whole map: the border of a patch of 2 is seven times the patch."""
    return mask is None or min(blocks.shape[2:5]) <= 2


def _to_maps(blocks: Array, mask: Mask | None) -> Array:
    """A packed map as a batch of maps, (m, h, w, d, c): the whole ones, or every patch for itself."""
    return unpack(blocks, mask) if _dense(blocks, mask) else blocks.reshape(-1, *blocks.shape[2:])


def _to_bordered_maps(blocks: Array, mask: Mask | None) -> Array:
    """`_to_maps` with the border that a 3x3x3 window needs."""
    if mask is None or _dense(blocks, mask):
        return jnp.pad(unpack(blocks, mask), ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
    bordered = halo(blocks, mask)
    return bordered.reshape(-1, *bordered.shape[2:])


def _to_blocks(maps: Array, like: Array, mask: Mask | None) -> Array:
    """Inverse of `_to_maps`."""
    return pack(maps, mask) if _dense(like, mask) else maps.reshape(*like.shape[:5], -1)


def _convolve(blocks: Array, kernel: Array, mask: Mask | None) -> Array:
    if _dense(blocks, mask):
        maps = convolve_padded(unpack(blocks, mask), kernel)
    else:
        maps = convolve(_to_bordered_maps(blocks, mask), kernel)
    return _to_blocks(maps, blocks, mask)


# A masked convolution is pack . convolve . unpack, so its transpose is a masked convolution with the flipped kernel:
# the backward reads a border of the gradient where the forward reads one of the features.


@jax.custom_vjp
def masked_conv3(blocks: Array, kernel: Array, mask: Mask | None) -> Array:
    """3x3x3 convolution with zero padding on a packed map, hidden voxels zero: kernel (3, 3, 3, c, o)."""
    return _convolve(blocks, kernel, mask)


def _masked_conv3_bwd(saved: tuple[Array, Array, Mask | None], g: Array) -> tuple[Array, Array, None]:
    blocks, kernel, mask = saved
    flipped = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    return (
        _convolve(g, flipped, mask),
        kernel_gradient(_to_bordered_maps(blocks, mask), _to_maps(g, mask)),
        None,
    )


masked_conv3.defvjp(
    lambda x, kernel, mask: (masked_conv3(x, kernel, mask), (x, kernel, mask)), _masked_conv3_bwd
)


@jax.custom_vjp
def masked_depthwise_conv3(blocks: Array, kernel: Array, mask: Mask | None) -> Array:
    """Depthwise 3x3x3 convolution with zero padding on a packed map: kernel (3, 3, 3, c)."""
    return _to_blocks(depthwise(_to_bordered_maps(blocks, mask), kernel), blocks, mask)


def _masked_depthwise_bwd(saved: tuple[Array, Array, Mask | None], g: Array) -> tuple[Array, Array, None]:
    blocks, kernel, mask = saved
    dx = _to_blocks(depthwise(_to_bordered_maps(g, mask), jnp.flip(kernel, (0, 1, 2))), blocks, mask)
    return dx, depthwise_kernel_gradient(_to_bordered_maps(blocks, mask), _to_maps(g, mask)), None


masked_depthwise_conv3.defvjp(
    lambda x, kernel, mask: (masked_depthwise_conv3(x, kernel, mask), (x, kernel, mask)),
    _masked_depthwise_bwd,
)


def max_pool2(blocks: Array) -> Array:
    """Maximum over 2x2x2 voxels, stride 2; of equal voxels the first in raster order takes the gradient.

    Patches have even sides, so no window crosses a patch's border.
    """
    for axis in (4, 3, 2):
        shape = blocks.shape
        pairs = blocks.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
        first, second = jnp.take(pairs, 0, axis=axis + 1), jnp.take(pairs, 1, axis=axis + 1)
        blocks = jnp.where(first >= second, first, second)
    return blocks
