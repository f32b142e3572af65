"""From the loader to the device: the next batch travels while a step is computed, as int16 HU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from mambamim_jax.checks import ConfigError
from mambamim_jax.types import Array, NumpyArray

Batch = dict[str, Any]


class Stream(Protocol):
    """An endless iterator over batches that can be resumed."""

    def __next__(self) -> dict[str, NumpyArray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Loader(Protocol):
    """What the loop needs of the data."""

    @property
    def batches_per_epoch(self) -> Fraction: ...
    def __iter__(self) -> Stream: ...


class Feed(Iterator[Batch]):
    """A stream's batches on the device, double-buffered: one is used, one may be on its way.

    The state is that of what was handed out, whatever was read ahead.

    Args:
      stream: from ``iter(loader)``. names: the parts of a batch that are wanted.
      place: puts a batch of host arrays on the device or devices, without waiting for it to arrive.
    """

    def __init__(
        self,
        stream: Stream,
        names: tuple[str, ...],
        place: Callable[[dict[str, NumpyArray]], Batch] = jax.device_put,
    ) -> None:
        self._stream, self._names, self._place = stream, names, place
        self._ahead: deque[tuple[Batch, dict[str, Any]]] = deque()
        self._state = stream.get_state()

    def __next__(self) -> Batch:
        self.advance()
        batch, self._state = self._ahead.popleft()
        return batch

    def advance(self) -> None:
        """Sends the next batch on its way, if none is: to be called once a step has been dispatched."""
        if not self._ahead:
            batch = next(self._stream)
            placed = self._place({name: batch[name] for name in self._names})
            self._ahead.append((placed, self._stream.get_state()))

    def get_state(self) -> dict[str, Any]:
        """The stream's state after the last batch handed out."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state.

        Raises: ValueError if it belongs to other data.
        """
        self._stream.set_state(state)
        self._ahead.clear()
        self._state = state

    def resume(self, state: dict[str, Any], workdir: Path) -> None:
        """Goes on from the state that the checkpoint of a run in a workdir holds.

        Raises: ConfigError if it belongs to other data.
        """
        try:
            self.set_state(state)
        except ValueError as error:
            expected, advice = f"the data of the run in {workdir}", "use those, or another --workdir"
            raise ConfigError("config.data", str(error), expected, advice) from error


def window(image: Array, limits: tuple[float, float]) -> Array:
    """HU of an integer type → float32 in [0, 1], bit for bit as ``data.volume.window_intensity`` does it.

    Images in a floating-point type are windowed already and stay as they are.
    """
    if not jnp.issubdtype(image.dtype, jnp.integer):
        return image
    low, high = limits
    scaled = (image.astype(jnp.float32) - jnp.float32(low)) * jnp.float32(1.0 / (high - low))
    return jnp.clip(scaled, 0.0, 1.0)
