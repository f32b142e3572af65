"""Agreement with numbers computed by the released PyTorch code (tests/goldens)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mambamim_jax.convert import from_official, to_official
from mambamim_jax.model.mask import Mask, draw_mask
from mambamim_jax.model.mim import MaskedImageModel
from mambamim_jax.model.segmenter import Segmenter
from mambamim_jax.train.losses import reconstruction_loss

from .goldens import encoder_of, functional, last, part, read, relative

ACTIVATION, GRADIENT = 2e-5, 2e-4

# The released code reads the visible tokens in the order of an unstable argsort, which PyTorch 2.13 on a CPU gives as
# this for the golden mask (METHOD section 9 lists it as a defect: ours is raster order). A mask honours any order.
RELEASED_ORDER = (1, 3, 25, 20, 10, 19, 14)
# Gradients that are zero but for rounding: biases right before a normalisation over the same axis.
ROUNDING = 1e-7
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def build_mim(config: dict, filler: str):
    return lambda: MaskedImageModel(
        encoder_of(config), filler=filler, decoder_width=config["decoder_width"], rngs=nnx.Rngs(0)
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

    (loss, outputs), grads = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=QUICK)(
        weights.params
    )
    return arrays, config, loss, outputs, grads


def assert_gradients(ours: dict, golden: dict, limit: float) -> None:
    """Every gradient within the limit, relative to its largest entry.

    The goldens are float32: a ReLU's or LeakyReLU's input near zero may fall on either side. Measured against our
    network in float64, with which ours in float32 agrees to 1e-6, the golden gradient of `A_interpolation` is 2.7e-4
    off in the released layout; there 2e-4 is beyond the golden's own precision.
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


def test_segmentation():
    """In float64, so that all rounding that is seen is the golden's.

    The network's last LayerNorm is over three channels and ill-conditioned at a few voxels. From there the golden's
    float32 logits are 1.4e-4 off at one voxel and its gradients 3.1e-3 (`decoder1.conv1.bias`), 7e-4 taken together;
    ours in float32 are as far off or nearer, by the order in which a processor adds.
    """
    with jax.enable_x64(True):
        arrays, config = read("segment")
        double = lambda a: jnp.asarray(np.asarray(a), jnp.float64)  # noqa: E731
        weights = jax.tree.map(double, from_official(part(arrays, "weight."), config).params)
        encoder = lambda: encoder_of(config, jnp.float64)  # noqa: E731
        merge = functional(
            lambda: Segmenter(encoder(), classes=config["classes"], dtype=jnp.float64, rngs=nnx.Rngs(0))
        )
        image, cotangent = double(last(arrays["input"])), double(last(arrays["cotangent"]))

        def run(params):
            logits = merge(params)(image)
            return jnp.mean(logits * cotangent), logits

        (_, logits), grads = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=QUICK)(weights)
        assert logits.dtype == jnp.float64
        ours, golden = to_official(grads, None, config), part(arrays, "grad.")
    error = np.abs(np.asarray(logits) - last(arrays["logits"])) / np.abs(arrays["logits"]).max()
    assert np.quantile(error, 0.999) < ACTIVATION
    assert error.max() < 2e-4
    assert len(golden) > 150
    assert_gradients(ours, golden, 4e-3)
    difference = np.concatenate([np.ravel(ours[name] - golden[name]) for name in golden])
    assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(
        np.concatenate([*map(np.ravel, golden.values())])
    )


def test_a_batch_is_its_samples():
    """With different masks in one batch, every sample's features equal those of a batch of one."""
    _, config = read("pretrain_paper")
    merge = functional(lambda: encoder_of(config))
    build = lambda: nnx.to_pure_dict(nnx.state(encoder_of(config), nnx.Param))  # noqa: E731
    params = jax.jit(build, compiler_options=QUICK)()
    image = jax.random.uniform(jax.random.key(1), (3, 48, 48, 48, 1))
    mask = draw_mask(jax.random.key(2), 3, (3, 3, 3), 0.75)
    together = jax.jit(lambda p, x, m: merge(p)(x, m), compiler_options=QUICK)(params, image, mask)
    alone = jax.jit(lambda p, x, m: merge(p)(x, m), compiler_options=QUICK)
    for i in range(3):
        single = alone(params, image[i : i + 1], Mask(mask.indices[i : i + 1], mask.grid))
        for a, b in zip(together, single, strict=True):
            assert relative(a[i : i + 1], b) < 1e-5
    assert len({tuple(np.asarray(row)) for row in mask.indices}) == 3
