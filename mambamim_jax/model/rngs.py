"""Keys for a network's parameters, those of Flax, drawn without Flax's cost under a trace."""

from __future__ import annotations

import jax
from flax import nnx

from mambamim_jax.types import Array


class Rngs(nnx.Rngs):
    """`nnx.Rngs` with one stream: the same keys in the same order.

    Flax counts draws in an array. Under `jax.jit` and `nnx.eval_shape`, where networks are built, each count is
    traced, and asking a tracer for its sharding makes JAX search all that was traced before for an error message
    that nobody reads: seconds for some hundred draws. Here the count is a Python number.

    Args:
      seed: int, or a key.
    """

    def __init__(self, seed: int | Array):
        super().__init__(seed)
        self.default = _Stream(vars(self)["default"].key[...], tag="default")


class _Stream(nnx.RngStream):
    def __init__(self, key: Array, *, tag: str):
        super().__init__(key, tag=tag)
        self.drawn = 0

    def __call__(self) -> Array:
        key = jax.random.fold_in(self.key[...], self.drawn)
        self.drawn += 1
        return key
