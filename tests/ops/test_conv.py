"""Convolutions against XLA's own, values and gradients."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mambamim_jax.model.mask import draw_mask
from mambamim_jax.model.packed import masked_conv3, masked_depthwise_conv3, pack, unpack
from mambamim_jax.ops import upsample_conv, winograd
from mambamim_jax.ops.conv3d import DIMENSIONS_3D, conv3d

TOLERANCE = 1e-5


def same_gradients(ours, reference, *arguments):
    """sin makes the cotangent depend on the values, so values are compared too."""

    def loss(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=tuple(range(len(arguments)))))

    for found, expected in zip(loss(ours)(*arguments), loss(reference)(*arguments), strict=True):
        error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
        assert error < TOLERANCE


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def xla(x, kernel, groups=1, padding="SAME"):
    return lax.conv_general_dilated(
        x, kernel, (1, 1, 1), padding, dimension_numbers=DIMENSIONS_3D, feature_group_count=groups
    )


@pytest.mark.parametrize("shape", [(3, 10, 8, 6), (1, 3, 5, 4)])
@pytest.mark.parametrize("side", [2, 3])
def test_conv3d(shape, side):
    reference = lambda x, k: xla(x, k, padding="VALID")  # noqa: E731
    same_gradients(conv3d, reference, normal(0, *shape, 5), normal(1, side, side, side, 5, 7))


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("depthwise", [True, False])
def test_masked_convolution(patch, masked, depthwise):
    """On packed maps: the convolution of the masked map, its output masked."""
    grid, c = (3, 2, 4), 3
    mask = draw_mask(jax.random.key(0), 2, grid, 0.5) if masked else None
    visible = mask.upsampled(patch)[..., None] if mask is not None else 1.0
    conv = masked_depthwise_conv3 if depthwise else masked_conv3
    kernel = normal(1, 3, 3, 3, c) if depthwise else normal(1, 3, 3, 3, c, 5)

    def reference(x, k):
        y = xla(x * visible, k[..., None, :], groups=c) if depthwise else xla(x * visible, k)
        return y * visible

    ours = lambda x, k: unpack(conv(pack(x, mask), k, mask), mask)  # noqa: E731
    same_gradients(ours, reference, normal(2, 2, *(side * patch for side in grid), c), kernel)


def test_joint_kernels_transpose_few_axes():
    """jax 0.11 on a CPU spends seconds on each transposition of eight small axes, and there were dozens."""

    def loss(up, kernel):
        return jnp.sum(jnp.sin(upsample_conv._joint_kernels(up, kernel)))

    up, kernel = normal(0, 2, 2, 2, 5, 6), normal(1, 3, 3, 3, 6, 7)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(up, kernel).as_text()
    permutations = re.findall(r"stablehlo\.transpose .* dims = \[([\d, ]+)\]", lowered)
    assert permutations
    assert max(len(axes.split(",")) for axes in permutations) < 8


@pytest.mark.parametrize("joined", [True, False])
def test_upsampling_joined_with_its_convolution(joined, monkeypatch):
    x, up, bias, kernel = (
        normal(0, 2, 3, 4, 1, 5),
        normal(1, 2, 2, 2, 5, 6),
        normal(2, 6),
        normal(3, 3, 3, 3, 6, 7),
    )

    def reference(x, up, bias, kernel):
        return xla(upsample_conv.upsample2(x, up) + bias, kernel)

    def ours(x, up, bias, kernel):
        if joined:
            return upsample_conv._joined(x, up, kernel) + upsample_conv._bias_map(x, bias, kernel)
        return upsample_conv.upsample_conv3(x, up, bias, kernel)

    same_gradients(ours, reference, x, up, bias, kernel)


@pytest.mark.parametrize("shape", [(1, 8, 12, 16), (3, 5, 4, 7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6), ("bfloat16", 1e-2)])
def test_minimal_filtering(shape, dtype, tolerance, monkeypatch):
    """Values and the kernel's gradient in several slabs, sides that tiles don't divide; relative to the largest."""
    monkeypatch.setattr(winograd, "_SLAB_BYTES", 100_000)
    monkeypatch.setattr(winograd, "_PARALLEL", 1)  # or else so few channels are one slab
    with jax.enable_x64():
        x, k, g = (
            jnp.asarray(np.random.default_rng(i).normal(size=size), dtype)
            for i, size in enumerate(
                [(shape[0], *(side + 2 for side in shape[1:]), 6), (3, 3, 3, 6, 7), (*shape, 7)]
            )
        )
        exact = [a.astype(jnp.float64) for a in (x, k, g)]
        expected, transpose = jax.vjp(lambda k: xla(exact[0], k, padding="VALID"), exact[1])
        pairs = [
            (jax.jit(winograd.convolve)(x, k), expected),
            (jax.jit(winograd.kernel_gradient)(x, g), transpose(exact[2])[0]),
        ]
        for found, reference in pairs:
            assert found.dtype == dtype
            error = np.max(np.abs(found.astype(jnp.float64) - reference)) / np.max(np.abs(reference))
            assert error < tolerance


def test_slabs_are_enough_for_two_threads_or_fit():
    """Tiles along (w, h, m) of a slab, for a batch of two maps of 12 x 8 x 4 tiles."""
    slab = lambda limit, enough: winograd._slab_tiles((2, 12, 8, 4), limit, enough)  # noqa: E731
    assert slab(limit=20, enough=1) == (4, 1, 1)
    assert slab(limit=20, enough=17) == (8, 1, 1)
    assert slab(limit=20, enough=100) == (8, 4, 1)
    assert slab(limit=10**6, enough=1) == (8, 12, 2)
    assert slab(limit=1, enough=10**6) == (8, 12, 2)
    assert slab(limit=1, enough=1) == (1, 1, 1)
