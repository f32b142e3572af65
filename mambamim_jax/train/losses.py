"""Losses: reconstruction of hidden patches (Tang et al., arXiv 2408.08070), Dice and cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mambamim_jax.model.mask import Mask, check_mask, patch_grid, patchify
from mambamim_jax.types import Array

VARIANCE_FLOOR = 1e-6
DICE_FLOOR = 1e-5
"""Voxels added above and below in a Dice: a class that is neither there nor predicted has Dice 1."""


def patch_statistics(tokens: Array) -> tuple[Array, Array]:
    """Each patch's own mean and deviation.

    Args:
      tokens: (b, l, p³c), the voxels of each patch.

    Returns:
      mean and sqrt(unbiased variance + 1e-6), both (b, l, 1), float32 or wider.
    """
    tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
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
      The loss, a scalar, float32 or wider.

    Raises:
      ValueError: shapes that differ, or a mask of other crops or one that hides nothing.
    """
    _check_same(reconstruction, image)
    side = _patch_side(image, mask)
    wide = jnp.promote_types(reconstruction.dtype, jnp.float32)
    tokens = patchify(image.astype(wide), side)
    mean, deviation = patch_statistics(tokens)
    error = patchify(reconstruction.astype(wide), side) - (tokens - mean) / deviation
    hidden = (mask.slots == mask.kept).astype(wide)
    return jnp.sum(jnp.mean(error**2, axis=-1) * hidden) / jnp.sum(hidden)


def _check_same(found: Array, wanted: Array) -> None:
    """Raises ValueError unless both are maps of one shape; one that broadcasts would be compared without a word."""
    if found.shape != wanted.shape or len(found.shape) != 5:
        raise ValueError(
            f"loss: found {found.shape} and {wanted.shape}, expected (b, h, w, d, c), the same for both"
        )


def _patch_side(image: Array, mask: Mask) -> int:
    """p, the voxels along a side of the mask's patches; raises ValueError for a mask of other crops."""
    side = max(image.shape[1] // mask.grid[0], 1) if isinstance(mask, Mask) else 1
    check_mask(mask, image.shape[0], patch_grid(image, side))
    if mask.kept >= mask.tokens:
        raise ValueError(f"mask: hides none of {mask.tokens} patches, expected at least one hidden")
    return side


def targets_of(label: Array, classes: int, regions: Sequence[Sequence[int]] = ()) -> Array:
    """A label map (b, h, w, d) as one float32 map of 0 and 1 per class, or per region (the labels inside it)."""
    if not regions:
        return jax.nn.one_hot(label.astype(jnp.int32), classes, dtype=jnp.float32)
    inside = [jnp.isin(label, jnp.asarray(labels, label.dtype)) for labels in regions]
    return jnp.stack(inside, axis=-1).astype(jnp.float32)


def segmentation_loss(
    logits: Array,
    target: Array,
    *,
    overlapping: bool = False,
    dice: float = 1.0,
    cross_entropy: float = 1.0,
    background: bool = False,
    background_weight: float = 1.0,
    batch: bool = False,
) -> Array:
    """Dice plus cross-entropy (METHOD section 8).

    Dice is soft, 1 - (2 Σ p t + ε) / (Σ p + Σ t + ε), a mean over the classes, and over the crops unless ``batch``.

    Args:
      logits: (b, h, w, d, classes). target: the same shape, from ``targets_of``.
      overlapping: sigmoid and binary cross-entropy, each channel by itself (regions); otherwise softmax over
        the channels, channel 0 being the background.
      dice, cross_entropy: weights.
      background: whether the Dice term counts channel 0 of a softmax.
      background_weight: of its voxels in the cross-entropy of a softmax, a weighted mean; others weigh 1.
      batch: one Dice of all crops rather than one of each.

    Returns:
      The loss, a float32 scalar.

    Raises:
      ValueError: shapes that differ.
    """
    _check_same(logits, target)
    logits = logits.astype(jnp.float32)
    if overlapping:
        probability = jax.nn.sigmoid(logits)
        # -log(1 - p) = softplus(x) and -log p = softplus(x) - x
        entropy = jnp.mean(jax.nn.softplus(logits) - target * logits)
    else:
        logarithm = jax.nn.log_softmax(logits)
        probability = jnp.exp(logarithm)
        weight = 1.0 + (background_weight - 1.0) * target[..., 0]
        entropy = -jnp.sum(weight * jnp.sum(target * logarithm, axis=-1)) / jnp.sum(weight)
    first = 0 if background or overlapping else 1
    probability, target = probability[..., first:], target[..., first:]
    axes = (0, 1, 2, 3) if batch else (1, 2, 3)
    common = jnp.sum(probability * target, axes)
    total = jnp.sum(probability, axes) + jnp.sum(target, axes)
    return dice * jnp.mean(1 - (2 * common + DICE_FLOOR) / (total + DICE_FLOOR)) + cross_entropy * entropy
