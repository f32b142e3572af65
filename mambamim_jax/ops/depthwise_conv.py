"""Depthwise 3x3x3 convolution as a sum of shifted products.

XLA runs a grouped convolution with one channel a group some 250 times slower on a CPU than this sum; on a GPU it is
one fused, bandwidth-bound pass.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from jax import lax

from mambamim_jax.types import Array

_TAPS = tuple(itertools.product(range(3), repeat=3))


def _window(x: Array, tap: tuple[int, ...], sides: tuple[int, ...]) -> Array:
    """The part of a bordered map under one tap of the kernel."""
    i, j, m = tap
    h, w, d = sides
    return x[..., i : i + h, j : j + w, m : m + d, :]


def depthwise(x: Array, kernel: Array) -> Array:
    """y[v] = sum over taps t in {0,1,2}^3 of x[v + t] * kernel[t], per channel; accumulated in float32 or wider.

    Args:
      x: (..., h+2, w+2, d+2, c), with its border.
      kernel: (3, 3, 3, c).

    Returns:
      (..., h, w, d, c), dtype of x.
    """
    sides = tuple(side - 2 for side in x.shape[-4:-1])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = jnp.zeros((*x.shape[:-4], *sides, x.shape[-1]), wide)
    for tap in _TAPS:
        total += _window(x, tap, sides).astype(wide) * kernel[tap].astype(wide)
    # XLA for GPUs would try for minutes how well 27 taps fuse with what follows.
    return lax.platform_dependent(total.astype(x.dtype), cpu=_as_it_is, default=lax.optimization_barrier)


def _as_it_is(x: Array) -> Array:
    return x


def depthwise_kernel_gradient(x: Array, g: Array) -> Array:
    """Gradient (3, 3, 3, c) of the kernel, of `depthwise`'s input with its border and its output's cotangent."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    axes, g = tuple(range(g.ndim - 1)), g.astype(wide)
    taps = [jnp.sum(_window(x, tap, g.shape[-4:-1]).astype(wide) * g, axis=axes) for tap in _TAPS]
    return jnp.stack(taps).reshape(3, 3, 3, -1).astype(x.dtype)
