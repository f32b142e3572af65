"""Presets of fine-tuning; the keys and the recipe's values are in ``mambamim_jax/settings_finetune.py``."""

from mambamim_jax.config import ConfigDict, defaults, unknown_preset
from mambamim_jax.settings import PHANTOMS
from mambamim_jax.settings_finetune import FinetuneConfig


def get_config(preset: str = "recipe") -> ConfigDict:
    """Segmentation over an encoder."""
    config = defaults(FinetuneConfig)
    if preset == "demo":
        config.data.source = PHANTOMS
        config.data.phantoms = 8
        config.data.crop, config.data.spacing = (48, 48, 48), (4.0, 4.0, 4.0)
        config.data.crops_per_volume, config.data.volumes_per_batch = 1, 2
        config.epochs, config.steps = 0, 60
        small(config)
        config.optim.learning_rate, config.optim.warmup = 2e-3, 0.1
        config.log.panel_every = config.checkpoint.every = 30
        config.validation.every = 30
    elif preset != "recipe":
        raise unknown_preset(preset, ("demo", "recipe"))
    return config


def small(config: ConfigDict) -> None:
    """Widths that two CPU cores can train, those of configs/pretrain.py:demo."""
    config.model.hymamba.channels = (8, 16, 24, 32, 48)
    config.model.hymamba.depths = (1, 1, 1, 1)
    config.model.hymamba.mamba_depth = 2
    config.model.hymamba.state = 8
