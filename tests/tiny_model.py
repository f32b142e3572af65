"""The smallest segmentation network, and the description of its model folder."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from mambamim_jax.model_files import abstract_network

SMALL = {
    "channels": (4, 6, 4, 4, 6),
    "depths": (1, 1, 1, 1),
    "expansion": (1, 1, 1, 1),
    "mamba_depth": 1,
    "state": 2,
}


def describe(**changes: Any) -> dict[str, Any]:
    """A description of three classes on CT, for ``save_model``."""
    description = {
        "task": "segment",
        "encoder": "hymamba",
        "encoder_config": SMALL,
        "in_channels": 1,
        "channel_names": ["CT"],
        "normalisation": [{"kind": "window", "low": -175.0, "high": 250.0}],
        "spacing": (3.0, 3.0, 3.0),
        "crop": (32, 32, 32),
        "classes": 3,
        "head_width": 4,
        "labels": {"0": "background", "1": "body", "2": "lungs"},
    }
    return description | changes


def random_params(description: dict[str, Any], seed: int = 4, stats: bool = False) -> dict[str, Any]:
    """Random parameters (or batch statistics) of the network described, without compiling anything.

    Seed 4 gives several labels on intensities in [0, 1].
    """
    network = abstract_network(description)
    tree = nnx.to_pure_dict(nnx.state(network, nnx.BatchStat if stats else nnx.Param))
    draw = np.random.default_rng(seed)

    def leaf(path: Any, like: Any) -> np.ndarray:
        numbers = draw.standard_normal(like.shape, np.float32) * 0.7
        return np.abs(numbers) + 0.5 if jax.tree_util.keystr(path[-1:], simple=True) == "var" else numbers

    return jax.tree_util.tree_map_with_path(leaf, tree)
