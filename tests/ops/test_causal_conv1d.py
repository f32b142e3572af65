"""The causal depthwise convolution against a direct sum in NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambamim_jax.ops.causal_conv1d import causal_conv1d


@pytest.mark.parametrize("length", [1, 3, 9, 37])
@pytest.mark.parametrize("silu", [False, True])
def test_equals_a_direct_sum(length, silu):
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.standard_normal((2, length, 5)), rng.standard_normal((4, 5)), rng.standard_normal(5)
    want = np.broadcast_to(bias, x.shape).copy()
    for t in range(length):
        for i in range(4):
            if t - 3 + i >= 0:
                want[:, t] += kernel[i] * x[:, t - 3 + i]
    if silu:
        want = want / (1 + np.exp(-want))
    found = causal_conv1d(*(jnp.asarray(a, jnp.float32) for a in (x, kernel, bias)), silu=silu)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 9, 37])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_those_of_the_direct_sum(length, silu, with_bias):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 2, length, 5))
    kernel, bias = rng.standard_normal((4, 5)), rng.standard_normal(5) if with_bias else None

    def direct(x, kernel, bias):
        rows = [
            sum((kernel[i] * x[:, t - 3 + i] for i in range(4) if t - 3 + i >= 0), jnp.zeros_like(x[:, 0]))
            for t in range(length)
        ]
        out = jnp.stack(rows, axis=1) + (0 if bias is None else bias)
        return out * jax.nn.sigmoid(out) if silu else out

    with jax.enable_x64(True):
        want = jax.vjp(direct, x, kernel, bias)[1](jnp.asarray(g))
    single = (None if a is None else jnp.asarray(a, jnp.float32) for a in (x, kernel, bias))
    found = jax.vjp(functools.partial(causal_conv1d, silu=silu), *single)[1](jnp.asarray(g, jnp.float32))
    assert [a is None for a in found] == [a is None for a in want]
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        np.testing.assert_allclose(f, w, rtol=1e-5, atol=1e-5)


def test_keeps_the_dtype():
    out = causal_conv1d(jnp.ones((1, 5, 3), jnp.bfloat16), jnp.ones((4, 3)), None)
    assert out.dtype == jnp.bfloat16
    arrays = jnp.ones((1, 5, 3), jnp.bfloat16), jnp.ones((4, 3)), jnp.ones(3)
    gradients = jax.vjp(causal_conv1d, *arrays)[1](arrays[0])
    assert [g.dtype for g in gradients] == [a.dtype for a in arrays]


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="expected"):
        causal_conv1d(jnp.ones((1, 5, 3)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"found bias \(2,\)"):
        causal_conv1d(jnp.ones((1, 5, 3)), jnp.ones((4, 3)), jnp.ones(2))
