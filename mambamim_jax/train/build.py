"""Settings → networks, and networks ↔ plain dicts."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from mambamim_jax.checks import ConfigError
from mambamim_jax.model.encoder import ENCODERS, Encoder
from mambamim_jax.model.mim import MaskedImageModel
from mambamim_jax.model.segmenter import Segmenter
from mambamim_jax.ops.selective_scan.api import refusal
from mambamim_jax.settings_finetune import SegmenterConfig
from mambamim_jax.settings_model import EncoderConfig, ModelConfig
from mambamim_jax.types import Tree


def build_encoder(config: EncoderConfig, rngs: nnx.Rngs, in_channels: int = 1) -> Encoder:
    """The encoder that the settings name."""
    own = getattr(config, config.encoder)
    options = {name: getattr(own, name) for name in own.__dataclass_fields__}
    options |= {"in_channels": in_channels, "scan": config.scan, "dtype": jnp.dtype(config.dtype)}
    return cast(Encoder, ENCODERS[config.encoder](rngs=rngs, **options))  # type: ignore[call-arg]


def check_scan(config: EncoderConfig) -> None:
    """Raises ConfigError for a scan that the default device cannot run."""
    if reason := refusal(config.scan):
        expected = "one that this device can run, such as auto"
        raise ConfigError(
            "config.model.scan", f"found {config.scan!r}, which does not run here ({reason})", expected
        )


def build_mim(config: ModelConfig, rngs: nnx.Rngs) -> MaskedImageModel:
    """The pre-training network."""
    return MaskedImageModel(
        build_encoder(config, rngs),
        filler=config.filler,
        decoder_width=config.decoder_width,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def build_segmenter(
    config: SegmenterConfig, classes: int, rngs: nnx.Rngs, in_channels: int = 1, *, deep: bool | None = None
) -> Segmenter:
    """The fine-tuning network; ``deep`` in place of the settings' deep supervision."""
    return Segmenter(
        build_encoder(config, rngs, in_channels),
        classes=classes,
        head_width=config.head_width or None,
        deep_supervision=config.deep_supervision if deep is None else deep,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def to_dicts(module: nnx.Module) -> tuple[Tree, Tree]:
    """A module's parameters and batch statistics as plain nested dicts."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param)), batch_stats(module)


def batch_stats(module: nnx.Module) -> Tree:
    """A module's batch statistics as a plain nested dict."""
    return nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))


def count(params: Tree) -> int:
    """Scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
