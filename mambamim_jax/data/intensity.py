"""Intensities as a network gets them, channel by channel: the same function for training and prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mambamim_jax.data.volume import window_intensity
from mambamim_jax.types import NumpyArray

KINDS = ("window", "zscore")


def normalise(image: NumpyArray, how: Sequence[Mapping[str, Any]]) -> NumpyArray:
    """A resampled image (h, w, d, c) as a network gets it, float32.

    Args:
        image: any number type; HU for CT.
        how: for each channel {"kind": "window", "low": HU, "high": HU}, clipped and scaled to [0, 1], or
            {"kind": "zscore"}, less the mean and divided by the deviation of the channel's non-zero voxels
            over the whole volume; zero voxels (no scan there) stay 0.

    Raises:
        ValueError: another number of channels, or an unknown kind.
    """
    if image.ndim != 4 or image.shape[-1] != len(how):
        raise ValueError(f"image of shape {image.shape}, expected (h, w, d, {len(how)})")
    result = np.empty(image.shape, np.float32)
    for channel, rule in enumerate(how):
        values = image[..., channel]
        if rule["kind"] == "window":
            result[..., channel] = window_intensity(values, (rule["low"], rule["high"]))
        elif rule["kind"] == "zscore":
            result[..., channel] = zscore(values)
        else:
            raise ValueError(f"normalisation {rule['kind']!r}, expected one of {', '.join(KINDS)}")
    return result


def zscore(values: NumpyArray) -> NumpyArray:
    """(v - mean) / deviation over the non-zero voxels, zero elsewhere; float32, any shape."""
    values = values.astype(np.float32)
    inside = values != 0
    if not inside.any():
        return values
    known = values[inside]
    mean, deviation = known.mean(dtype=np.float64), known.std(dtype=np.float64)
    return np.where(inside, (values - mean) / max(float(deviation), 1e-8), 0.0).astype(np.float32)
