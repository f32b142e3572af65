"""Presets of fine-tuning are valid, and fit those of pre-training."""

import importlib.util
from pathlib import Path

import pytest

from mambamim_jax.checks import ConfigError
from mambamim_jax.config import parse_command_line, validate
from mambamim_jax.settings import PretrainConfig
from mambamim_jax.settings_finetune import FinetuneConfig

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name):
    source = importlib.util.spec_from_file_location(f"configs_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


PRESETS = ("recipe", "demo", "openkbp", "openkbp_cpu", *load("finetune").SETTINGS)


def parse(source, *arguments, preset="recipe"):
    command = [
        f"--config={CONFIGS}/finetune.py:{preset}",
        "--workdir=unused",
        f"--config.data.source={source}",
    ]
    return parse_command_line([*command, *arguments], FinetuneConfig, "usage")[0]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("encoder", ["hymamba", "vision_mamba"])
def test_presets_are_valid(preset, encoder, tmp_path):
    config = parse(tmp_path, f"--config.model.encoder={encoder}", preset=preset)
    assert config.model.encoder == encoder
    assert preset in load("finetune").get_config.__doc__


@pytest.mark.parametrize(
    ("pretrain", "finetune"),
    [("hymamba_b", "recipe"), ("hymamba_b", "btcv"), ("openkbp", "openkbp"), ("openkbp_cpu", "openkbp_cpu")],
)
def test_encoders_fit_those_of_pretraining(pretrain, finetune, tmp_path):
    before = load("pretrain").get_config(pretrain)
    before.data.source = str(tmp_path)
    before, after = validate(before, PretrainConfig), parse(tmp_path, preset=finetune)
    for name in ("encoder", "hymamba", "vision_mamba"):
        assert getattr(before.model, name) == getattr(after.model, name)
    assert (before.data.spacing, before.data.window) == (after.data.spacing, after.data.window)


def test_the_default_is_the_recipe(tmp_path):
    config = parse(tmp_path)
    assert (config.data.crop, config.data.spacing, config.data.window) == ((96,) * 3, (1.5,) * 3, (-175, 250))
    assert (config.data.crops_per_volume, config.data.positive) == (4, 0.5)
    optim = config.optim
    assert (optim.learning_rate, optim.weight_decay, optim.weight_decay_end) == (1e-4, 1e-5, 1e-5)
    assert optim.warmup * config.epochs == 50
    assert (config.augment.intensity_scale, config.augment.intensity_shift) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--config.data.label_fraction=0", "label_fraction: found 0.0; expected a share above 0"),
        ("--config.data.normalisation=hu", "normalisation: found 'hu'; expected one of auto, window, zscore"),
        ("--config.data.splits=nowhere.json", "splits: found 'nowhere.json'; expected an existing file"),
        ("--config.augment.blur=2", r"blur: found 2.0; expected a probability"),
        ("--config.augment.zoom_range=(1.2,0.8)", "zoom_range: found .* low first"),
        (
            "--config.validation.overlap=-1",
            "overlap: found -1.0; expected a share of the window from 0 to 0.9",
        ),
        (
            "--config.validation.overlap=0.9999",
            "overlap: found 0.9999; expected a share of the window from 0",
        ),
        ("--config.init=nowhere.pth", "init: found 'nowhere.pth'; expected an existing file or folder"),
        ("--config.optim.accumulate=3", "accumulate: found 3; expected a divisor of the batch"),
        ("--config.layer_decay=0", "layer_decay: found 0.0"),
        ("--config.loss.dice=-1", "dice: found -1.0"),
        ("--config.loss.dice=1e999", "dice: found inf .*; expected a finite number"),
        ("--config.augment.noise_std=1e999", "noise_std: found inf .*; expected a finite number"),
    ],
)
def test_wrong_settings_name_the_key(argument, says, tmp_path):
    with pytest.raises(ConfigError, match=says) as caught:
        parse(tmp_path, argument)
    assert "\n" not in str(caught.value)
