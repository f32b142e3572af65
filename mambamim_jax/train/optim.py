"""Learning-rate and weight-decay schedule, gradient clipping and AdamW as the released recipe has them.

The schedule is computed in float64 on the host, once, and enters the step as a table (steps, 2), so that no
rounding of the device reaches it and no step needs a transfer. Optimiser states are plain dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mambamim_jax.settings import OptimConfig
from mambamim_jax.types import Array, NumpyArray, Tree

CLIP_EPSILON = 1e-6
WARMUP_START = 0.005
COSINE_END = 0.001


@dataclass(frozen=True)
class Schedule:
    """Warm-up from 0.5% of the peak, cosine to 0.1%; weight decay by a cosine over the whole run.

    Attributes:
      peak: the highest learning rate.
      warmup: steps of warm-up.
      steps: steps of the run.
      weight_decay, weight_decay_end: at the first and the last step.
    """

    peak: float
    warmup: int
    steps: int
    weight_decay: float
    weight_decay_end: float

    def table(self) -> NumpyArray:
        """(steps, 2) float64: learning rate and weight decay of each step."""
        step = np.arange(self.steps, dtype=np.float64)
        rising = self.peak * WARMUP_START + (1 - WARMUP_START) * self.peak * step / max(self.warmup, 1)
        share = (step - self.warmup) / max(self.steps - 1 - self.warmup, 1)
        falling = self.peak * COSINE_END + (1 - COSINE_END) * self.peak * _half_cosine(share)
        decay_range = self.weight_decay - self.weight_decay_end
        decay = self.weight_decay_end + decay_range * _half_cosine(step / max(self.steps - 1, 1))
        return np.stack([np.where(step < self.warmup, rising, falling), decay], axis=1)


def _half_cosine(share: NumpyArray) -> NumpyArray:
    """1 at share 0, 0 at share 1."""
    return 0.5 + 0.5 * np.cos(np.pi * share)


@dataclass(frozen=True)
class AdamW:
    """AdamW in PyTorch's sense: decay times the learning rate on every parameter, biases and norms too.

    Attributes:
      betas, eps: Adam's.
      clip_norm: gradients are scaled to at most this global norm beforehand.
      untrained: path prefixes ("encoder/skips/0") of parameters that the task never reaches: they get no
        moments and no decay.
      scales: (path prefix, factor) pairs: the learning rate of what lies below is multiplied by the factor of
        the first that fits. Decay stays proportional to the learning rate.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 5.0
    untrained: tuple[str, ...] = ()
    scales: tuple[tuple[str, float], ...] = ()

    def init(self, params: Tree) -> dict[str, Any]:
        """The optimiser's state: {"count", "mu", "nu"}, moments by path for the trained parameters."""
        return self._adam.init(self.trained(params))._asdict()

    def trained(self, params: Tree) -> dict[str, Array]:
        """{path: array} of the parameters (or gradients) that are optimised."""
        return {path: leaf for path, leaf in paths(params).items() if not under(path, self.untrained)}

    def update(
        self, grads: Tree, state: Tree, params: Tree, learning_rate: Array, decay: Array
    ) -> tuple[Tree, dict[str, Any], Array]:
        """One update.

        Returns:
          The new parameters, the new state, and the squared norm of each trained gradient before
          clipping, in the order of ``trained``: the non-finite ones tell where a run broke.
        """
        trained, gradients = self.trained(params), self.trained(grads)
        squares = jnp.stack([jnp.sum(jnp.square(_wide(g))) for g in gradients.values()])
        norm = jnp.sqrt(jnp.sum(squares))
        scale = jnp.minimum(1.0, self.clip_norm / (norm + CLIP_EPSILON))
        clipped = {path: g * scale for path, g in gradients.items()}
        direction, moments = self._adam.update(clipped, optax.ScaleByAdamState(**state))  # type: ignore[arg-type]
        rates = {path: learning_rate * self.scale(path) if self.scales else learning_rate for path in trained}
        new = {
            path: (p * (1 - rates[path] * decay) - rates[path] * direction[path]).astype(p.dtype)
            for path, p in trained.items()
        }
        return _replace(params, new), moments._asdict(), squares

    def scale(self, path: str) -> float:
        """The factor of a parameter's learning rate."""
        return next((factor for prefix, factor in self.scales if under(path, (prefix,))), 1.0)

    @property
    def _adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.betas[0], b2=self.betas[1], eps=self.eps)


def _wide(gradient: Array) -> Array:
    """In float32, or float64 if it is."""
    return gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))


def paths(tree: Tree) -> dict[str, Any]:
    """Nested dict → {"a/0/b": leaf}, in the order of jax's own flattening."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def under(path: str, prefixes: Sequence[str]) -> bool:
    """Whether a path is one of the prefixes or lies below one."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


def _replace(tree: Tree, new: dict[str, Array]) -> Tree:
    """The tree with the leaves at these paths replaced."""
    return map_with_path(lambda path, leaf: new.get(path, leaf), tree)


def map_with_path(function: Callable[[str, Any], Any], tree: Tree) -> Any:
    """jax.tree.map of function(path, leaf), the path as ``paths`` writes it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree
    )


def make_optimiser(
    config: OptimConfig,
    steps: int,
    untrained: tuple[str, ...],
    scales: tuple[tuple[str, float], ...] = (),
) -> tuple[AdamW, Schedule]:
    """AdamW and the schedule of a run of so many steps."""
    adamw = AdamW(config.betas, config.eps, config.clip_norm, untrained, scales)
    warmup = round(config.warmup * steps)
    return adamw, Schedule(config.learning_rate, warmup, steps, config.weight_decay, config.weight_decay_end)
