"""The Mamba stage: Mamba-1 layers over the visible tokens (Gu & Dao 2023, arXiv 2312.00752; METHOD section 3)."""

from __future__ import annotations

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from mambamim_jax.model.mask import Mask
from mambamim_jax.model.masked_layers import layer_norm, torch_uniform
from mambamim_jax.model.packed import take_blocks
from mambamim_jax.ops.causal_conv1d import causal_conv1d
from mambamim_jax.ops.partition import by_width
from mambamim_jax.ops.selective_scan import selective_scan
from mambamim_jax.types import Array, Size3

DT_RANGE = (1e-3, 0.1)


def position_embedding(grid: Size3, channels: int) -> np.ndarray:
    """Fixed 3D sine-cosine embedding, float32 (l, c) in raster order, for any grid.

    With m = c/6 frequencies w_i = 10000**(-i/m): [sin h*w, cos h*w, sin w*w, cos w*w, sin d*w, cos d*w].

    Raises:
      ValueError: channels not divisible by 6.
    """
    if channels % 6:
        raise ValueError(
            f"channels: found {channels}, expected a multiple of 6 for the 3D sine-cosine embedding"
        )
    frequencies = 10000.0 ** -(np.arange(channels // 6) / (channels // 6))
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3)
    angles = places[:, :, None] * frequencies
    return (
        np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
        .reshape(len(places), channels)
        .astype(np.float32)
    )


class Linear(nnx.Module):
    """y = x W + b with W (in, out) Xavier-uniform and b zero, as the published stage initialises its layers."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(
            nnx.initializers.xavier_uniform()(rngs.params(), (inputs, outputs), jnp.float32)
        )
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)

    def pair(self, x: Array) -> tuple[Array, Array]:
        """The two halves of y = x W as products of their own: on a mesh neither has to be moved.

        Nor is a half copied out of a whole; but on a GPU XLA may make one product of two small ones again.
        """
        halves = jnp.split(self.kernel[...].astype(self.dtype), 2, axis=-1)
        first, second = (x.astype(self.dtype) @ by_width(half) for half in halves)
        return first, second


def _inverse_softplus_of_log_uniform(key: Array, size: int) -> Array:
    """A bias whose softplus is log-uniform in `DT_RANGE` (Mamba's initialisation of the step size)."""
    low, high = map(math.log, DT_RANGE)
    step = jnp.exp(jax.random.uniform(key, (size,), jnp.float32, low, high))
    return step + jnp.log(-jnp.expm1(-step))


class Mamba(nnx.Module):
    """Mamba-1, causal, one direction: tokens (b, k, c) to (b, k, c), scan in float32 whatever the dtype."""

    def __init__(
        self,
        channels: int,
        *,
        state: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        scan: str = "auto",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inner, rank = expand * channels, math.ceil(channels / 16)
        self.state, self.rank, self.scan, self.dtype = state, rank, scan, dtype
        self.in_proj = Linear(channels, 2 * inner, bias=False, dtype=dtype, rngs=rngs)
        self.conv_kernel = nnx.Param(torch_uniform(rngs.params(), (conv_width, inner), conv_width))
        self.conv_bias = nnx.Param(torch_uniform(rngs.params(), (inner,), conv_width))
        self.x_proj = Linear(inner, rank + 2 * state, bias=False, dtype=dtype, rngs=rngs)
        self.dt_proj = Linear(rank, inner, bias=False, dtype=dtype, rngs=rngs)
        self.dt_bias = nnx.Param(_inverse_softplus_of_log_uniform(rngs.params(), inner))
        decay = jnp.log(jnp.arange(1, state + 1, dtype=jnp.float32))
        self.A_log = nnx.Param(jnp.broadcast_to(decay, (inner, state)))
        self.D = nnx.Param(jnp.ones((inner,), jnp.float32))
        self.out_proj = Linear(inner, channels, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        u, z = self.in_proj.pair(x)
        u = causal_conv1d(u, self.conv_kernel[...], self.conv_bias[...], silu=True)
        delta, B, C = jnp.split(self.x_proj(u), (self.rank, self.rank + self.state), axis=-1)
        y = selective_scan(  # an array, as no last state is asked for
            u,
            self.dt_proj(delta),
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            z,
            self.dt_bias[...],
            implementation=self.scan,
        )
        return self.out_proj(cast(Array, y))


class MambaLayer(nnx.Module):
    """x += Mamba(LN(x)); x += MLP(LN(x)), the MLP of hidden width ratio * c with exact GELU."""

    def __init__(
        self,
        channels: int,
        *,
        mlp_ratio: float = 2.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **mamba: object,
    ):
        hidden = int(mlp_ratio * channels)
        self.norm1 = layer_norm(channels, 1e-5, dtype, rngs)
        self.mamba = Mamba(channels, dtype=dtype, rngs=rngs, **mamba)  # type: ignore[arg-type]
        self.norm2 = layer_norm(channels, 1e-5, dtype, rngs)
        self.fc1 = Linear(channels, hidden, bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, channels, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.mamba(self.norm1(x))
        return x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))


class MambaStage(nnx.Module):
    """Mamba layers over the visible tokens in raster order, each with its position embedding.

    Called with packed tokens (b, k, c) and their mask (None: all l tokens of `grid` are there); gives the tokens after
    each layer. `spread` puts tokens back on the grid, the learned `mask_token` at hidden places.
    """

    def __init__(
        self, channels: int, depth: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs, **mamba: object
    ):
        self.channels = channels
        self.layers = nnx.List(
            [MambaLayer(channels, dtype=dtype, rngs=rngs, **mamba) for _ in range(depth)]  # type: ignore[arg-type]
        )
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (channels,), jnp.float32))

    def __call__(self, tokens: Array, grid: Size3, mask: Mask | None) -> list[Array]:
        embedding = jnp.asarray(position_embedding(grid, self.channels))
        x = tokens + (embedding if mask is None else embedding[mask.indices]).astype(tokens.dtype)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs

    def spread(self, tokens: Array, grid: Size3, mask: Mask | None) -> Array:
        """(b, k, c) to (b, gh, gw, gd, c), hidden places filled with `mask_token`."""
        if mask is not None:
            hidden = (mask.slots == mask.kept)[..., None]
            tokens = jnp.where(
                hidden, self.mask_token[...].astype(tokens.dtype), take_blocks(tokens, mask.slots)
            )
        return tokens.reshape(-1, *grid, self.channels)
