"""The causal depthwise convolution along the tokens that precedes Mamba's scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mambamim_jax.types import Array


def causal_conv1d(x: Array, kernel: Array, bias: Array | None = None, *, silu: bool = True) -> Array:
    """Convolves each channel with its own taps, seeing only the present and past tokens, then applies SiLU.

        out_t = SiLU(bias + Σ_i kernel_i · x_{t - width + 1 + i}),   x = 0 before the first token

    As a sum of shifted products: compilers turn it into one pass over ``x``, where a grouped convolution
    of one channel a group runs far slower. Arithmetic is float32 (float64 if ``x`` is).

    Args:
        x: tokens (b, l, e).
        kernel: taps (width, e), the last one for the present token.
        bias: (e,) or None.
        silu: whether SiLU follows.

    Returns:
        (b, l, e) in x's dtype.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if x.ndim != 3 or kernel.ndim != 2 or kernel.shape[1] != x.shape[2]:
        raise ValueError(
            f"causal_conv1d: found x {x.shape} and kernel {kernel.shape}, expected (b, l, e) and (width, e)"
        )
    if bias is not None and bias.shape != (x.shape[2],):
        raise ValueError(f"causal_conv1d: found bias {bias.shape}, expected ({x.shape[2]},)")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    width, length = kernel.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0))).astype(dtype)
    taps = kernel.astype(dtype)
    out = padded[:, :length] * taps[0]
    for i in range(1, width):
        out = out + padded[:, i : i + length] * taps[i]
    if bias is not None:
        out = out + bias.astype(dtype)
    if silu:
        out = jax.nn.silu(out)
    return out.astype(x.dtype)
