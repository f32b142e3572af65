"""No hidden voxel reaches a feature or the prediction, for any encoder; and every encoder serves both networks."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambamim_jax.model.encoder import ENCODERS
from mambamim_jax.model.mask import Mask, draw_mask, patch_grid
from mambamim_jax.model.mim import MaskedImageModel
from mambamim_jax.model.rngs import Rngs
from mambamim_jax.model.segmenter import Segmenter
from mambamim_jax.model.vision_mamba import VisionMamba

from .goldens import functional

SMALL = {
    "hymamba": {"channels": (4, 6, 8, 12, 24), "depths": (1, 1, 1, 1), "mamba_depth": 1},
    "vision_mamba": {"channels": (6, 8, 12, 24, 24), "mamba_depth": 4, "feature_depths": (1, 2, 3, 4)},
}
CROP, GRID = (48, 32, 32), (3, 2, 2)


def build(name):
    encoder = ENCODERS[name](**SMALL[name], rngs=Rngs(0))
    return MaskedImageModel(encoder, decoder_width=48, rngs=Rngs(1))


@pytest.mark.parametrize("name", SMALL)
def test_hidden_voxels_reach_nothing(name):
    """Changing every hidden voxel, even to NaN, leaves all features and the prediction as they were, bit for bit."""
    mask = draw_mask(jax.random.key(1), 2, GRID, 0.75)
    image = jax.random.uniform(jax.random.key(2), (2, *CROP, 1))
    hidden = ~mask.upsampled(16)[..., None]
    merge = functional(lambda: build(name))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(build(name))))()

    def run(p, x):
        mim = merge(p)
        return mim.encoder(x, mask), mim(x, mask)

    run = jax.jit(run)
    features, y = run(params, image)
    assert y.shape == image.shape
    strides = [CROP[0] // f.shape[1] for f in features]
    assert strides == [16, 8, 4, 2, 1]
    assert [f.shape[-1] for f in features] == list(merge(params).encoder.channels)
    for other in (jnp.nan, 1e6):
        changed, z = run(params, jnp.where(hidden, other, image))
        for a, b in zip((*features, y), (*changed, z), strict=True):
            np.testing.assert_array_equal(a, b)
    for factor, feature in zip((2, 4, 8, 16), features[1:], strict=True):
        assert not np.any(np.asarray(feature)[~np.asarray(mask.upsampled(factor))])


@pytest.mark.parametrize("name", SMALL)
def test_a_segmenter_over_any_encoder(name):
    shape = (1, *CROP, 1)
    module = lambda: Segmenter(ENCODERS[name](**SMALL[name], rngs=Rngs(0)), classes=5, rngs=Rngs(1))  # noqa: E731
    logits = nnx.eval_shape(lambda: module()(jnp.zeros(shape)))
    assert logits.shape == (*shape[:4], 5)
    assert logits.dtype == jnp.float32


def fitting():
    """Two crops and their mask."""
    return jnp.zeros((2, *CROP, 1)), draw_mask(jax.random.key(1), 2, GRID, 0.75)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "shape", [CROP, (2, *CROP), (0, *CROP, 1), (2, 0, 32, 32, 1), (2, *CROP, 3), (2, 1, *CROP)]
)
def test_crops_of_another_shape_are_refused(name, shape):
    encoder = nnx.eval_shape(lambda: ENCODERS[name](**SMALL[name], rngs=Rngs(0)))
    with pytest.raises(ValueError, match=rf"crop: found {re.escape(str(shape))}, expected \(b, h, w, d, 1\)"):
        encoder(jnp.zeros(shape))


@pytest.mark.parametrize("name", SMALL)
def test_another_mask_is_refused(name):
    """Also one of one sample, or on a grid of as many patches."""
    model, (x, mask) = nnx.eval_shape(lambda: build(name)), fitting()
    turned = draw_mask(jax.random.key(1), 2, (2, 2, 3), 0.75)
    for network in (model.encoder, model):
        for wrong, match in (
            (mask.active, "mask: found ArrayImpl, expected a Mask"),
            (Mask(mask.indices[:1], GRID), r"1 samples on a grid of \(3, 2, 2\), expected 2 on \(3, 2, 2\)"),
            (turned, r"2 samples on a grid of \(2, 2, 3\), expected 2 on \(3, 2, 2\)"),
        ):
            with pytest.raises(ValueError, match=match):
                network(x, wrong)
    with pytest.raises(ValueError, match="mask: found NoneType"):
        model(x, None)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="divisible by 16"):
        patch_grid(jnp.zeros((1, 40, 32, 32, 1)), 16)
    tiny = SMALL["vision_mamba"]
    with pytest.raises(ValueError, match="feature_depths"):
        VisionMamba(channels=tiny["channels"], mamba_depth=4, feature_depths=(1, 2, 3, 5), rngs=Rngs(0))
    with pytest.raises(ValueError, match="expected one of toki"):
        MaskedImageModel(VisionMamba(**SMALL["vision_mamba"], rngs=Rngs(0)), filler="magic", rngs=Rngs(0))
