"""Encoders: a crop and its mask in, a pyramid of five feature maps out, deepest first.

What an encoder owes to masked pre-training: `stride`, the `channels` of its maps (deepest first, each scale twice as
fine as the one before, the last at full resolution), and `encoder(x, mask)` that reads no hidden voxel and gives dense
maps, zero at hidden places of the finer scales. The deepest map holds a learned token there, from which a filler
takes the first and the last token. Without a mask everything is visible.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mambamim_jax.model.mamba import MambaStage
from mambamim_jax.model.mask import Mask, patch_grid
from mambamim_jax.model.masked_layers import Conv3, MedNeXtBlock, ResBlock
from mambamim_jax.model.packed import max_pool2, pack, unpack
from mambamim_jax.model.vision_mamba import VisionMamba
from mambamim_jax.types import Array


class Encoder(Protocol):
    """What masked pre-training and segmentation need of an encoder (see the module's text)."""

    stride: int
    channels: tuple[int, ...]

    def __call__(self, x: Array, mask: Mask | None = None) -> tuple[Array, ...]: ...


class HyMamba(nnx.Module):
    """MedNeXt stages at strides 1 to 8, Vision Mamba at stride 16 (METHOD section 3).

    Args:
      in_channels: input modalities.
      channels: widths of the stem and of the maps at strides 1, 2, 4, 8 and 16: (stem, x1, x2, x3, x4) with x4 also
        the width of the Mamba stage.
      depths: MedNeXt blocks at strides 2, 4, 8, 16.
      expansion: their expansion ratios.
      mamba_depth: Mamba layers.
      state, conv_width, expand, mlp_ratio, scan: of the Mamba layers.
      dtype: compute dtype, float32 or bfloat16; parameters are float32.
    """

    stride = 16

    def __init__(
        self,
        *,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 1),
        expansion: Sequence[int] = (2, 4, 4, 4),
        mamba_depth: int = 4,
        state: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        mlp_ratio: float = 2.0,
        scan: str = "auto",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths = tuple(channels)
        self.channels = (widths[4], *widths[:0:-1])
        self.in_channels, self.dtype = in_channels, dtype
        self.stem = Conv3(in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.expand = nnx.List([Conv3(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.stages = nnx.List(
            [
                nnx.List([MedNeXtBlock(width, ratio, dtype=dtype, rngs=rngs) for _ in range(depth)])
                for width, depth, ratio in zip(widths[1:], depths, expansion, strict=True)
            ]
        )
        self.skips = nnx.List([ResBlock(width, width, dtype=dtype, rngs=rngs) for width in widths[1:]])
        self.mamba = MambaStage(
            widths[4], mamba_depth, dtype=dtype, rngs=rngs,
            state=state, conv_width=conv_width, expand=expand, mlp_ratio=mlp_ratio, scan=scan,
        )  # fmt: skip

    def __call__(self, x: Array, mask: Mask | None = None) -> tuple[Array, ...]:
        """Features of a crop.

        Args:
          x: (b, h, w, d, c), sides divisible by 16.
          mask: the visible patches, or None for all.

        Returns:
          maps (b, h/s, w/s, d/s, channels[i]) at strides s = 16, 8, 4, 2, 1.

        Raises:
          ValueError: crops of another shape, or a mask that is not of these crops.
        """
        grid = patch_grid(x, self.stride, self.in_channels, mask)
        y = self.stem(pack(x.astype(self.dtype), mask), mask)
        maps = []
        for expand, stage, skip in zip(self.expand, self.stages, self.skips, strict=True):
            y = expand(y, mask)
            maps.append(unpack(skip(y, mask), mask))
            y = max_pool2(y)
            for block in stage:
                y = block(y, mask)
        tokens = y.reshape(y.shape[0], -1, y.shape[-1])
        deepest = self.mamba.spread(self.mamba(tokens, grid, mask)[-1], grid, mask)
        return (deepest, *reversed(maps))


ENCODERS: dict[str, type[nnx.Module]] = {"hymamba": HyMamba, "vision_mamba": VisionMamba}
"""Encoders by name."""
