"""Masks: exactly k per sample, the same places at every scale; patches and maps invert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambamim_jax.model.mask import Mask, draw_mask, kept_tokens, patchify, unpatchify
from mambamim_jax.model.packed import pack, unpack

grids = st.tuples(*[st.integers(1, 4)] * 3).filter(lambda grid: np.prod(grid) > 3)
seeds = st.integers(0, 2**31 - 1)


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(1, 3), grids, st.floats(0.3, 0.7))
def test_exactly_k_active_in_raster_order(seed, batch, grid, ratio):
    mask = draw_mask(jax.random.key(seed), batch, grid, ratio)
    k = kept_tokens(grid, ratio)
    assert k == round(np.prod(grid) * (1 - ratio))
    assert np.asarray(mask.active).sum(axis=(1, 2, 3)).tolist() == [k] * batch
    assert np.all(np.diff(np.asarray(mask.indices), axis=1) > 0)
    again = Mask.from_active(mask.active)
    np.testing.assert_array_equal(again.indices, mask.indices)


@settings(max_examples=8, deadline=None)
@given(seeds, grids, st.sampled_from([2, 4, 8, 16]))
def test_every_scale_hides_the_same_places(seed, grid, factor):
    mask = draw_mask(jax.random.key(seed), 1, grid, 0.5)
    fine = np.asarray(mask.upsampled(factor))[0]
    for place in np.ndindex(*grid):
        block = fine[tuple(slice(i * factor, (i + 1) * factor) for i in place)]
        assert np.all(block == np.asarray(mask.active)[0][place])


@settings(max_examples=8, deadline=None)
@given(seeds, grids, st.integers(1, 3), st.integers(1, 3))
def test_patchify_and_pack_invert(seed, grid, patch, channels):
    shape = (2, *(side * patch for side in grid), channels)
    x = jax.random.normal(jax.random.key(seed), shape)
    tokens = patchify(x, patch)
    np.testing.assert_array_equal(unpatchify(tokens, grid, patch), x)
    np.testing.assert_array_equal(tokens[0, 0], x[0, :patch, :patch, :patch].reshape(-1))
    mask = draw_mask(jax.random.key(seed), 2, grid, 0.5)
    visible = x * mask.upsampled(patch)[..., None]
    np.testing.assert_array_equal(unpack(pack(x, mask), mask), visible)


def test_bad_masks_are_refused():
    with pytest.raises(ValueError, match="keeps 0 of 8"):
        kept_tokens((2, 2, 2), 0.99)
    with pytest.raises(ValueError, match="one equal number"):
        Mask.from_active(jnp.asarray([[[[True, False]]], [[[True, True]]]]))
    for shape in ((2, 2, 2), (0, 2, 2, 2), (1, 2, 0, 2)):
        with pytest.raises(ValueError, match=r"active: found .*, expected \(b, gh, gw, gd\)"):
            Mask.from_active(np.ones(shape, bool))


@pytest.mark.parametrize(
    "visible", [[[[[False, True]]], [[[True, False]]]], np.array([[[[0, 2]]], [[[1, 0]]]])]
)
def test_a_mask_of_a_list_or_of_numbers(visible):
    mask = Mask.from_active(visible)
    assert (mask.indices.tolist(), mask.grid) == ([[1], [0]], (1, 1, 2))
