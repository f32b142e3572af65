"""Transposed convolution 2x2x2 of stride 2 and the 3x3x3 convolution behind it, as one operation.

With nothing between them the two are one linear map: each of the 8 children of a coarse voxel sees only a 2x2x2
window of the coarse map, so 8 products per output voxel do the work of 27, plus those of the upsampling. The joint
kernels cost 216 small products, which pays as soon as the map has somewhat more voxels than channels.

Along one axis, output y = 2a + parity sees through tap t the fine voxel 2a + parity + t - 1:

    parity 0: t = 0 is child 1 of a-1; t = 1, 2 are children 0, 1 of a
    parity 1: t = 0, 1 are children 0, 1 of a; t = 2 is child 0 of a+1
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mambamim_jax.ops import partition
from mambamim_jax.ops.conv3d import (
    DIMENSIONS_2D,
    DIMENSIONS_3D,
    conv3d,
    convolve,
    kernel_gradient,
)
from mambamim_jax.ops.winograd import largest_divisor
from mambamim_jax.types import Array

# [parity][window]: the (child, tap) that meet there, along one axis; window 0 is a-1 for parity 0 and a for parity 1.
_JOINT = ((((1, 0),), ((0, 1), (1, 2))), (((0, 0), (1, 1)), ((0, 2),)))

_PARITIES = tuple(itertools.product(range(2), repeat=3))
_SLAB_BYTES = 8 * 2**20
"""Copies of one step of `_kernel_gradients_on_cpu`: a share of a last-level cache."""

# Taps that fall inside the map: at its first voxel, in between, at its last.
_INSIDE = np.array([[0, 1, 1], [1, 1, 1], [1, 1, 0]], np.float32)


def upsample2(x: Array, kernel: Array) -> Array:
    """Transposed convolution 2x2x2, stride 2: (..., h, w, d, c) and (2, 2, 2, c, e) to (..., 2h, 2w, 2d, e)."""
    *lead, h, w, d, _ = x.shape
    y = jnp.einsum("...hwdc,pqrce->...hpwqdre", x, kernel)
    return y.reshape(*lead, 2 * h, 2 * w, 2 * d, y.shape[-1])


def upsample_conv3(x: Array, up_kernel: Array, up_bias: Array, kernel: Array) -> Array:
    """conv3x3x3(upsample2(x) + bias) with zero padding.

    Args:
      x: (m, h, w, d, c).
      up_kernel: (2, 2, 2, c, e), float32.
      up_bias: (e,), float32.
      kernel: (3, 3, 3, e, o), float32.

    Returns:
      (m, 2h, 2w, 2d, o), dtype of x.
    """
    (c, e), o = up_kernel.shape[3:], kernel.shape[-1]
    voxels = math.prod(x.shape[:4])
    apart = 8 * voxels * (c * e + 27 * e * o)
    joint = 216 * c * e * o + 64 * voxels * c * o
    if apart <= joint:
        fine = upsample2(x, up_kernel.astype(x.dtype)) + up_bias.astype(x.dtype)
        return conv3d(_bordered(fine), kernel.astype(x.dtype))
    return _joined(x, up_kernel, kernel) + _bias_map(x, up_bias, kernel).astype(x.dtype)


def _bordered(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))


def _joined(x: Array, up_kernel: Array, kernel: Array) -> Array:
    return _children(x, _joint_kernels(up_kernel, kernel).astype(x.dtype))


def _joint_kernels(up_kernel: Array, kernel: Array) -> Array:
    """(2, 2, 2, c, e) and (3, 3, 3, e, o) to (parities 2, 2, 2, windows 2, 2, 2, c, o).

    An axis at a time, by slices and stacks: jax 0.11 on a CPU spends seconds on each transposition that products with
    so many small axes would need.
    """
    joint = jnp.einsum("abcie,xyzeo->abcixyzo", up_kernel, kernel, precision=lax.Precision.HIGHEST)
    for axis in range(3):
        joint = _meeting(joint, axis)
    return joint


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _meeting(joint: Array, axis: int) -> Array:
    """Children and taps of an axis to parities and windows, those of the axes before it in front already.

    (parities, windows, children, c, taps, o) with a dimension an axis each. The gradient is a selection, where JAX's
    own would be a sum of padded arrays.
    """

    def met(child: int, tap: int) -> Array:
        return _pick(joint, {2 * axis: child, axis + 4: tap})

    parities = [[[met(*pair) for pair in pairs] for pairs in windows] for windows in _JOINT]
    stacked = [jnp.stack([sum(parts[1:], parts[0]) for parts in windows], 2 * axis) for windows in parities]
    return jnp.stack(stacked, axis)


def _meeting_backward(axis: int, _: None, g: Array) -> tuple[Array]:
    where = {pair: (p, w) for p in range(2) for w in range(2) for pair in _JOINT[p][w]}
    parts = [[_pick(g, dict(zip((axis, 2 * axis + 1), where[c, t]))) for t in range(3)] for c in range(2)]
    return (jnp.stack([jnp.stack(taps, axis + 3) for taps in parts], 2 * axis),)


_meeting.defvjp(lambda joint, axis: (_meeting(joint, axis), None), _meeting_backward)


def _pick(x: Array, at: Mapping[int, int]) -> Array:
    """The entries of an array at an index of some of its axes."""
    return x[tuple(at.get(axis, slice(None)) for axis in range(x.ndim))]


@jax.custom_vjp
def _children(x: Array, kernels: Array) -> Array:
    """The 8 children of every voxel, each from its own 2x2x2 window of the map with a border of zeros.

    (m, h, w, d, c) and (parities 2, 2, 2, windows 2, 2, 2, c, o) to (m, 2h, 2w, 2d, o). JAX's own derivative would
    keep all 8 windows of a map, 8 times the map.
    """
    if partition.ambient():
        return _by_parity(x, kernels)
    return lax.platform_dependent(x, kernels, cpu=_by_plane, default=_by_parity)


def _children_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    if partition.ambient():
        return _gradients_by_parity(*saved, g)
    return lax.platform_dependent(*saved, g, cpu=_gradients_on_cpu, default=_gradients_by_parity)


_children.defvjp(lambda x, kernels: (_children(x, kernels), (x, kernels)), _children_backward)


def _by_parity(x: Array, kernels: Array) -> Array:
    return _interleaved([convolve(_window(x, parity), kernels[parity]) for parity in _PARITIES])


def _interleaved(parts: Sequence[Array]) -> Array:
    """8 maps (m, h, w, d, o) of children, by parity, to (m, 2h, 2w, 2d, o)."""
    m, h, w, d, o = parts[0].shape
    y = jnp.stack(parts).reshape(2, 2, 2, m, h, w, d, o)
    return jnp.einsum("pqrmhwdo->mhpwqdro", y).reshape(m, 2 * h, 2 * w, 2 * d, o)


def _window(x: Array, parity: tuple[int, ...], flipped: bool = False) -> Array:
    """x with the zeros that 2x2x2 windows of one parity read: before each axis for parity 0, behind it for 1."""
    return jnp.pad(x, ((0, 0), *_zeros(parity, flipped), (0, 0)))


def _zeros(parity: tuple[int, ...], flipped: bool = False) -> list[tuple[int, int]]:
    return [(p, 1 - p) if flipped else (1 - p, p) for p in parity]


def _gradients_by_parity(x: Array, kernels: Array, g: Array) -> tuple[Array, Array]:
    x = lax.optimization_barrier(x)  # or else the forward pass's windows are kept for here
    parts, dkernels = [], []
    for parity in _PARITIES:
        mine = g[:, *(slice(p, None, 2) for p in parity)]
        kernel = jnp.flip(kernels[parity], (0, 1, 2)).swapaxes(3, 4)
        parts.append(convolve(_window(mine, parity, flipped=True), kernel))
        dkernels.append(kernel_gradient(_window(x, parity), mine))
    return sum(parts[1:], parts[0]), jnp.stack(dkernels).reshape(kernels.shape)


def _by_plane(x: Array, kernels: Array) -> Array:
    """Two 2D convolutions a parity: a CPU's library takes half the time when left the padding within planes."""
    m, h, w, d, c = x.shape
    parts = []
    for parity in _PARITIES:
        first, *inside = _zeros(parity)
        bordered = jnp.pad(x, ((0, 0), first, (0, 0), (0, 0), (0, 0)))
        planes = [bordered[:, i : i + h].reshape(m * h, w, d, c) for i in range(2)]
        sums = [
            lax.conv_general_dilated(p, k, (1, 1), inside, dimension_numbers=DIMENSIONS_2D)
            for p, k in zip(planes, kernels[parity], strict=True)
        ]
        parts.append((sums[0] + sums[1]).reshape(m, h, w, d, -1))
    return _interleaved(parts)


