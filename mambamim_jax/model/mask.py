"""Which patches are visible: bottom-up 3D hybrid masking (MambaMIM, section 3.2) as pure functions."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mambamim_jax.types import Array, Size3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The k active patches of every sample on the grid of the deepest stage; all other patches are hidden.

    Every finer stage hides the same places (`upsampled`), so one mask serves the whole pyramid.

    Attributes:
      indices: int32 (b, k), raster positions of the active patches, in the order in which the Mamba stage reads them:
        increasing from `draw_mask` and `from_active`. Any other order is honoured too.
      grid: (gh, gw, gd), patches along each axis; static under `jax.jit`.
    """

    indices: Array
    grid: Size3 = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_active(cls, active: Array) -> Mask:
        """The mask of a concrete boolean array.

        Args:
          active: bool (b, gh, gw, gd), True where a patch is visible; b ≥ 1. An array or nested lists.

        Raises:
          ValueError: another shape, or samples keep different numbers of patches, or none.
        """
        visible = np.asarray(active, bool)
        if visible.ndim != 4 or not visible.size:
            raise ValueError(f"active: found {visible.shape}, expected (b, gh, gw, gd), every size ≥ 1")
        flat = visible.reshape(len(visible), -1)
        kept = np.unique(flat.sum(axis=1))
        if len(kept) != 1 or kept[0] == 0:
            raise ValueError(
                f"active: found {kept.tolist()} active patches per sample, expected one equal number of at least 1; "
                "draw masks with draw_mask"
            )
        indices = np.stack([np.flatnonzero(row) for row in flat]).astype(np.int32)
        gh, gw, gd = (int(side) for side in visible.shape[1:])
        return cls(jnp.asarray(indices), (gh, gw, gd))

    @property
    def tokens(self) -> int:
        """l, the number of patches of the grid."""
        return math.prod(self.grid)

    @property
    def kept(self) -> int:
        """k, the number of active patches per sample."""
        return self.indices.shape[1]

    @property
    def active(self) -> Array:
        """bool (b, gh, gw, gd), True where a patch is visible."""
        return (self.slots < self.kept).reshape(-1, *self.grid)

    @property
    def slots(self) -> Array:
        """int32 (b, l): the place of each patch among the active ones, or k where it is hidden."""

        def invert(indices: Array) -> Array:
            empty = jnp.full((self.tokens,), self.kept, jnp.int32)
            return empty.at[indices].set(jnp.arange(self.kept, dtype=jnp.int32), unique_indices=True)

        return jax.vmap(invert)(self.indices)

    def upsampled(self, factor: int) -> Array:
        """bool (b, gh*factor, gw*factor, gd*factor): `active` repeated along each axis."""
        active = self.active
        for axis in (1, 2, 3):
            active = jnp.repeat(active, factor, axis=axis)
        return active


def patch_grid(x: Array, patch: int, channels: int | None = None, mask: Mask | None = None) -> Size3:
    """(gh, gw, gd), the patches of crops (b, h, w, d, c).

    Args:
      channels: c, if one number alone is right.
      mask: of these crops, or None for none.

    Raises:
      ValueError: another shape, a side that is not divisible by the patch, or another mask.
    """
    if len(x.shape) != 5 or 0 in x.shape or channels not in (None, x.shape[4]):
        shape = "(b, h, w, d, c)" if channels is None else f"(b, h, w, d, {channels})"
        raise ValueError(f"crop: found {x.shape}, expected {shape}, every size ≥ 1")
    h, w, d = x.shape[1:4]
    if h % patch or w % patch or d % patch:
        raise ValueError(
            f"crop: found {(h, w, d)} voxels, expected sides divisible by {patch}; pad or crop it"
        )
    grid = h // patch, w // patch, d // patch
    if mask is not None:
        check_mask(mask, x.shape[0], grid)
    return grid


def check_mask(mask: Mask, batch: int, grid: Size3) -> None:
    """Raises ValueError unless this is a mask of so many samples on this grid."""
    if not isinstance(mask, Mask):
        found = type(mask).__name__
        raise ValueError(f"mask: found {found}, expected a Mask; make one with draw_mask or Mask.from_active")
    if (mask.indices.shape[0], tuple(mask.grid)) != (batch, grid):
        raise ValueError(
            f"mask: found {mask.indices.shape[0]} samples on a grid of {mask.grid}, expected {batch} on {grid}"
        )


def kept_tokens(grid: Size3, mask_ratio: float) -> int:
    """k = round(l * (1 - mask_ratio)), the patches left visible (METHOD: the same for every sample).

    Raises:
      ValueError: the ratio hides every patch or none.
    """
    tokens = math.prod(grid)
    kept = round(tokens * (1.0 - mask_ratio))
    if not 0 < kept < tokens:
        raise ValueError(
            f"mask_ratio {mask_ratio} keeps {kept} of {tokens} patches on a grid of {grid}, "
            "expected at least one kept and one hidden; change the ratio or the crop"
        )
    return kept


def draw_mask(key: Array, batch: int, grid: Size3, mask_ratio: float) -> Mask:
    """Draws for each sample, independently and uniformly, which k patches stay visible.

    Args:
      key: a typed PRNG key.
      batch: b, the number of samples.
      grid: (gh, gw, gd), patches along each axis.
      mask_ratio: the share of patches to hide, in (0, 1).
    """
    kept = kept_tokens(grid, mask_ratio)
    noise = jax.random.uniform(key, (batch, math.prod(grid)))
    chosen = jnp.argsort(noise, axis=1)[:, :kept]
    return Mask(jnp.sort(chosen, axis=1).astype(jnp.int32), grid)


def patchify(volume: Array, patch: int) -> Array:
    """Cuts (b, h, w, d, c) into cubes: (b, l, patch**3 * c), both in raster order with c fastest."""
    return rearrange(volume, "b (gh p) (gw q) (gd r) c -> b (gh gw gd) (p q r c)", p=patch, q=patch, r=patch)


def unpatchify(tokens: Array, grid: Size3, patch: int) -> Array:
    """Inverse of `patchify`: (b, l, patch**3 * c) to (b, h, w, d, c)."""
    gh, gw, gd = grid
    return rearrange(
        tokens,
        "b (gh gw gd) (p q r c) -> b (gh p) (gw q) (gd r) c",
        gh=gh, gw=gw, gd=gd, p=patch, q=patch, r=patch,
    )  # fmt: skip
