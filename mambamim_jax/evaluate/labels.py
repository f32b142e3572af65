"""From logits to label maps: softmax over labels, or one sigmoid per region where regions overlap (BraTS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from mambamim_jax.types import Array, NumpyArray

Regions: TypeAlias = Sequence[Mapping[str, Any]] | None
"""``regions`` of a model's description, see ``model_files.save_model``."""


def probabilities(logits: Array, regions: Regions = None) -> Array:
    """(..., classes): of each label, or of each region."""
    return jax.nn.sigmoid(logits) if regions else jax.nn.softmax(logits, axis=-1)


def decide(probability: NumpyArray, regions: Regions = None) -> NumpyArray:
    """Label values (...,) of probabilities (..., classes): uint8, or uint16 where that is too small.

    The likeliest label; with regions, what is written last by a region of probability 0.5 or more, else 0.
    """
    dtype = label_dtype(probability.shape[-1], regions)
    if not regions:
        return probability.argmax(-1).astype(dtype)
    values: NumpyArray = np.zeros(probability.shape[:-1], dtype)
    for channel, region in enumerate(regions):
        values[probability[..., channel] >= 0.5] = region["writes"]
    return values


def label_dtype(classes: int, regions: Regions = None) -> type:
    """The smallest type that holds every label and leaves its highest value free."""
    highest = max((region["writes"] for region in regions), default=0) if regions else classes - 1
    return np.uint8 if highest < 255 else np.uint16