def _gradients_on_cpu(x: Array, kernels: Array, g: Array) -> tuple[Array, Array]:
    """The input's as one convolution of stride 2 whose 4x4x4 taps are all windows of all parities."""
    # A parity beside its window, in and out swapped; an axis's tap t is the fine voxel 2a - 1 + t.
    taps = kernels.transpose(0, 3, 1, 4, 2, 5, 7, 6)
    order = np.array([3, 1, 2, 0])
    taps = taps.reshape(4, 4, 4, *taps.shape[6:])[order][:, order][:, :, order]
    dx = lax.conv_general_dilated(g, taps, (2, 2, 2), [(1, 1)] * 3, dimension_numbers=DIMENSIONS_3D)
    return dx, _kernel_gradients_on_cpu(x, g)


def _kernel_gradients_on_cpu(x: Array, g: Array) -> Array:
    """Products of rows of the map and of its children, a slab at a time so that their copies stay in cache.

    Along the last axis the three shifts of the map lie side by side, and so do the two parities of the children: of
    the six pairs four are windows.
    """
    m, h, w, d, c = x.shape
    o, wide = g.shape[-1], jnp.promote_types(x.dtype, jnp.float32)
    rows = largest_divisor(h, _SLAB_BYTES / (w * d * (3 * c + 8 * o) * x.dtype.itemsize))
    bordered = _bordered(x)

    def add(step: Array, total: Array) -> Array:
        sample, row = step // (h // rows), step % (h // rows) * rows
        xs = lax.dynamic_slice(bordered, (sample, row, 0, 0, 0), (1, rows + 2, w + 2, d + 2, c))
        gs = lax.dynamic_slice(g, (sample, 2 * row, 0, 0, 0), (1, 2 * rows, 2 * w, 2 * d, o))
        shifted = jnp.concatenate([xs[..., k : k + d, :] for k in range(3)], axis=-1)
        gs = gs.reshape(rows, 2, w, 2, d, 2 * o)
        products = [
            jnp.einsum(
                "hwda,hwdb->ab",
                shifted[0, p + i : p + i + rows, q + j : q + j + w],
                gs[:, p, :, q],
                preferred_element_type=wide,
            )
            for p, q, i, j in itertools.product(range(2), repeat=4)
        ]
        return total + jnp.stack(products)

    total = lax.fori_loop(0, m * h // rows, add, jnp.zeros((16, 3 * c, 2 * o), wide))
    pairs = total.reshape(2, 2, 2, 2, 3, c, 2, o)
    windows = [jnp.stack([pairs[..., r + k, :, r, :] for k in range(2)], axis=4) for r in range(2)]
    return jnp.stack(windows, axis=2).astype(x.dtype)


def _bias_map(x: Array, up_bias: Array, kernel: Array) -> Array:
    """What the upsampling's bias gives after the convolution: constant but for the faces, (2h, 2w, 2d, o)."""
    inside = _INSIDE.astype(kernel.dtype)
    values = jnp.einsum("ax,by,cz,xyzeo,e->abco", inside, inside, inside, kernel, up_bias)
    for axis in (2, 1, 0):
        values = _stretched(values, axis, 2 * x.shape[1 + axis])
    return values


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _stretched(values: Array, axis: int, size: int) -> Array:
    """The first, the one between and the last along an axis to so many: XLA chooses among them where it reads them.

    The gradient is one sum over the axis and two slices, where JAX's own would be three sums.
    """
    first, between, last = jnp.split(values, 3, axis)
    place = np.arange(size).reshape(-1, *[1] * (values.ndim - 1 - axis))
    return jnp.where(place == 0, first, jnp.where(place == size - 1, last, between))


def _stretched_backward(axis: int, size: int, _: None, g: Array) -> tuple[Array]:
    first, last = (lax.slice_in_dim(g, at, at + 1, axis=axis) for at in (0, size - 1))
    between = jnp.sum(g, axis, keepdims=True) - first - last
    return (jnp.concatenate([first, between, last], axis),)


_stretched.defvjp(lambda values, axis, size: (_stretched(values, axis, size), None), _stretched_backward)
