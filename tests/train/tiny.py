"""A stand-in for a model: one linear layer with BatchNorm on masked voxels, seconds to compile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambamim_jax.model.rngs import Rngs
from mambamim_jax.train.step import Task

FEATURES = 6


class Tiny(nnx.Module):
    """(b, 6) → (b, 1)."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(FEATURES, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.unused = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.norm(self.layers[0](x))))


def tiny_task(noise: float = 0.1) -> Task:
    """Regression of the features' sum, with noise drawn from the step's key."""

    def init(key):
        module = Tiny(Rngs(key))
        params, stats = nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    graph, *_ = nnx.split(nnx.eval_shape(lambda: Tiny(Rngs(0))), nnx.Param, nnx.BatchStat)

    def loss(params, stats, batch, key):
        module = nnx.merge(graph, params, stats)
        error = module(batch["image"])[:, 0] - jnp.sum(batch["image"], axis=1) - batch["noise"]
        return jnp.mean(error**2), nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    def prepare(batch, key):
        shape = batch["image"].shape[:1]
        return batch | {"noise": noise * jax.random.normal(key, shape)}

    return Task("tiny", init, loss, prepare, unused_parameters=("unused",))


def tiny_batch(index: int, size: int = 64) -> dict[str, np.ndarray]:
    """A batch that is a function of its index."""
    rng = np.random.default_rng(index)
    return {"image": rng.normal(size=(size, FEATURES)).astype(np.float32)}
