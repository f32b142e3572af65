"""Keys of a network's parameters."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from mambamim_jax.model.rngs import Rngs


def draws(kind):
    def some(key):
        rngs = kind(key)
        keys = [rngs.params(), rngs.default(), rngs(), rngs.params()]
        return [jax.random.key_data(key) for key in keys]

    return some


def test_keys_are_those_of_flax():
    key = jax.random.key(7)
    expected = draws(nnx.Rngs)(key)
    assert len({tuple(np.asarray(data)) for data in expected}) == 4
    for found in (draws(Rngs)(key), jax.jit(draws(Rngs))(key), draws(Rngs)(7)):
        np.testing.assert_array_equal(found, expected)
