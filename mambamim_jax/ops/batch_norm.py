"""BatchNorm in training with the ReLU behind it, as one operation with its own derivative (Ioffe & Szegedy 2015).

    y = relu(slope (x - mean) + shift),    slope = scale / sqrt(var + eps)

Left to autodiff, the gradient is written through mean and variance one by one, and a CPU, where XLA fuses nothing into
a sum over voxels, stores a whole map for each term. Here the backward is two passes over (x, g),

    g' = g where y > 0,    x^ = (x - mean) / sqrt(var + eps)
    dshift = sum g',    dscale = sum g' x^,    dx = slope (g' - (dshift + x^ dscale) / n)

and on a CPU both passes' sums take a slab at a time, which stays in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mambamim_jax.ops import partition
from mambamim_jax.ops.winograd import largest_divisor
from mambamim_jax.types import Array

_SLAB_BYTES = 2 * 2**20
"""Float32 entries of one slab: a share of a second-level cache."""


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def batch_norm_relu(
    x: Array, bias: Array, scale: Array, shift: Array, eps: float
) -> tuple[Array, Array, Array]:
    """relu(BatchNorm(x + bias)) by the batch's own statistics, arithmetic in float32 at least.

    The bias moves nothing but the mean: its gradient is zero, exactly, where a sum over voxels would give rounding.

    Args:
      x: (..., c).
      bias, scale, shift: (c,), float32.
      eps: added to the variance.

    Returns:
      y, shape and dtype of x; mean and biased variance (c,) of x + bias, which carry no gradient.
    """
    return _forward(x, bias, scale, shift, eps)[0]


def _forward(x: Array, bias: Array, scale: Array, shift: Array, eps: float):
    mean, var = _by_slabs(_moments_by_slabs, _moments, x)
    y = jax.nn.relu(_normalised(x, mean, scale * lax.rsqrt(var + eps), shift)).astype(x.dtype)
    return (y, mean + bias, var), (x, mean, var, scale, shift, jnp.zeros_like(bias))


def _normalised(x: Array, mean: Array, slope: Array, shift: Array) -> Array:
    return (_widen(x) - mean) * slope + shift


def _backward(eps: float, saved: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple[Array, ...]:
    x, mean, var, scale, shift, no_gradient = saved
    invstd, count = lax.rsqrt(var + eps), math.prod(x.shape[:-1])
    slope = scale * invstd
    kept = partial(_kept, mean=mean, slope=slope, shift=shift)

    def sums(x: Array, g: Array) -> tuple[Array, Array]:
        passed, axes = kept(x, g), tuple(range(x.ndim - 1))
        return jnp.sum(passed, axes), jnp.sum(passed * ((_widen(x) - mean) * invstd), axes)

    d_shift, d_scale = _by_slabs(partial(_sums_by_slabs, sums), sums, x, cotangents[0])
    along = invstd * d_scale / count
    dx = slope * (kept(x, cotangents[0]) - d_shift / count - (_widen(x) - mean) * along)
    return dx.astype(x.dtype), no_gradient, d_scale, d_shift


batch_norm_relu.defvjp(_forward, _backward)


def _kept(x: Array, g: Array, mean: Array, slope: Array, shift: Array) -> Array:
    """g where the ReLU passed."""
    return jnp.where(_normalised(x, mean, slope, shift) > 0, _widen(g), 0)


def _widen(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _by_slabs(
    on_cpu: Callable[..., tuple[Array, ...]], whole: Callable[..., tuple[Array, ...]], *maps: Array
):
    """The one where it runs on a CPU that holds the maps alone, else the other."""
    if partition.ambient():
        return whole(*maps)
    return lax.platform_dependent(*maps, cpu=on_cpu, default=whole)


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance (c,)."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(_widen(x), axes)
    return mean, jnp.mean(jnp.square(_widen(x) - mean), axes)


def _slabs(x: Array) -> Array:
    """(..., c) to (n, rows, c)."""
    c = x.shape[-1]
    total = x.size // c
    rows = largest_divisor(total, _SLAB_BYTES / (4 * c))
    return x.reshape(total // rows, rows, c)


def _moments_by_slabs(x: Array) -> tuple[Array, Array]:
    """`_moments` in one pass: means of slabs, and squares about them (Chan, Golub & LeVeque 1983)."""
    slabs = _slabs(x)
    means, variances = lax.map(_moments, slabs)
    mean = jnp.mean(means, 0)
    return mean, jnp.mean(variances, 0) + jnp.mean(jnp.square(means - mean), 0)


def _sums_by_slabs(sums: Callable[[Array, Array], tuple[Array, Array]], x: Array, g: Array):
    """sums of all slabs, added."""
    parts = lax.map(lambda slab: sums(*slab), (_slabs(x), _slabs(g)))
    return tuple(jnp.sum(part, 0) for part in parts)
