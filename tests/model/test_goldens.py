"""Agreement with numbers computed by the released PyTorch code (tests/goldens)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike

from mambamim_jax.convert import from_official, to_official
from mambamim_jax.model.mask import Mask, draw_mask
from mambamim_jax.model.mim import MaskedImageModel
from mambamim_jax.model.rngs import Rngs
from mambamim_jax.model.segmenter import Segmenter
from mambamim_jax.train.losses import reconstruction_loss

from .goldens import encoder_of, functional, last, part, read, relative

ACTIVATION, GRADIENT = 2e-5, 2e-4

# The released code reads the visible tokens in the order of an unstable argsort, which PyTorch 2.13 on a CPU gives as
# this for the golden mask (METHOD section 9 lists it as a defect: ours is raster order). A mask honours any order.
RELEASED_ORDER = (1, 3, 25, 20, 10, 19, 14)
# Gradients that are zero but for rounding: biases right before a normalisation over the same axis.
ROUNDING = 1e-7


def build_mim(config: dict, filler: str, dtype: DTypeLike = jnp.float32):
    return lambda: MaskedImageModel(
        encoder_of(config, dtype),
        filler=filler,
        decoder_width=config["decoder_width"],
        dtype=dtype,
        rngs=Rngs(0),
    )


@pytest.fixture(scope="module", params=[("pretrain_paper", "toki"), ("pretrain_released", "toki_scrambled")])
def pretrain(request):
    """Golden arrays and our loss, activations, gradients and running statistics for the same weights and mask."""
    arrays, config = read(request.param[0])
    weights = from_official(part(arrays, "weight."), config)
    merge = functional(build_mim(config, request.param[1]))
    image, raster = last(arrays["input"]), Mask.from_active(arrays["active"][:, 0])
    mask = Mask(jnp.asarray([RELEASED_ORDER], jnp.int32), raster.grid)
    assert sorted(RELEASED_ORDER) == raster.indices[0].tolist()

    def run(params):
        mim = merge(params, weights.batch_stats)
        features = mim.encoder(image, mask)
        filled = mim.fill(features[0], mask)
        y = mim(image, mask)
        stats = nnx.to_pure_dict(nnx.state(mim, nnx.BatchStat))
        return reconstruction_loss(y, image, mask), (features, filled, y, stats)

    (loss, outputs), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(weights.params)
    return arrays, config, loss, outputs, grads


def assert_gradients(ours: dict, golden: dict, limit: float) -> None:
    """Every gradient within the limit, relative to its largest entry.

    The float32 goldens of the released layout are up to 6.6e-4 off the released code's own gradients in float64, so
    they get a wider limit, and `test_gradients_in_double` the narrow one.
    """
    for name, expected in golden.items():
        if np.max(np.abs(expected)) < ROUNDING:
            assert np.max(np.abs(ours[name])) < ROUNDING, name
        else:
            assert relative(ours[name], expected) < limit, name


def test_activations_and_loss(pretrain):
    arrays, _, loss, (features, filled, y, _), _ = pretrain
    assert relative(loss, arrays["loss"]) < ACTIVATION
    for scale in (1, 2, 3):
        assert relative(features[4 - scale], last(arrays[f"act.embeddings.{scale}"])) < ACTIVATION, scale
    assert relative(features[0], last(arrays["act.mamba_out"])) < ACTIVATION
    hidden = ~arrays["active"][:, 0]  # the golden holds the interpolation before active tokens keep theirs
    assert relative(np.asarray(filled)[hidden], last(arrays["act.toki"])[hidden]) < ACTIVATION
    assert relative(y, last(arrays["act.reconstruction"])) < ACTIVATION


def test_gradients(pretrain):
    arrays, config, _, (*_, stats), grads = pretrain
    ours, golden = to_official(grads, stats, config), part(arrays, "grad.")
    dead = set(config["dead_parameters"])
    assert len(golden) > 150
    limit = GRADIENT if config["toki"] == "paper" else 1e-3
    assert_gradients(ours, {name: a for name, a in golden.items() if name not in dead}, limit)


def test_running_statistics(pretrain):
    arrays, config, _, (*_, stats), grads = pretrain
    ours, golden = to_official(grads, stats, config), part(arrays, "bn_after.")
    assert golden
    for name, expected in golden.items():
        if "fuse.0." not in name and "num_batches" not in name:
            assert relative(ours[name], expected) < ACTIVATION, name


@pytest.mark.parametrize("name", ["segment", "pretrain_released"])
def test_gradients_in_double(name):
    """Both sides in float64 (tests/model/double.py), where the golden's float32 gradients are up to 3e-3 off."""
    golden = read(f"{name}_double")[0]
    with jax.enable_x64(True):
        arrays, config = read(name)
        double = lambda a: jnp.asarray(np.asarray(a), jnp.float64)  # noqa: E731
        weights = from_official(part(arrays, "weight."), config)
        params, batch_stats = jax.tree.map(double, (weights.params, weights.batch_stats))
        image, encoder = double(last(arrays["input"])), lambda: encoder_of(config, jnp.float64)
        if name == "segment":
            ours = lambda: Segmenter(  # noqa: E731
                encoder(), classes=config["classes"], dtype=jnp.float64, rngs=Rngs(0)
            )
            cotangent = double(last(arrays["cotangent"]))
            value = lambda network: jnp.mean(network(image) * cotangent)  # noqa: E731
        else:
            mask = Mask(jnp.asarray([RELEASED_ORDER], jnp.int32), (3, 3, 3))
            ours = build_mim(config, "toki_scrambled", jnp.float64)
            value = lambda network: reconstruction_loss(network(image, mask), image, mask)  # noqa: E731
        merge = functional(ours)

        def run(params):
            network = merge(params, batch_stats)
            return value(network), nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

        (found, stats), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
        assert found.dtype == jnp.float64
        assert relative(found, golden.pop("value")) < 1e-6
        assert len(golden) > 150
        assert_gradients(to_official(grads, stats, config), part(golden, "grad."), 2e-5)


