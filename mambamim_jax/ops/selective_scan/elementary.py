"""Exponentials for CPUs, written out in additions and products.

XLA's own exponential costs more, its log1p several times as much, and XLA divides a loop among a CPU's cores by the
additions and products that it counts in it, where one of its elementary functions counts for nothing.
Float32 only; other dtypes go to `jax.nn` and `jnp`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mambamim_jax.types import Array

LOG2E = math.log2(math.e)

# Polynomials of the smallest largest relative error, by least squares at Chebyshev nodes, weighted until it is even.
_EXP2 = (  # 2^x, |x| <= 1/2, to 2e-9
    1.0000000005541692,
    0.6931472057372616,
    0.2402264689061928,
    0.05550328776975559,
    0.00961848895871592,
    0.001339993121583345,
    0.00015345811572962565,
)
_ARTANH = (  # 2 artanh(s) / s in s², s <= 1/3, to 4e-9
    2.000000007921044,
    0.6666631468199553,
    0.40024910281480636,
    0.27960602763544995,
    0.28178334865058285,
)


def exp2(x: Array) -> Array:
    """2^x of any shape, to 2e-7 of its value; 2^-126 is the smallest result, infinity that from 127.5."""
    if x.dtype != jnp.float32:
        return jnp.exp2(x)
    x = jnp.clip(x, -126, 128)
    whole = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    power = lax.bitcast_convert_type((whole.astype(jnp.int32) + 127) << 23, jnp.float32)
    return _polynomial(_EXP2, x - whole) * power


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), of any shape."""
    return 1 / (1 + exp2(x * -LOG2E)) if x.dtype == jnp.float32 else jax.nn.sigmoid(x)


def softplus(x: Array) -> Array:
    """log(1 + e^x) = max(x, 0) + 2 artanh(w / (2 + w)), w = e^-|x|, of any shape; exact for tiny values too."""
    if x.dtype != jnp.float32:
        return jax.nn.softplus(x)
    w = exp2(jnp.abs(x) * -LOG2E)
    s = w / (2 + w)
    return jnp.maximum(x, 0) + w * (_polynomial(_ARTANH, s * s) / (2 + w))


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
    """Σ coefficients[i] x^i, by Horner's rule."""
    last = jnp.full_like(x, coefficients[-1])
    return functools.reduce(lambda total, c: total * x + c, reversed(coefficients[:-1]), last)
