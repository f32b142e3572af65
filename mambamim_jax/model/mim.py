"""Masked image modelling over any encoder: encode what is visible, fill what is hidden, decode to voxels."""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mambamim_jax.model.decoder import ReconstructionDecoder, truncated_normal
from mambamim_jax.model.encoder import Encoder
from mambamim_jax.model.mask import Mask, check_mask, patch_grid
from mambamim_jax.model.masked_layers import Conv3, Pointwise
from mambamim_jax.model.toki import FILLERS, filler_parameter_shape
from mambamim_jax.types import Array


def _initial_transition(shape: tuple[int, ...], rngs: nnx.Rngs) -> Array:
    """A filler's parameter at the start: a transition matrix is zero, a token is drawn like the other mask tokens."""
    if len(shape) == 1:
        return truncated_normal(rngs.params(), shape, 0.02, 0.02)
    return jnp.zeros(shape, jnp.float32)


class MaskedImageModel(nnx.Module):
    """The pre-training network (MambaMIM; METHOD sections 3-5).

    Args:
      encoder: any encoder (`model.encoder.Encoder`).
      filler: name in `toki.FILLERS` of what fills hidden places of the deepest map.
      decoder_width: W, width of the decoder at the deepest map; halved at each step.
      out_channels: channels to reconstruct, those of the input.
      dtype: compute dtype of everything but the encoder, which has its own.
    """

    unused_parameters = ("encoder/skips/0",)
    """Paths of parameters that this task never reaches; an optimiser must leave them as they are."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        filler: str = "toki",
        decoder_width: int = 768,
        out_channels: int = 1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if filler not in FILLERS:
            raise ValueError(f"filler: found {filler!r}, expected one of {', '.join(FILLERS)}")
        if decoder_width % 16:
            raise ValueError(f"decoder_width: found {decoder_width}, expected a multiple of 16")
        self.encoder = encoder
        self.filler = filler
        deepest, *finer = encoder.channels[:4]
        shape = filler_parameter_shape(filler, deepest)
        self.transition = None if shape is None else nnx.Param(_initial_transition(shape, rngs))
        self.mask_tokens = nnx.List(
            [nnx.Param(truncated_normal(rngs.params(), (c,), 0.02, 0.02)) for c in finer]
        )
        widths = [decoder_width // 2**i for i in range(4)]
        same = deepest == decoder_width
        self.project_deepest = None if same else Pointwise(deepest, decoder_width, dtype=dtype, rngs=rngs)
        self.projections = nnx.List(
            [Conv3(c, width, dtype=dtype, rngs=rngs) for c, width in zip(finer, widths[1:], strict=True)]
        )
        self.decoder = ReconstructionDecoder(decoder_width, out_channels, dtype=dtype, rngs=rngs)

    def fill(self, features: Array, mask: Mask) -> Array:
        """Tokens of the deepest map with its hidden places filled, (b, gh, gw, gd, c), in float32 or wider."""
        b, *grid, c = features.shape
        tokens = features.reshape(b, math.prod(grid), c).astype(
            jnp.promote_types(features.dtype, jnp.float32)
        )
        parameter = None if self.transition is None else self.transition[...]
        filled = FILLERS[self.filler](tokens, mask.active.reshape(b, -1), parameter)
        return filled.reshape(features.shape)

    def densify(self, features: tuple[Array, ...], mask: Mask) -> tuple[Array, ...]:
        """Fills and projects the maps at strides 16, 8, 4, 2 to the decoder's widths."""
        deepest = self.fill(features[0], mask)
        maps = [deepest if self.project_deepest is None else self.project_deepest(deepest)]
        for i, (x, token, project) in enumerate(
            zip(features[1:4], self.mask_tokens, self.projections, strict=True), start=1
        ):
            active = mask.upsampled(2**i)[..., None]
            maps.append(project(jnp.where(active, x, token[...].astype(x.dtype))[:, None])[:, 0])
        return tuple(maps)

    def __call__(self, x: Array, mask: Mask, train: bool = True) -> Array:
        """Reconstructs a crop from its visible patches.

        Args:
          x: (b, h, w, d, c), sides divisible by the encoder's stride, intensities in [0, 1].
          mask: which patches are visible.
          train: batch statistics in the decoder's BatchNorm, running ones updated; otherwise running ones used.

        Returns:
          (b, h, w, d, c) float32: the crop as predicted, each patch in its own normalised intensities (section 6).

        Raises:
          ValueError: crops of another shape, or something else than a mask of these crops.
        """
        check_mask(mask, x.shape[0], patch_grid(x, self.encoder.stride))
        return self.decoder(self.densify(self.encoder(x, mask), mask), train)
