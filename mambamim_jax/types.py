"""The axis legend of the whole package, and names for its arrays.

Arrays are channels last. One letter means one axis everywhere, in docstrings and in einops patterns:

    b      batch (crops)                 h w d  voxels along right, anterior, superior (RAS)
    g      side of the patch grid        p      side of a patch in voxels (16)
    l      tokens, g*g*g in raster order k      kept (active) tokens
    c      channels                      e      inner width of a Mamba layer
    n      state size                    s      scale of a feature pyramid, 0 the deepest

Raster order: ``h`` slowest, ``d`` fastest. Lengths are in mm, intensities of CT in HU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import jax
    import numpy as np

    Array: TypeAlias = jax.Array
    NumpyArray: TypeAlias = np.ndarray
else:
    Array = Any
    NumpyArray = Any

Size3: TypeAlias = tuple[int, int, int]
Spacing: TypeAlias = tuple[float, float, float]
Tree: TypeAlias = Mapping[str, Any]
"""A nested plain dict of arrays, as ``nnx.to_pure_dict`` makes it."""
