"""Reading the golden numbers and comparing with them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mambamim_jax.model.encoder import HyMamba
from mambamim_jax.model.rngs import Rngs

GOLDENS = Path(__file__).parents[1] / "goldens"


def read(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a golden file and its `config`."""
    with np.load(GOLDENS / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    return arrays, json.loads(str(arrays.pop("config"))) if "config" in arrays else {}


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, their names without it."""
    return {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}


def encoder_of(config: dict, dtype: DTypeLike = jnp.float32) -> HyMamba:
    """The encoder with a golden file's sizes."""
    return HyMamba(
        channels=config["channels"],
        depths=config["depths"][1:],
        expansion=config["expansion"][1:],
        mamba_depth=config["mamba_depth"],
        dtype=dtype,
        rngs=Rngs(0),
    )


def functional(build):
    """f(params, stats) -> module, for a builder of a module."""
    graph, state = nnx.split(nnx.eval_shape(build))

    def merge(*trees):
        filled = jax.tree.map(lambda leaf: leaf, state)
        for tree in trees:
            nnx.replace_by_pure_dict(filled, tree)
        return nnx.merge(graph, filled)

    return merge


def relative(found, expected) -> float:
    """max |a - b| / max |b|."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert np.all(np.isfinite(found))
    return float(np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-30))


def last(x: np.ndarray) -> jnp.ndarray:
    """PyTorch's (b, c, h, w, d) as (b, h, w, d, c)."""
    return jnp.asarray(np.moveaxis(x, 1, -1))
