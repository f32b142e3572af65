"""Where a run's arrays live: a mesh of devices, and rules by path that say how each tensor is divided over it.

The mesh has four axes: ``data`` and ``fsdp`` divide the batch; ``fsdp`` also divides the matrices and kernels and
their moments; ``model`` divides the widths of convolutions and of Mamba; ``space`` divides crops along their first
axis, the exchange of borders left to the compiler. Networks know nothing of it.
Under `jax.jit` a batch that is divided is one batch still: sums, BatchNorm and the loss are global.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mambamim_jax.checks import ConfigError
from mambamim_jax.ops.partition import ROWS, SPACE, WIDTH
from mambamim_jax.settings import MeshConfig
from mambamim_jax.train.optim import map_with_path
from mambamim_jax.types import NumpyArray

AXES = (*ROWS, WIDTH, SPACE)
F = TypeVar("F", bound=Callable[..., Any])

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"mamba/(x_proj|out_proj)/kernel$", ("model", "fsdp")),
    (r"(fc2|project)/kernel$", ("model", "fsdp")),
    (r"mamba/A_log$", ("model", None)),
    (r"mamba/(conv_kernel|conv_bias|dt_bias|D)$", ("model",)),
    (r"depthwise/kernel$", ("model",)),
    (r"(decoder|classify|aux/\d+)/kernel$", ("fsdp", None)),
    (r"transition$", ("fsdp", None)),
    (r"kernel$", ("fsdp", "model")),
)
"""(path, axes of the tensor's last dimensions); the first that matches counts, and what matches none stays whole.

Kernels end in (in, out). One that reads what another has widened is divided over its inputs, so that a pair needs a
single sum over devices. Biases, norms, batch statistics and mask tokens are vectors of a few hundred numbers."""


def divide(path: str, shape: Sequence[int], sizes: dict[str, int]) -> PartitionSpec:
    """How a tensor is divided.

    Where ``fsdp`` does not divide its dimension it joins ``model``'s, or else leaves the tensor whole.

    Args:
      path: as ``optim.paths`` writes it. shape: the tensor's. sizes: of the mesh's axes.

    Raises: ConfigError where ``model`` does not divide a width.
    """
    wanted = next((axes for pattern, axes in RULES if re.search(pattern, path)), ())
    names = [None] * (len(shape) - len(wanted)) + list(wanted)
    place = {name: dim for dim, name in enumerate(names) if name}
    spec: list[Any] = [name if name and sizes[name] > 1 else None for name in names]
    width, fsdp = place.get(WIDTH), place.get("fsdp")
    if width is not None and shape[width] % sizes[WIDTH]:
        found = f"{sizes[WIDTH]} devices for {path} {tuple(shape)}"
        advice = f"choose a divisor of {math.gcd(*shape[-2:])}"
        raise ConfigError("config.mesh.model", found, f"a divisor of {shape[width]} channels", advice)
    if fsdp is not None and shape[fsdp] % sizes["fsdp"]:
        spec[fsdp] = None
        if width is not None and shape[width] % (sizes[WIDTH] * sizes["fsdp"]) == 0:
            spec[width] = (WIDTH, "fsdp")
    return PartitionSpec(*spec)


@dataclass(frozen=True)
class Placement:
    """A mesh, and what goes where on it."""

    mesh: Mesh

    @property
    def everywhere(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def by_rows(self) -> NamedSharding:
        """The first dimension, the batch, divided over ``data`` and ``fsdp``."""
        return NamedSharding(self.mesh, PartitionSpec(ROWS))

    def of_batch(self, dimensions: int) -> NamedSharding:
        """Of a part of the batch: rows over ``data`` and ``fsdp``, maps (m, h, w, d[, c]) over ``space`` too."""
        return NamedSharding(self.mesh, PartitionSpec(ROWS, SPACE)) if dimensions > 3 else self.by_rows

    def shardings(self, state: Any) -> Any:
        """The tree's sharding, leaf by leaf.

        Raises: ConfigError where ``model`` does not divide a width.
        """
        sizes = dict(self.mesh.shape)
        return map_with_path(lambda p, leaf: NamedSharding(self.mesh, divide(p, leaf.shape, sizes)), state)

    def like(self, state: Any) -> Any:
        """Shapes and dtypes with their shardings, for restoring."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            self.shardings(state),
        )

    def traced(self, function: F) -> F:
        """The function, traced with the mesh around it so that ``ops.partition`` sees it."""

        def under_mesh(*args: Any) -> Any:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return function(*args)

        return under_mesh  # type: ignore[return-value]

    def gathering(self, loss: F) -> F:
        """The loss, its parameters put together over ``fsdp`` first.

        Left to itself the compiler moves the batch's activations instead where these are the smaller.
        """
        sizes = dict(self.mesh.shape)
        if sizes["fsdp"] == 1:
            return loss

        def whole(path: str, leaf: Any) -> Any:
            spec = divide(path, leaf.shape, sizes)
            kept = PartitionSpec(*(WIDTH if WIDTH in (axes or ()) else None for axes in spec))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, kept))

        return lambda params, *rest: loss(map_with_path(whole, params), *rest)  # type: ignore[return-value]

    def rows(self, batch: int) -> range:
        """The rows of a global batch of this size that this process's devices hold, and so has to read."""
        spans = self.by_rows.addressable_devices_indices_map((batch,)).values()
        bounds = sorted({(rows[0].start or 0, rows[0].stop or batch) for rows in spans if rows})
        first, stop = bounds[0][0], bounds[-1][1]
        return range(first, stop)

    def put(self, batch: dict[str, NumpyArray]) -> dict[str, jax.Array]:
        """This process's rows of each part → arrays over all devices; does not wait for the transfer."""
        shardings = {name: self.of_batch(part.ndim) for name, part in batch.items()}
        if not self.mesh.is_multi_process:
            return jax.device_put(batch, shardings)
        return {name: self._of_rows(shardings[name], part) for name, part in batch.items()}

    def flag(self, value: int) -> jax.Array:
        """int32 (devices,): this process's value on each of its devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXES))
        one = np.full(1, value, np.int32)
        return jax.make_array_from_callback((self.mesh.size,), sharding, lambda index: one)

    def _of_rows(self, sharding: NamedSharding, part: NumpyArray) -> jax.Array:
        """This process's rows, whole, as its devices' share of the global array."""
        groups = math.prod(self.mesh.shape[axis] for axis in ROWS)
        mine = self.rows(groups)
        each = len(part) // len(mine)

        def piece(index: Any) -> NumpyArray:
            first, stop, _ = index[0].indices(groups * each)
            return part[first - mine.start * each : stop - mine.start * each][(slice(None), *index[1:])]

        return jax.make_array_from_callback((groups * each, *part.shape[1:]), sharding, piece)

    def whole(self, array: Any) -> jax.Array:
        """A host array, the same on all processes, copied to every device."""
        return _placed(np.asarray(array), self.everywhere)

    def spread(self, state: Any) -> Any:
        """A whole state on the host, the same on all processes, divided over the devices."""
        return jax.tree.map(_placed, state, self.shardings(state))

    def bytes_per_device(self, state: Any) -> int:
        """What one device holds of a state."""
        shards = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
                              state, self.shardings(state))  # fmt: skip
        return sum(jax.tree.leaves(shards))


def _placed(array: NumpyArray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def host_device() -> jax.Device | None:
    """The processor as a device, which JAX has beside an accelerator; None where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@cache
