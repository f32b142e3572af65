"""3x3x3 convolution by minimal filtering, F(2,3) along each axis, for CPUs (Lavin & Gray 2016, arXiv 1509.09308).

A tile of 2^3 outputs reads 4^3 inputs. With three small matrices along every axis,

    y = A^T [(G k) * (B^T x)],

the product * being 64 matrix products over channels: 8 multiplications per output, input and output channel where the
sum over taps takes 27. Gradients are the transposes of the same maps around the same products, so they save as much.
Float32 stays within 6e-7 of the largest output, the sum over taps within 3e-7. F(4,3), with 3.4 multiplications, only
within 5e-6, which the segmentation network's goldens don't bear. Maps are transformed a slab of tiles at a time, so
that the transformed copies, 8 times the map, stay in cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from mambamim_jax.types import Array

TILE = 2
_REACH = TILE + 2
_POINTS = _REACH**3
_SLAB_BYTES = 8 * 2**20
"""Transformed copies of one slab, if the transformed kernel isn't larger: a share of a last-level cache."""
_PARALLEL = 1.75e6
"""Multiplications of one product from which XLA's library (Eigen) runs it on two threads; measured."""
_WIDE = 64**2
"""Entries of a kernel's gradient from which a second thread gains more than a larger slab costs; measured."""


# F(2,3) at the points 0, 1, -1 and infinity.
_BT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]])
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_AT = np.array([[1, 1, 1, 0], [0, 1, -1, 1]])