def test_segmentation():
    arrays, config = read("segment")
    weights = from_official(part(arrays, "weight."), config)
    merge = functional(lambda: Segmenter(encoder_of(config), classes=config["classes"], rngs=Rngs(0)))
    run = jax.jit(lambda params: merge(params)(last(arrays["input"])))
    error = np.abs(np.asarray(run(weights.params)) - last(arrays["logits"])) / np.abs(arrays["logits"]).max()
    # The last LayerNorm is over three channels, so some voxels are ill-conditioned: in float64 our network differs
    # from the golden float32 logits by 1.4e-4 at one voxel, which is the golden's own rounding there.
    assert np.quantile(error, 0.999) < ACTIVATION
    assert error.max() < 4e-4


def test_a_batch_is_its_samples():
    """With different masks in one batch, every sample's features equal those of a batch of one."""
    _, config = read("pretrain_paper")
    merge = functional(lambda: encoder_of(config))
    build = lambda: nnx.to_pure_dict(nnx.state(encoder_of(config), nnx.Param))  # noqa: E731
    params = jax.jit(build)()
    image = jax.random.uniform(jax.random.key(1), (3, 48, 48, 48, 1))
    mask = draw_mask(jax.random.key(2), 3, (3, 3, 3), 0.75)
    together = jax.jit(lambda p, x, m: merge(p)(x, m))(params, image, mask)
    alone = jax.jit(lambda p, x, m: merge(p)(x, m))
    for i in range(3):
        single = alone(params, image[i : i + 1], Mask(mask.indices[i : i + 1], mask.grid))
        for a, b in zip(together, single, strict=True):
            assert relative(a[i : i + 1], b) < 1e-5
    assert len({tuple(np.asarray(row)) for row in mask.indices}) == 3