def _replicating(function: Callable, mesh: Mesh | None) -> Callable:
    return jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()) if mesh else None)


def on_host(function: Callable[[Any], Any], tree: Any) -> Any:
    """function(tree), computed where the tree lies and fetched to every process's host."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return jax.device_get(_replicating(function, mesh)(tree))


def one_device() -> Placement:
    """The mesh of the first device alone."""
    return make_placement(MeshConfig(), 1, jax.local_devices()[:1])


def make_placement(config: MeshConfig, batch: int, devices: Sequence[jax.Device] | None = None) -> Placement:
    """The mesh that the settings ask for, over all devices.

    Args:
      config: sizes of the axes, one of which may be -1: what the others leave.
      batch: rows that are computed at once, of all devices together.

    Raises: ConfigError where sizes, devices and batch do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
    given = math.prod(size for size in sizes.values() if size != -1)
    asked = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != SPACE or size != 1)
    if open_axis and len(devices) % given == 0:
        sizes[open_axis] = len(devices) // given
    elif open_axis or given != len(devices):
        advice = "set one of config.mesh.{data,fsdp,model} to -1 to take what the others leave"
        expected = f"sizes whose product is the {len(devices)} devices here"
        raise ConfigError("config.mesh", f"found {asked}", expected, advice)
    parts = math.prod(sizes[axis] for axis in ROWS)
    if batch % parts:
        found = f"data × fsdp = {parts} devices for {batch} crops at once"
        advice = "change data.volumes_per_batch, optim.accumulate or move devices to mesh.model"
        raise ConfigError("config.mesh", found, "a number that divides them", advice)
    shape = tuple(sizes.values())
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    return Placement(mesh)
