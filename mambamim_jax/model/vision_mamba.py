"""Vision Mamba alone: 16x16x16 patches, Mamba layers, and a pyramid lifted from features at several depths.

The single-architecture counterpart of HyMamba (MambaMIM's plain Vision Mamba), given its pyramid as UNETR gives one to
its ViT (Hatamizadeh et al., WACV 2022): deeper features stay coarse, shallower ones go through more transposed
convolutions. These have kernel 2 and stride 2, so a patch's features stay within the patch and hidden ones can't leak.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mambamim_jax.model.mamba import Linear, MambaStage
from mambamim_jax.model.mask import Mask, patch_grid
from mambamim_jax.model.masked_layers import ResBlock, layer_norm
from mambamim_jax.model.packed import join_patches, pack, split_patches, unpack
from mambamim_jax.model.upsample import Upsample2
from mambamim_jax.types import Array


class Lift(nnx.Module):
    """`steps` x [transposed convolution 2x2x2 stride 2, LayerNorm, GELU] on packed maps, (.., p, p, p, in) to out."""

    def __init__(self, inputs: int, outputs: int, steps: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * steps
        self.ups = nnx.List([Upsample2(a, b, dtype=dtype, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.norms = nnx.List([layer_norm(outputs, 1e-6, dtype, rngs) for _ in range(steps)])

    def __call__(self, x: Array) -> Array:
        for up, norm in zip(self.ups, self.norms, strict=True):
            x = jax.nn.gelu(norm(up(x)), approximate=False)
        return x


class VisionMamba(nnx.Module):
    """Patch embedding, `mamba_depth` Mamba layers over the visible tokens, a lifted pyramid.

    Args:
      in_channels: input modalities.
      channels: widths of the maps at strides 1, 2, 4, 8, 16; the last is the width of the tokens.
      mamba_depth: Mamba layers.
      feature_depths: layers after which the maps at strides 2, 4, 8, 16 are taken, increasing; the last is the depth.
      state, conv_width, expand, mlp_ratio, scan: of the Mamba layers.
      dtype: compute dtype, float32 or bfloat16; parameters are float32.

    Raises:
      ValueError: feature_depths don't increase up to mamba_depth.
    """

    stride = 16

    def __init__(
        self,
        *,
        in_channels: int = 1,
        channels: Sequence[int] = (64, 128, 192, 384, 384),
        mamba_depth: int = 12,
        feature_depths: Sequence[int] = (3, 6, 9, 12),
        state: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        mlp_ratio: float = 2.0,
        scan: str = "auto",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        depths = tuple(feature_depths)
        if (
            len(depths) != 4
            or list(depths) != sorted(set(depths))
            or depths[0] < 1
            or depths[3] != mamba_depth
        ):
            raise ValueError(
                f"feature_depths: found {depths}, expected four increasing layers, the last {mamba_depth} (mamba_depth)"
            )
        self.channels = tuple(channels)[::-1]
        self.in_channels, self.feature_depths, self.dtype = in_channels, depths, dtype
        width = self.channels[0]
        self.embed = Linear(in_channels * self.stride**3, width, bias=True, dtype=dtype, rngs=rngs)
        self.mamba = MambaStage(
            width, mamba_depth, dtype=dtype, rngs=rngs,
            state=state, conv_width=conv_width, expand=expand, mlp_ratio=mlp_ratio, scan=scan,
        )  # fmt: skip
        self.skips = nnx.List([ResBlock(in_channels, self.channels[4], dtype=dtype, rngs=rngs)])
        self.lifts = nnx.List(
            [Lift(width, self.channels[steps], steps, dtype=dtype, rngs=rngs) for steps in (1, 2, 3)]
        )

    def __call__(self, x: Array, mask: Mask | None = None) -> tuple[Array, ...]:
        """Features at strides 16, 8, 4, 2, 1 of a crop (b, h, w, d, c); see `HyMamba.__call__`."""
        grid = patch_grid(x, self.stride, self.in_channels, mask)
        x = x.astype(self.dtype)
        patches = split_patches(x, grid) if mask is None else pack(x, mask)
        b, k = patches.shape[:2]
        outputs = self.mamba(self.embed(patches.reshape(b, k, -1)), grid, mask)
        taps = [outputs[depth - 1] for depth in self.feature_depths]
        maps = [self.mamba.spread(taps[3], grid, mask)]
        for lift, tokens in zip(self.lifts, (taps[2], taps[1], taps[0]), strict=True):
            maps.append(_spread(lift(tokens[:, :, None, None, None, :]), grid, mask))
        maps.append(unpack(self.skips[0](pack(x, mask), mask), mask))
        return tuple(maps)


def _spread(blocks: Array, grid: tuple[int, int, int], mask: Mask | None) -> Array:
    """Lifted patches back on the map, with or without a mask."""
    return join_patches(blocks, grid) if mask is None else unpack(blocks, mask)
