"""The causal depthwise convolution along the tokens that precedes Mamba's scan."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from mambamim_jax.types import Array

GROUP = 16
"""Tokens summed at once for the taps' gradients: of 8, 16, 32 and 64 the fastest on an H200."""


def causal_conv1d(x: Array, kernel: Array, bias: Array | None = None, *, silu: bool = True) -> Array:
    """Convolves each channel with its own taps, seeing only the present and past tokens, then applies SiLU.

        out_t = SiLU(bias + Σ_i kernel_i · x_{t - width + 1 + i}),   x = 0 before the first token

    As a sum of shifted products: compilers turn it into one pass over ``x``, where a grouped convolution
    of one channel a group runs far slower. Arithmetic is float32 (float64 if ``x`` is). The backward pass is
    written out: what is derived by JAX keeps a float32 array of x's shape, and sums the taps' gradients slowly.

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
    return _convolve(x, kernel, jnp.zeros_like(kernel[0]) if bias is None else bias, silu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(x: Array, kernel: Array, bias: Array, silu: bool) -> Array:
    out = before_silu(x, kernel, bias)
    return (jax.nn.silu(out) if silu else out).astype(x.dtype)


def _forward(x: Array, kernel: Array, bias: Array, silu: bool) -> tuple[Array, tuple[Array, Array, Array]]:
    return _convolve(x, kernel, bias, silu), (x, kernel, bias)


def _backward(silu: bool, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, Array]:
    """The convolution is made again, so that its inputs are all that is kept until here."""
    x, kernel, bias = saved
    width, length = kernel.shape[0], x.shape[1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    dout = g.astype(dtype)
    if silu:
        out = before_silu(x, kernel, bias)
        gate = jax.nn.sigmoid(out)
        dout = dout * gate * (1 + out * (1 - gate))
    taps = kernel.astype(dtype)
    later = jnp.pad(dout, ((0, 0), (0, width - 1), (0, 0)))
    earlier = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    dx = later[:, :length] * taps[-1]
    for i in range(1, width):
        dx = dx + later[:, i : i + length] * taps[-1 - i]
    dtaps = [_sum_over_tokens(dout * earlier[:, i : i + length]) for i in range(width)]
    dbias = _sum_over_tokens(dout)
    return dx.astype(x.dtype), jnp.stack(dtaps).astype(kernel.dtype), dbias.astype(bias.dtype)


_convolve.defvjp(_forward, _backward)


def _sum_over_tokens(x: Array) -> Array:
    """The sum of x (b, l, e) over samples and tokens, in two steps.

    XLA's own, of thousands of rows at once, uses a fraction of a GPU; the barrier keeps it from joining the two.
    """
    b, l, e = x.shape
    groups = -(-l // GROUP)
    grouped = jnp.pad(x, ((0, 0), (0, groups * GROUP - l), (0, 0))).reshape(b * groups, GROUP, e)
    return jnp.sum(jax.lax.optimization_barrier(jnp.sum(grouped, axis=1)), axis=0)


def before_silu(x: Array, kernel: Array, bias: Array) -> Array:
    """The sum of shifted products alone, (b, l, e) in float32 at least, derived by JAX."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    width, length = kernel.shape[0], x.shape[1]
    padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0))).astype(dtype)
    taps = kernel.astype(dtype)
    out = padded[:, :length] * taps[0]
    for i in range(1, width):
        out = out + padded[:, i : i + length] * taps[i]
    return out + bias.astype(dtype)
