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

import jax.numpy as jnp
import numpy as np
from jax import lax

from mambamim_jax.ops.conv3d import conv3d
from mambamim_jax.types import Array

# (parity, window, child, tap) along one axis; window 0 is a-1 for parity 0 and a for parity 1.
_JOINT = np.zeros((2, 2, 2, 3), np.float32)
for _parity, _tap in itertools.product(range(2), range(3)):
    _fine = _parity + _tap - 1
    _JOINT[_parity, _fine // 2 + 1 - _parity, _fine % 2, _tap] = 1.0

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
    products = jnp.einsum("abcie,xyzeo->axbyczio", up_kernel, kernel, precision=lax.Precision.HIGHEST)
    for _ in range(3):  # one axis at a time: (child, tap, rest..) to (rest.., parity, window)
        products = jnp.einsum("pqax,ax...->...pq", _JOINT.astype(products.dtype), products)
    kernels = jnp.einsum("ioPQRSTU->PRTQSUio", products).astype(x.dtype)
    m, h, w, d, _ = x.shape
    bordered = _bordered(x)
    parts = [
        conv3d(bordered[:, i : i + h + 1, j : j + w + 1, k : k + d + 1], kernels[i, j, k])
        for i, j, k in itertools.product(range(2), repeat=3)
    ]
    y = jnp.stack(parts).reshape(2, 2, 2, m, h, w, d, -1)
    return jnp.einsum("pqrmhwdo->mhpwqdro", y).reshape(m, 2 * h, 2 * w, 2 * d, -1)


def _bias_map(x: Array, up_bias: Array, kernel: Array) -> Array:
    """What the upsampling's bias gives after the convolution: constant but for the faces, (2h, 2w, 2d, o)."""
    inside = _INSIDE.astype(kernel.dtype)
    values = jnp.einsum("ax,by,cz,xyzeo,e->abco", inside, inside, inside, kernel, up_bias)
    for axis, side in enumerate(x.shape[1:4]):
        zone = np.ones(2 * side, int)
        zone[0], zone[-1] = 0, 2
        spread = np.eye(3, dtype=np.float32)[zone].astype(kernel.dtype)
        values = jnp.moveaxis(jnp.tensordot(spread, values, (1, axis)), 0, axis)
    return values
