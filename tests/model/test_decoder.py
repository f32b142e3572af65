"""How the decoder's weights start."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import stats

from mambamim_jax.model.decoder import truncated_normal

SIZE = 2**18


def test_a_far_bound_cuts_nothing_and_is_not_drawn():
    """The key is one whose uniform numbers hold -1 itself, the distribution function of a far bound."""
    key = jax.random.key(7)
    assert jax.random.uniform(key, (SIZE,), minval=-1.0, maxval=1.0).min() == -1.0
    found = np.asarray(truncated_normal(key, (SIZE,), 0.02, 2.0))
    assert found.dtype == np.float32
    assert np.abs(found).max() < 8 * 0.02
    assert found.std() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("bound", [0.01, 0.02, 0.05])
def test_a_near_bound_cuts(bound):
    found = np.asarray(truncated_normal(jax.random.key(7), (SIZE,), 0.02, bound))
    assert 0.99 * bound < np.abs(found).max() <= bound
    assert found.std() == pytest.approx(0.02 * stats.truncnorm(-bound / 0.02, bound / 0.02).std(), rel=0.01)
