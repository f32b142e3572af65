"""What fine-tuning starts from: official weights and ours, with a report; and the rates of its layers."""

import numpy as np
import pytest
from flax import nnx

from mambamim_jax.checks import ConfigError
from mambamim_jax.convert import flatten, from_official
from mambamim_jax.model.rngs import Rngs
from mambamim_jax.settings_finetune import SegmenterConfig
from mambamim_jax.settings_model import HyMambaConfig, VisionMambaConfig
from mambamim_jax.train.build import build_segmenter, to_dicts
from mambamim_jax.train.finetune import layer_scales
from mambamim_jax.train.optim import AdamW, paths
from mambamim_jax.train.weights import load_start
from mambamim_jax.weight_files import write_arrays
from tests.model.goldens import part, read

SIZES = {"channels": (3, 6, 8, 12, 24), "depths": (2, 2, 2, 1), "expansion": (2, 4, 4, 4), "mamba_depth": 2}
CONFIG = SegmenterConfig(hymamba=HyMambaConfig(**SIZES))


def shapes_of(config, classes=3, channels=1):
    built = nnx.eval_shape(lambda: build_segmenter(config, classes, Rngs(0), channels))
    return {name: leaf.shape for name, leaf in paths(to_dicts(built)[0]).items()}


def official(name):
    return part(read(name)[0], "weight.")


@pytest.fixture
def pretrained(tmp_path):
    write_arrays(tmp_path / "pretrained.npz", official("pretrain_paper"))
    return tmp_path / "pretrained.npz"


def test_an_official_pretraining_checkpoint_gives_its_encoder(pretrained):
    loaded, report = load_start(pretrained, shapes_of(CONFIG))
    expected = flatten(from_official(official("pretrain_paper")).params["encoder"])
    assert sorted(loaded) == sorted(f"encoder/{name}" for name in expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[f"encoder/{name}"], value)
    assert (report.missing, report.unexpected, report.wrong_shape) == ([], [], {})
    assert sorted(report.matched) == sorted(loaded)
    assert {name.split("/")[0] for name in report.new} == {"ups", "head", "classify"}
    assert "starting from the pre-training network in" in str(report)


def test_an_official_encoder_alone(tmp_path, pretrained):
    prefix = "sparse_encoder."
    alone = {n.removeprefix(prefix): a for n, a in official("pretrain_paper").items() if n.startswith(prefix)}
    write_arrays(tmp_path / "encoder.npz", alone)
    loaded, report = load_start(tmp_path / "encoder.npz", shapes_of(CONFIG))
    whole, _ = load_start(pretrained, shapes_of(CONFIG))
    assert report.kind == "encoder"
    assert loaded.keys() == whole.keys()
    assert all((loaded[name] == whole[name]).all() for name in loaded)


def test_an_official_segmentation_network_gives_everything(tmp_path):
    write_arrays(tmp_path / "segment.npz", official("segment"))
    loaded, report = load_start(tmp_path / "segment.npz", shapes_of(CONFIG))
    assert sorted(loaded) == sorted(shapes_of(CONFIG))
    assert report.new == []
    _, report = load_start(
        tmp_path / "segment.npz", shapes_of(SegmenterConfig(hymamba=CONFIG.hymamba, deep_supervision=True))
    )
    assert {name.split("/")[0] for name in report.new} == {"aux"}


def test_official_pth_files(tmp_path):
    torch = pytest.importorskip("torch")
    weights = {name: torch.from_numpy(np.array(a)) for name, a in official("pretrain_paper").items()}
    torch.save({"module": weights}, tmp_path / "pretrained.pth")
    assert load_start(tmp_path / "pretrained.pth", shapes_of(CONFIG))[1].problem == ""


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"mamba_depth": 3}, {}, r"\d+ missing \(first encoder/mamba/layers/2/"),
        ({"mamba_depth": 1}, {}, r"\d+ unexpected \(first encoder/mamba/layers/1/"),
        ({"channels": (3, 6, 8, 12, 30)}, {}, r"of another shape \(first encoder/expand/3/bias: \(24,\)"),
        ({}, {"channels": 4}, r"1 of another shape \(first encoder/stem/kernel"),
    ],
)
def test_another_architecture_is_refused_in_one_line(pretrained, changes, options, says):
    shapes = shapes_of(SegmenterConfig(hymamba=HyMambaConfig(**{**SIZES, **changes})), **options)
    with pytest.raises(ConfigError, match=says) as caught:
        load_start(pretrained, shapes)
    assert "\n" not in str(caught.value)
    assert "config.init_partial=true" in str(caught.value)
    loaded, report = load_start(pretrained, shapes, partial=True)
    assert report.problem
    assert loaded
    assert all(loaded[name].shape == shapes[name] for name in loaded)


def test_another_encoder_and_other_files_are_refused(pretrained, tmp_path):
    small = VisionMambaConfig(channels=(4, 4, 4, 6, 6), mamba_depth=4, feature_depths=(1, 2, 3, 4))
    vision = SegmenterConfig("vision_mamba", vision_mamba=small)
    with pytest.raises(ConfigError, match="missing"):
        load_start(pretrained, shapes_of(vision))
    write_arrays(tmp_path / "other.npz", {"some": np.zeros(3, np.float32)})
    with pytest.raises(ConfigError, match=r"config\.init: official"):
        load_start(tmp_path / "other.npz", shapes_of(CONFIG))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="found no checkpoints in it"):
        load_start(tmp_path / "empty", shapes_of(CONFIG))


@pytest.mark.parametrize("encoder", ["hymamba", "vision_mamba"])
def test_rates_fall_layer_by_layer_and_every_layer_has_one(encoder):
    config = SegmenterConfig(encoder, hymamba=CONFIG.hymamba)
    adamw = AdamW(scales=layer_scales(config, 0.5))
    scale = {name: adamw.scale(name) for name in shapes_of(config)}
    first = "encoder/stem" if encoder == "hymamba" else "encoder/embed"
    layers = 2 + 5 if encoder == "hymamba" else 12 + 1
    for name, found in scale.items():
        if not name.startswith("encoder/"):
            assert found == 1
        elif name != "encoder/mamba/mask_token":
            assert found < 1, name
        if name.startswith(first):
            assert found == 0.5**layers
    assert scale[f"encoder/mamba/layers/{layers - 6 if encoder == 'hymamba' else 11}/fc1/bias"] == 0.5
    assert layer_scales(config, 1.0) == ()
