"""The exponentials that are written out for CPUs, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambamim_jax.ops.selective_scan import elementary

X = np.concatenate(
    [np.linspace(-87, 87, 20001), np.geomspace(1e-6, 1, 2001), -np.geomspace(1e-6, 1, 2001)]
).astype("f")


def logistic(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("ours", "exact", "rounded"),
    [
        (elementary.exp2, np.exp2, 0),
        # the product with log2(e) is rounded, half a unit in the seventh digit of the exponent
        (elementary.sigmoid, logistic, 1.2e-7),
        (elementary.softplus, lambda x: np.logaddexp(x, 0), 1.2e-7),
    ],
)
def test_values(ours, exact, rounded):
    expected = exact(X.astype(np.float64))
    error = np.abs(np.asarray(jax.jit(ours)(X), np.float64) / expected - 1)
    assert (error <= 3e-7 + rounded * np.abs(X)).all()


def test_limits():
    ends = jnp.array([-jnp.inf, -1000.0, 1000.0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(elementary.exp2(ends)[2:], [np.inf, np.inf, np.nan])
    assert (elementary.exp2(ends)[:2] < 1.2e-38).all()
    np.testing.assert_allclose(elementary.sigmoid(ends), [0, 0, 1, 1, np.nan], atol=1.2e-38)
    np.testing.assert_allclose(elementary.softplus(ends), [0, 0, 1000, np.inf, np.nan], atol=1.2e-38)


@pytest.mark.parametrize(
    ("ours", "exact"),
    [
        (elementary.exp2, np.exp2),
        (elementary.sigmoid, logistic),
        (elementary.softplus, lambda x: np.logaddexp(x, 0)),
    ],
)
def test_other_dtypes_are_left_to_jax(ours, exact):
    with jax.enable_x64(True):
        x = X.astype(np.float64)
        np.testing.assert_allclose(ours(jnp.asarray(x)), exact(x), rtol=1e-12)
