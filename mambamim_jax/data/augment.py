"""Augmentations of labelled crops: NumPy functions of their arguments alone, and one that draws those arguments.

Images are (h, w, d, c) float32, normalised; label maps (h, w, d) of whole numbers. What moves voxels moves both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mambamim_jax.data import crop
from mambamim_jax.data.planes import nearest
from mambamim_jax.types import NumpyArray, Size3

PLANES = ((0, 1), (0, 2), (1, 2))
"""Pairs of axes that a crop is turned in."""


@dataclass(frozen=True)
class Augmentation:
    """How often (a probability per crop) and how much; the published recipe has the first four."""

    flip: tuple[float, float, float] = (0.2, 0.2, 0.2)
    """Along each axis. The first swaps left and right: 0 where the labels tell them apart. A half turn with a flip
    along its plane's other axis does so, too.
    """
    rotate: float = 0.2
    """By 90, 180 or 270 degrees in one of the three planes."""
    intensity_scale: float = 0.1
    """Times 0.9 to 1.1."""
    intensity_shift: float = 0.1
    """Plus -0.1 to 0.1 (of the window, or of a standard deviation)."""
    zoom: float = 0.0
    zoom_range: tuple[float, float] = (0.7, 1.4)
    """The same along all axes; above 1 enlarges."""
    noise: float = 0.0
    noise_std: float = 0.1
    """At most; of the window, or of a standard deviation."""
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    """Voxels."""
    low_resolution: float = 0.0
    low_resolution_range: tuple[float, float] = (0.5, 1.0)
    """Of the sampling along each axis, brought back to the crop's."""


NONE = Augmentation((0.0, 0.0, 0.0), 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Placement:
    """What is cut and how it is laid into the crop.

    Attributes:
      extent: voxels of the volume to cut; they become the crop when zoomed, then turned, then mirrored.
      turns: quarter turns in the plane of ``axes``.
    """

    extent: Size3
    zoomed: Size3
    turns: int
    axes: tuple[int, int]
    flips: tuple[bool, bool, bool]


def draw_placement(rng: np.random.Generator, how: Augmentation, size: Size3) -> Placement:
    """The geometry of one crop of ``size``; the same count of numbers is drawn whatever the probabilities."""
    flips = crop.draw_flips(rng, how.flip)
    turned, zooms = rng.random() < how.rotate, rng.random() < how.zoom
    turns, axes = int(rng.integers(1, 4)), PLANES[rng.integers(len(PLANES))]
    factor = float(rng.uniform(*how.zoom_range))
    before = list(size)
    if turned and turns % 2:
        before[axes[0]], before[axes[1]] = size[axes[1]], size[axes[0]]
    extent = [max(1, round(n / factor)) for n in before] if zooms else before
    return Placement(_size3(extent), _size3(before), turns if turned else 0, axes, flips)


def place(array: NumpyArray, where: Placement, *, label: bool = False) -> NumpyArray:
    """An array (extent, …) as the crop of a ``Placement``; labels take the nearest voxel."""
    if array.shape[:3] != where.zoomed:
        array = zoom(array, where.zoomed, label=label)
    return crop.flip(np.rot90(array, where.turns, where.axes), where.flips)


def zoom(array: NumpyArray, size: Size3, *, label: bool = False) -> NumpyArray:
    """The array (h, w, d, …) sampled at ``size`` voxels over the same extent, trilinearly or to the nearest."""
    for axis, n in enumerate(size):
        old = array.shape[axis]
        if n == old:
            continue
        where = np.clip((np.arange(n) + 0.5) * (old / n) - 0.5, 0.0, old - 1.0)
        if label:
            # about its own index, as what lies halfway has every time the same parity: it then goes up and down in turn
            index = np.arange(n)
            array = array.take((nearest(where - index) + index).astype(np.intp), axis)
            continue
        low = np.minimum(where.astype(np.intp), max(old - 2, 0))
        share = (where - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(array.ndim)])
        array = array.take(low, axis) * (1 - share) + array.take(np.minimum(low + 1, old - 1), axis) * share
    return array


def change_intensities(rng: np.random.Generator, image: NumpyArray, how: Augmentation) -> NumpyArray:
    """Scale, shift, low resolution, blur and noise, each with its probability: (h, w, d, c) float32."""
    draws, amounts = rng.random(5), rng.random(5)
    scaled, shifted, coarse, blurred, noisy = (
        bool(draw < chance)
        for draw, chance in zip(
            draws, (how.intensity_scale, how.intensity_shift, how.low_resolution, how.blur, how.noise)
        )
    )
    if scaled:
        image = image * np.float32(0.9 + 0.2 * amounts[0])
    if shifted:
        image = image + np.float32(0.2 * amounts[1] - 0.1)
    if coarse:
        image = lower_resolution(image, _between(how.low_resolution_range, amounts[2]))
    if blurred:
        image = blur(image, _between(how.blur_sigma, amounts[3]))
    if noisy:
        deviation = np.float32(how.noise_std * amounts[4])
        image = image + deviation * rng.standard_normal(image.shape, np.float32)
    return image


def lower_resolution(image: NumpyArray, share: float) -> NumpyArray:
    """The image as if sampled at ``share`` of its voxels along each axis: nearest ones taken, then interpolated."""
    size = _size3(image.shape[:3])
    return zoom(zoom(image, _size3([max(1, round(share * n)) for n in size]), label=True), size)


def blur(image: NumpyArray, sigma: float) -> NumpyArray:
    """Gaussian of ``sigma`` voxels in space, each channel alone."""
    return ndimage.gaussian_filter(image, (sigma, sigma, sigma, 0), mode="nearest", truncate=3.0)


def _between(ends: tuple[float, float], share: float) -> float:
    return float(ends[0] + (ends[1] - ends[0]) * share)


def _size3(sides: list[int] | tuple[int, ...]) -> Size3:
    h, w, d = sides
    return h, w, d
