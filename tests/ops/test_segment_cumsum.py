"""Running sums of segments against one sum per token, and their gradient, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambamim_jax.ops.segment_cumsum import segment_cumsum


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_equals_sums(length):
    draw = np.random.default_rng(length)
    place = np.arange(length)
    with jax.enable_x64(True):
        both = jax.jit(lambda x, offset, g: (segment_cumsum(x, offset), _transposed(x, offset, g)))
        for density in (0.0, 0.1, 0.6):
            starts = draw.random((3, length)) < density
            starts[:, 0] = True
            begin = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
            # whether token s is in the sum of token t
            member = (begin[:, :, None] <= place) & (place <= place[:, None])
            x, g = draw.standard_normal((2, 3, length, 5))
            y, gradient = both(jnp.asarray(x), jnp.asarray(place - begin, jnp.int32), jnp.asarray(g))
            np.testing.assert_allclose(y, np.einsum("bts,bsc->btc", member, x), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(gradient, np.einsum("bts,btc->bsc", member, g), rtol=1e-12, atol=1e-12)


def _transposed(x, offset, g):
    return jax.vjp(lambda x: segment_cumsum(x, offset), x)[1](g)[0]
