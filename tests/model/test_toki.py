"""TOKI against the released code in float64, against its definition, and its properties."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambamim_jax.model.toki import FILLERS, filler_parameter_shape, toki

from .goldens import read, relative

CASES = ("typical", "dense", "one_kept", "all_kept", "first_last_masked", "long_gap")


def tokens_of(x: np.ndarray) -> np.ndarray:
    """(1, c, g, g, g) to (1, l, c)."""
    return x.reshape(1, x.shape[1], -1).swapaxes(1, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("filler", "key"), [("toki", "tokens"), ("toki_scrambled", "tokens_released_layout")]
)
def test_released_code(case, filler, key):
    """The golden tokens are TOKI's at every place, before active ones keep theirs."""
    arrays, _ = read("toki")
    golden = tokens_of(arrays[f"{case}.{key}"])
    with jax.enable_x64(True):
        x, A = jnp.asarray(tokens_of(arrays[f"{case}.features"])), jnp.asarray(arrays[f"{case}.A"])
        active = arrays[f"{case}.active"][None]
        found = np.asarray(FILLERS[filler](x, jnp.asarray(active), A))
    expected = np.where(active[..., None], tokens_of(arrays[f"{case}.features"]), golden)
    assert relative(found, expected) < 1e-10


def by_definition(x, active, A, paper=False):
    """METHOD section 4, token by token."""
    length = len(x)
    anchors = sorted({0, length - 1} | set(np.flatnonzero(active).tolist()))
    z = np.zeros_like(x)
    for p, q in itertools.pairwise(anchors):
        r = q - p
        step = (r + 1) if paper else max(r - 1, 1)
        V = [(1 - j / step) * x[p] + j / step * x[q] for j in range(r)]
        for j in range(r):
            powers = [(j - s) if paper else (r - 1 - s) for s in range(j + 1)]
            z[p + j] = sum(np.linalg.matrix_power(A, n) @ V[s] for s, n in enumerate(powers))
    z[length - 1] = A @ x[-1]
    return np.where(active[:, None], x, z)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([8, 27]), st.floats(0.1, 0.9), st.booleans())
def test_definition(seed, length, density, paper):
    draw = np.random.default_rng(seed)
    x, A = draw.standard_normal((2, length, 6)), 0.3 * draw.standard_normal((6, 6))
    active = draw.random((2, length)) < density
    with jax.enable_x64(True):
        found = np.asarray(FILLERS["toki_paper" if paper else "toki"](*map(jnp.asarray, (x, active, A))))
    for i in range(2):
        expected = by_definition(x[i], active[i], A, paper)
        places = length - 1 if paper else length  # the paper's formula says nothing of the last token
        np.testing.assert_allclose(found[i][:places], expected[:places], rtol=1e-9, atol=1e-10)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(sorted(FILLERS)))
def test_active_tokens_are_left_alone(seed, name):
    draw = np.random.default_rng(seed)
    x = jnp.asarray(draw.standard_normal((2, 27, 6)), jnp.float32)
    active = jnp.asarray(draw.random((2, 27)) < 0.4)
    shape = filler_parameter_shape(name, 6)
    parameter = None if shape is None else jnp.asarray(draw.standard_normal(shape), jnp.float32)
    filled = FILLERS[name](x, active, parameter)
    np.testing.assert_array_equal(np.asarray(filled)[np.asarray(active)], np.asarray(x)[np.asarray(active)])


def test_linear_interpolates_between_anchors():
    x = jnp.zeros((1, 5, 6)).at[0, 4].set(4.0)
    active = jnp.asarray([[True, False, False, False, True]])
    np.testing.assert_allclose(FILLERS["linear"](x, active, None)[0, :, 0], np.arange(5.0), rtol=1e-6)


def test_powers_that_overflow_leave_gradients_finite():
    x, A = jnp.ones((1, 216, 6)), 1e3 * jnp.eye(6)
    active = (jnp.arange(216) % 3 == 0)[None]
    value, grad = jax.value_and_grad(lambda a: jnp.sum(toki(x, active, a)))(A)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(grad))
