"""The reconstruction loss of masked image modelling (Tang et al., arXiv 2408.08070)."""

from __future__ import annotations

import jax.numpy as jnp

from mambamim_jax.model.mask import Mask, patchify
from mambamim_jax.types import Array

VARIANCE_FLOOR = 1e-6


def patch_statistics(tokens: Array) -> tuple[Array, Array]:
    """Each patch's own mean and deviation.

    Args:
      tokens: (b, l, p³c), the voxels of each patch.

    Returns:
      mean and sqrt(unbiased variance + 1e-6), both (b, l, 1) float32.
    """
    tokens = tokens.astype(jnp.float32)
    mean = jnp.mean(tokens, axis=-1, keepdims=True)
    variance = jnp.var(tokens, axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + VARIANCE_FLOOR)


def reconstruction_loss(reconstruction: Array, image: Array, mask: Mask) -> Array:
    """Squared error against the patch-normalised image, mean over the hidden patches of the whole batch.

    The target of a patch is its voxels normalised by the patch's own mean and unbiased variance.

    Args:
      reconstruction: (b, h, w, d, c), in the patch-normalised space.
      image: (b, h, w, d, c) in [0, 1].
      mask: which patches were seen.

    Returns:
      The loss, a float32 scalar.
    """
    side = image.shape[1] // mask.grid[0]
    tokens = patchify(image.astype(jnp.float32), side)
    mean, deviation = patch_statistics(tokens)
    error = patchify(reconstruction.astype(jnp.float32), side) - (tokens - mean) / deviation
    hidden = (mask.slots == mask.kept).astype(jnp.float32)
    return jnp.sum(jnp.mean(error**2, axis=-1) * hidden) / jnp.sum(hidden)
