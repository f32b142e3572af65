"""Dense 3D convolution with small cubic kernels, with a faster way for CPUs.

Elsewhere it is XLA's own convolution. On a CPU XLA runs a 3D convolution two to three times slower than what its
matrix kernels allow. There minimal filtering (`winograd`) does the 3x3x3 ones whose channels and maps are large
enough. Of the others a padded one is a sum of three 2D convolutions, which XLA gives to a library, and the gradient
of the kernel is three matrix products of shifted copies of both sides, a few rows at a time so that the copies stay
in cache. On a mesh it is XLA's own again: that one the compiler can divide over devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mambamim_jax.ops import partition, winograd
from mambamim_jax.types import Array

DIMENSIONS_3D = ("NDHWC", "DHWIO", "NDHWC")
DIMENSIONS_2D = ("NHWC", "HWIO", "NHWC")
_SHIFTED_BYTES = 8 * 2**20
"""Size of the shifted copies of one step of `_kernel_gradient_on_cpu`: a share of a last-level cache."""


@jax.custom_vjp
def conv3d(x: Array, kernel: Array) -> Array:
    """y[v] = sum over taps t in {0..r-1}^3 of x[v + t] @ kernel[t].

    Args:
      x: (m, h+r-1, w+r-1, d+r-1, c), with its border.
      kernel: (r, r, r, c, o), dtype of x.

    Returns:
      (m, h, w, d, o), dtype of x.
    """
    return convolve(x, kernel)


def convolve(x: Array, kernel: Array) -> Array:
    """`conv3d` without its derivative, for use inside other derivatives."""
    if partition.ambient():
        return _forward(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_forward_on_cpu, default=_forward)


def convolve_padded(x: Array, kernel: Array) -> Array:
    """3x3x3 convolution with zero padding, (m, h, w, d, c) to (m, h, w, d, o); without a derivative of its own."""
    if partition.ambient():
        return _padded(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_padded_on_cpu, default=_padded)


def kernel_gradient(x: Array, g: Array) -> Array:
    """Gradient (r, r, r, c, o) of the kernel, of `conv3d`'s input with its border and its output's cotangent."""
    if partition.ambient():
        return _kernel_gradient(x, g)
    return lax.platform_dependent(x, g, cpu=_kernel_gradient_on_cpu, default=_kernel_gradient)


def _forward(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1, 1), "VALID", dimension_numbers=DIMENSIONS_3D)


def _forward_on_cpu(x: Array, kernel: Array) -> Array:
    sides = [side - 2 for side in x.shape[1:4]]
    if len(kernel) == 3 and winograd.pays((len(x), *sides), *kernel.shape[3:]):
        return winograd.convolve(x, kernel)
    return _forward(x, kernel)


def _padded(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=DIMENSIONS_3D)


def _padded_on_cpu(x: Array, kernel: Array) -> Array:
    """Minimal filtering, or the sum over planes: a library is twice as fast when left the padding within them."""
    m, h, w, d, c = x.shape
    if winograd.pays(x.shape[:4], c, kernel.shape[-1]):
        return winograd.convolve(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0))), kernel)
    bordered = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    total = jnp.zeros((m * h, w, d, kernel.shape[-1]), x.dtype)
    for i in range(3):
        planes = bordered[:, i : i + h].reshape(m * h, w, d, c)
        total += lax.conv_general_dilated(planes, kernel[i], (1, 1), "SAME", dimension_numbers=DIMENSIONS_2D)
    return total.reshape(m, h, w, d, -1)


def _kernel_gradient(x: Array, g: Array) -> Array:
    r = x.shape[1] - g.shape[1] + 1
    shape = (r, r, r, x.shape[-1], g.shape[-1])
    (dk,) = jax.linear_transpose(lambda k: _forward(x, k), jax.ShapeDtypeStruct(shape, x.dtype))(g)
    return dk


def _shifted_products(x: Array, g: Array) -> Array:
    """Kernel gradient (r, r, c, r, o) as r products: x carries the shift along w, g the opposite one along d."""
    h, w, d, o = g.shape[1:]
    r, c = x.shape[1] - h + 1, x.shape[-1]
    xs = jnp.concatenate([x[:, :, j : j + w] for j in range(r)], axis=-1)
    padded = jnp.pad(g, ((0, 0), (0, 0), (0, 0), (r - 1, r - 1), (0, 0)))
    starts = range(r - 1, -1, -1)
    gs = jnp.concatenate([padded[:, :, :, start : start + d + r - 1] for start in starts], axis=-1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    products = [
        jnp.einsum("mhwda,mhwdb->ab", xs[:, i : i + h], gs, preferred_element_type=wide) for i in range(r)
    ]
    return jnp.stack(products).reshape(r, r, c, r, o)


def _kernel_gradient_on_cpu(x: Array, g: Array) -> Array:
    m, h, w, d, o = g.shape
    r, c = x.shape[1] - h + 1, x.shape[-1]
    if r == 3 and winograd.pays(g.shape[:4], c, o):
        return winograd.kernel_gradient(x, g)
    fitting = _SHIFTED_BYTES / (w * (d + r - 1) * r * (c + o) * x.dtype.itemsize)
    rows, samples = winograd.largest_divisor(h, fitting), winograd.largest_divisor(m, fitting / h)
    bands = h // rows

    def add(total: Array, step: Array) -> tuple[Array, None]:
        sample, row = step // bands * samples, step % bands * rows
        xs = lax.dynamic_slice(x, (sample, row, 0, 0, 0), (samples, rows + r - 1, *x.shape[2:]))
        gs = lax.dynamic_slice(g, (sample, row, 0, 0, 0), (samples, rows, w, d, o))
        return total + _shifted_products(xs, gs), None

    zeros = jnp.zeros((r, r, c, r, o), jnp.promote_types(x.dtype, jnp.float32))
    total, _ = lax.scan(add, zeros, jnp.arange(m // samples * bands))
    return total.swapaxes(2, 3).astype(x.dtype)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    border = (len(kernel) - 1,) * 2
    flipped = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    padded = jnp.pad(g, ((0, 0), border, border, border, (0, 0)))
    return convolve(padded, flipped), kernel_gradient(x, g)


conv3d.defvjp(lambda x, kernel: (conv3d(x, kernel), (x, kernel)), _backward)