def pays(outputs: Sequence[int], c: int, o: int) -> bool:
    """Whether this beats the sum over taps, for outputs (m, h, w, d) and c to o channels.

    The constants are measured: a transform costs a tile's channel about 32 multiplications a point, transforming the
    kernel about as much as its product with 60 tiles.
    """
    m, *sides = outputs
    tiles = m * math.prod(-(-side // TILE) for side in sides)
    filtering = _POINTS * (tiles * (c * o + 32 * (c + o)) + 60 * c * o)
    return filtering < 27 * m * math.prod(sides) * c * o


def convolve(x: Array, kernel: Array) -> Array:
    """The 3x3x3 convolution of (m, h+2, w+2, d+2, c), with its border, to (m, h, w, d, o), dtype of x.

    kernel is (3, 3, 3, c, o). No derivative of its own.
    """
    m, h, w, d = (side - 2 * (axis > 0) for axis, side in enumerate(x.shape[:4]))
    c, o = kernel.shape[3:]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x = _to_whole_tiles(x, 2)
    points = lax.optimization_barrier(_kernel_points(kernel.astype(wide)))
    sides = [m, *(side - 2 for side in x.shape[1:4])]
    slab, starts = _slabs(sides, c, o, enough=_PARALLEL / (c * o))

    def add(step: Array, y: Array) -> Array:
        start = starts(step)
        xs = lax.dynamic_slice(x, start, (slab[0], *(side + 2 for side in slab[1:]), c)).astype(wide)
        products = jnp.einsum("zyxmhwdc,zyxco->zyxmhwdo", _input_points(xs), points)
        return lax.dynamic_update_slice(y, _from_points(products).astype(y.dtype), start)

    steps = math.prod(sides) // math.prod(slab)
    y = lax.fori_loop(0, steps, add, jnp.zeros((*sides, o), x.dtype))
    return y[:, :h, :w, :d]


def kernel_gradient(x: Array, g: Array) -> Array:
    """Gradient (3, 3, 3, c, o) of `convolve`'s kernel, of its input with the border and its output's cotangent."""
    c, o = x.shape[-1], g.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, g = _to_whole_tiles(x, 2), _to_whole_tiles(g, 0)
    slab, starts = _slabs(g.shape[:4], c, o, enough=_PARALLEL / (c * o) if c * o >= _WIDE else 1)

    def add(step: Array, total: Array) -> Array:
        start = starts(step)
        xs = lax.dynamic_slice(x, start, (slab[0], *(side + 2 for side in slab[1:]), c)).astype(wide)
        gs = lax.dynamic_slice(g, start, (*slab, o)).astype(wide)
        return total + jnp.einsum("zyxmhwdc,zyxmhwdo->zyxco", _input_points(xs), _output_points(gs))

    steps = math.prod(g.shape[:4]) // math.prod(slab)
    total = lax.fori_loop(0, steps, add, jnp.zeros((*(_REACH,) * 3, c, o), wide))
    for axis in (2, 1, 0):
        total = jnp.stack(_combine(_G.T, list(total)), axis)
    return total.astype(x.dtype)


def _to_whole_tiles(x: Array, border: int) -> Array:
    """Zeros behind each axis up to a multiple of the tile, besides the border."""
    missing = [(0, -(side - border) % TILE) for side in x.shape[1:4]]
    return jnp.pad(x, ((0, 0), *missing, (0, 0))) if any(after for _, after in missing) else x


def _slabs(sides: Sequence[int], c: int, o: int, enough: float):
    """Outputs (m, h, w, d) of one slab, all of d, and the function from a slab's number to where it starts."""
    limit = max(_SLAB_BYTES, 2 * _POINTS * c * o * 4) / (_POINTS * (c + o) * 4)
    m, h, w, d = sides[0], *(side // TILE for side in sides[1:])
    across, rows, samples = _slab_tiles((m, h, w, d), limit, enough)
    counts = (m // samples, h // rows, w // across)
    slab = (samples, TILE * rows, TILE * across, sides[3])

    def starts(step: Array) -> tuple[Array | int, ...]:
        i, j = step // (counts[1] * counts[2]), step // counts[2] % counts[1]
        return i * slab[0], j * slab[1], step % counts[2] * slab[2], 0, 0

    return slab, starts


def _slab_tiles(tiles: Sequence[int], limit: float, enough: float) -> tuple[int, int, int]:
    """Tiles of a slab along (w, h, m), with all of d: the most within the limit, or if too few the fewest enough."""
    m, h, w, d = tiles
    slabs = (
        [(n, 1, 1) for n in _divisors(w)]
        + [(w, n, 1) for n in _divisors(h)]
        + [(w, h, n) for n in _divisors(m)]
    )
    within = max((slab for slab in slabs if d * math.prod(slab) <= limit), key=math.prod, default=slabs[0])
    if d * math.prod(within) >= enough:
        return within
    return min((slab for slab in slabs if d * math.prod(slab) >= enough), key=math.prod, default=slabs[-1])


def _divisors(total: int) -> list[int]:
    return [n for n in range(1, total + 1) if total % n == 0]


def largest_divisor(total: int, limit: float) -> int:
    """The largest divisor of total that is at most limit, at least 1."""
    return next((n for n in range(int(min(limit, total)), 1, -1) if total % n == 0), 1)


def _combine(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """matrix @ parts, the zeros left out; as sums of arrays it becomes one loop over memory."""
    sums = []
    for row in matrix:
        terms = [part if w == 1 else part * float(w) for w, part in zip(row, parts, strict=True) if w]
        sums.append(sum(terms[1:], terms[0]))
    return sums


# The barriers keep one axis's sums from being computed anew in every sum of the next.


def _input_points(x: Array) -> Array:
    """B^T x along each axis: (m, 2h+2, 2w+2, 2d+2, c) to (4, 4, 4, m, h, w, d, c), axes of points as d, w, h."""
    for axis in (1, 3, 5):  # each step puts an axis of points in front
        count = (x.shape[axis] - 2) // TILE
        ends = [i + TILE * (count - 1) + 1 for i in range(_REACH)]
        parts = [lax.slice_in_dim(x, i, end, TILE, axis) for i, end in enumerate(ends)]
        x = lax.optimization_barrier(jnp.stack(_combine(_BT, parts)))
    return x


def _output_points(g: Array) -> Array:
    """A g along each axis, the transpose of `_from_points`."""
    for axis in (1, 3, 5):
        tiles = g.reshape(*g.shape[:axis], -1, TILE, *g.shape[axis + 1 :])
        parts = [lax.index_in_dim(tiles, i, axis + 1, keepdims=False) for i in range(TILE)]
        g = lax.optimization_barrier(jnp.stack(_combine(_AT.T, parts)))
    return g


def _from_points(y: Array) -> Array:
    """A^T y along each axis: (4, 4, 4, m, h, w, d, o), axes of points as d, w, h, to (m, 2h, 2w, 2d, o)."""
    for axis in (6, 4, 2):  # behind d, then w, then h
        y = jnp.stack(_combine(_AT, list(lax.optimization_barrier(y))), axis)
    m, h, _, w, _, d, _, o = y.shape
    return y.reshape(m, TILE * h, TILE * w, TILE * d, o)


def _kernel_points(kernel: Array) -> Array:
    """G k along each axis: (3, 3, 3, c, o) to (4, 4, 4, c, o), axes of points as d, w, h."""
    for axis in range(3):  # each step puts an axis of points in front
        parts = [lax.index_in_dim(kernel, i, axis, keepdims=False) for i in range(3)]
        kernel = jnp.stack(_combine(_G, parts))
    return kernel
