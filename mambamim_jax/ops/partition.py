"""The mesh that a program is partitioned over, for the few operations that the compiler does not split well by itself.

The mesh is the ambient one (`jax.sharding.use_abstract_mesh` around the traced function). Without one, or with a
single device, everything here does nothing.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from mambamim_jax.types import Array

ROWS = ("data", "fsdp")
"""Mesh axes that divide the batch."""
WIDTH = "model"
"""Mesh axis that divides channels."""
SPACE = "space"
"""Mesh axis that divides crops. Nothing here names it: the compiler carries it through."""


def ambient() -> Any:
    """The mesh to partition over, or None: no mesh, one device, or inside a function that is already one part."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh if {*ROWS, WIDTH} <= {*mesh.axis_names} else None


def rows(size: int) -> tuple[str, ...] | None:
    """The axes that a batch of this size is divided over, None where it does not divide."""
    mesh = ambient()
    return ROWS if mesh and size % math.prod(mesh.shape[axis] for axis in ROWS) == 0 else None


def width(size: int) -> str | None:
    """The axis that so many channels are divided over, None where they do not divide."""
    mesh = ambient()
    return WIDTH if mesh and size % mesh.shape[WIDTH] == 0 else None


def by_width(x: Array) -> Array:
    """x with its last axis, channels, divided over the mesh: tells the compiler to move it before it is used."""
    if ambient() is None:
        return x
    spec = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1), width(x.shape[-1]))
    return jax.lax.with_sharding_constraint(x, spec)
