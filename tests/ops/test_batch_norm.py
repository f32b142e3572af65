"""BatchNorm with its ReLU against the formula differentiated by JAX, in float64, and in bfloat16."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mambamim_jax.ops import batch_norm

EPS = 1e-5


def written_out(x, bias, scale, shift):
    """relu(BatchNorm(x + bias)) as the formula says, its mean and variance."""
    x = x + bias
    axes = tuple(range(x.ndim - 1))
    mean, var = jnp.mean(x, axes), jnp.var(x, axes)
    return jax.nn.relu((x - mean) * lax.rsqrt(var + EPS) * scale + shift), mean, var


def given(shape, dtype):
    draw = np.random.default_rng(len(shape)).standard_normal
    x = 3 * draw(shape) + 100.0 * (np.arange(shape[-1]) == 1)  # one channel far from zero
    return [jnp.asarray(part, dtype) for part in (x, *draw((3, shape[-1])), draw(shape))]


@jax.jit
def both(x, bias, scale, shift, g):
    """Values and gradients of ours and of the formula."""
    ours = partial(batch_norm.batch_norm_relu, eps=EPS)
    return [
        (value, pull((g, jnp.zeros_like(value[1]), jnp.zeros_like(value[2]))))
        for value, pull in (jax.vjp(f, x, bias, scale, shift) for f in (ours, written_out))
    ]


@pytest.mark.parametrize("shape", [(1, 4, 6, 8, 3), (3, 7, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("slab", [2**21, 200], ids=["one slab", "slabs"])
def test_equals_the_formula(shape, slab, monkeypatch):
    monkeypatch.setattr(batch_norm, "_SLAB_BYTES", slab)
    jax.clear_caches()
    with jax.enable_x64(True):
        (values, gradients), (want, want_gradients) = both(*given(shape, jnp.float64))
    for found, expected in zip(values, want, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)
    for found, expected in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-9)
    assert not gradients[1].any()


def test_large_mean_in_float32():
    """A slab's squares are taken about its own mean, so that a mean of 10^4 deviations does no harm."""
    x = np.random.default_rng(0).standard_normal((40, 50, 2)).astype(np.float32) + np.float32(1e4)
    zero, one = jnp.zeros(2), jnp.ones(2)
    _, mean, var = jax.jit(batch_norm.batch_norm_relu, static_argnums=4)(x, zero, one, zero, EPS)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var((0, 1)), rtol=1e-3)


def test_bfloat16_keeps_statistics_in_float32():
    x, bias, scale, shift, g = given((2, 8, 8, 4), jnp.float32)
    narrow = x.astype(jnp.bfloat16)
    (y, mean, var), pull = jax.vjp(lambda x: batch_norm.batch_norm_relu(x, bias, scale, shift, EPS), narrow)
    want, want_mean, want_var = written_out(narrow.astype(jnp.float32), bias, scale, shift)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert pull((g.astype(y.dtype), mean, var))[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(mean, want_mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(var, want_var, rtol=1e-4)
    np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)
