"""A network over volumes of any size: overlapping windows, Gaussian weights, test-time flips, bounded memory.

Windows stand where MONAI's ``sliding_window_inference`` puts them: every ``int(window * (1 - overlap))`` voxels, the
last one moved back to the volume's end; a volume smaller than the window gets zeros on both sides. Outputs are
weighted by the same Gaussian (deviation an eighth of the window, 1e-3 at least) and averaged.

The average is made while the windows move along the longest axis, so that only a window's thickness of it is held:
cross-section x window x classes float32, however long the volume.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mambamim_jax.checks import MOST_OVERLAP
from mambamim_jax.types import Array, NumpyArray, Size3, Tree

Network: TypeAlias = Callable[[Tree, Array], Array]
"""(params, x (b, h, w, d, c)) → (b, h, w, d, classes)."""
SIGMA, FLOOR = 0.125, 1e-3
UNDER_WAY = 2
"""Batches of windows computed at once."""


class SlidingWindow:
    """Compiled once, for every volume, every set of parameters and every other window on the same function.

    Args:
      network: pure; what it returns is averaged as it is, so give probabilities where those are to be averaged.
      window: voxels (h, w, d).
      overlap: share of a window that the next one covers again, from 0 to ``MOST_OVERLAP``.
      batch: windows computed together; the last batch of a volume is filled up.
      flips: axes (0, 1, 2) to flip, in all combinations; outputs are flipped back and averaged.

    Raises: ValueError for a window, an overlap, a batch or an axis that cannot be.
    """

    def __init__(
        self,
        network: Network,
        window: Size3,
        *,
        overlap: float = 0.5,
        batch: int = 1,
        flips: Sequence[int] = (),
    ):
        if not 0 <= overlap <= MOST_OVERLAP:
            raise ValueError(f"overlap: found {overlap}, expected a share from 0 to {MOST_OVERLAP}")
        sizes = tuple(window) if np.shape(window) == (3,) else ()
        if not sizes or any(int(n) != n or n < 1 for n in (*sizes, batch)) or not {*flips} <= {0, 1, 2}:
            raise ValueError(
                f"window {window}, batch {batch}, flips {flips}: expected three sizes and a batch above 0, axes 0 to 2"
            )
        h, w, d = (int(n) for n in sizes)
        self.window, self.overlap, self.batch = (h, w, d), overlap, int(batch)
        self.weight = gaussian(self.window)
        choices = [(False, True) if axis in flips else (False,) for axis in range(3)]
        self.turns = [np.array(turn) for turn in itertools.product(*choices)]

        self._run, self._warm = _compiled(network, len(self.turns) > 1), False

    def __call__(self, image: NumpyArray, members: Sequence[Tree]) -> NumpyArray:
        """The averaged output on the whole volume, (h, w, d, classes) float32; see ``stream`` to hold less."""
        slabs = [values for _, values in self.stream(image, members)]
        return np.concatenate(slabs, self.stream_axis(image.shape))

    def stream(
        self, image: NumpyArray, members: Sequence[Tree], progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[int, NumpyArray]]:
        """The averaged output in slabs, in order, without gaps, along ``stream_axis``.

        Args:
          image: (h, w, d, c).
          members: parameters of an ensemble, of one or more.
          progress: called with (windows done, windows).

        Yields:
          (the slab's first index along the axis, its values (h, w, d, classes) float32).

        Raises: ValueError for an image or members that cannot be, and for a network's output of another size.
        """
        _check(image, members)
        volume, before = pad(image, self.window)
        axis = self.stream_axis(image.shape)
        inside = [slice(b, b + n) for b, n in zip(before, image.shape)]
        inside[axis] = slice(None)  # padded along the longest axis only if one window holds it all
        length, first = image.shape[axis], before[axis]
        slab: _Slab | None = None
        places = self.places(volume.shape)
        for number, (place, output) in enumerate(self._outputs(volume, places, members), start=1):
            if slab is None:
                slab = _Slab(volume.shape[:3], axis, self.weight, output.shape[-1])
            if place[axis] > slab.start:
                yield slab.start, slab.take(place[axis])[tuple(inside)]
            slab.add(place, output)
            if progress:
                progress(number, len(places))
        assert slab is not None
        start, values = slab.start, slab.take(volume.shape[axis])
        inside[axis] = slice(first, first + length) if first else slice(length - start)
        yield start, values[tuple(inside)]

    def stream_axis(self, shape: Sequence[int]) -> int:
        """The axis along which windows move last: the longest."""
        return int(np.argmax(np.maximum(shape[:3], self.window)))

    def places(self, shape: Sequence[int]) -> list[Size3]:
        """First voxels of the windows on a volume not smaller than one, in the order of computation."""
        axis = self.stream_axis(shape)
        starts = [window_starts(n, w, self.overlap) for n, w in zip(shape, self.window)]
        return sorted(itertools.product(*starts), key=lambda place: (place[axis], place))  # type: ignore

    def _outputs(
        self, volume: NumpyArray, places: Sequence[Size3], members: Sequence[Tree]
    ) -> Iterator[tuple[Size3, NumpyArray]]:
        """Every window's place and output, in order.

        Two batches are under way, each on a thread: on an accelerator one is read while the next is computed, on a
        CPU the parts of the network that XLA runs on one core overlap. The first is alone, since it also compiles.
        """
        members = [jax.device_put(params) for params in members]
        batches = [places[begin : begin + self.batch] for begin in range(0, len(places), self.batch)]

        def output(some: Sequence[Size3]) -> NumpyArray:
            x = np.zeros((self.batch, *self.window, volume.shape[-1]), np.float32)
            for n, place in enumerate(some):
                x[n] = volume[tuple(slice(p, p + w) for p, w in zip(place, self.window))]
            return np.asarray(self._average(jax.device_put(x), members))

        if not self._warm:
            first = batches.pop(0)
            values, self._warm = output(first), True
            yield from zip(first, values)
        with ThreadPoolExecutor(UNDER_WAY) as threads:
            waiting: deque[tuple[Sequence[Size3], Future[NumpyArray]]] = deque()
            for some in batches:
                waiting.append((some, threads.submit(output, some)))
                if len(waiting) > UNDER_WAY:
                    done, found = waiting.popleft()
                    yield from zip(done, found.result())
            for done, found in waiting:
                yield from zip(done, found.result())

    def _average(self, x: Array, members: Sequence[Any]) -> Array:
        outputs = [self._run(params, x, turn) for params in members for turn in self.turns]
        return outputs[0] if len(outputs) == 1 else sum(outputs[1:], outputs[0]) / len(outputs)


@functools.lru_cache(maxsize=8)
def _compiled(network: Network, flipping: bool) -> Callable[..., Array]:
    """The jitted network; one and the same for the same function, which then is not compiled again."""

    def run(params: Tree, x: Array, turn: Array) -> Array:
        y = network(params, flip(x, turn) if flipping else x)
        if len(y.shape) != 5 or y.shape[:4] != x.shape[:4]:
            raise ValueError(f"network: found {y.shape} of {x.shape}, expected {x.shape[:4]} and the classes")
        return (flip(y, turn) if flipping else y).astype(jnp.float32)

    return jax.jit(run)


def _check(image: NumpyArray, members: Sequence[Tree]) -> None:
    if len(image.shape) != 4 or 0 in image.shape:
        raise ValueError(f"image: found {image.shape}, expected (h, w, d, c), every size ≥ 1")
    if not isinstance(members, Sequence) or not members:
        found = f"{len(members)} of a {type(members).__name__}" if hasattr(members, "__len__") else members
        raise ValueError(f"members: found {found}, expected a list of one or more trees of parameters")


class _Slab:
    """The weighted sum of a window's thickness of the volume, which moves along one axis."""

    def __init__(self, shape: Sequence[int], axis: int, weight: NumpyArray, classes: int):
        self.axis, self.weight, self.start = axis, weight[..., None], 0
        size = [*shape]
        size[axis] = weight.shape[axis]
        self.total, self.weights = np.zeros((*size, classes), np.float32), np.zeros((*size, 1), np.float32)

    def add(self, place: Sequence[int], output: NumpyArray) -> None:
        """Adds a window's output; its place along the axis is the slab's."""
        region = [slice(p, p + w) for p, w in zip(place, self.weight.shape)]
        region[self.axis] = slice(None)
        self.total[tuple(region)] += output * self.weight
        self.weights[tuple(region)] += self.weight

    def take(self, stop: int) -> NumpyArray:
        """The average up to index ``stop`` of the volume; the slab moves there."""
        count, self.start = stop - self.start, stop
        done = tuple(slice(count) if axis == self.axis else slice(None) for axis in range(3))
        values = self.total[done] / self.weights[done]
        for sums in (self.total, self.weights):
            slices = np.moveaxis(sums, self.axis, 0)
            for begin in range(
                0, len(slices), count
            ):  # in pieces that don't overlap, which NumPy would copy first
                moved = slices[begin + count : begin + 2 * count]
                slices[begin : begin + len(moved)] = moved
                slices[begin + len(moved) : begin + count] = 0
        return values


def gaussian(window: Sequence[int]) -> NumpyArray:
    """Weights (h, w, d) float32, highest in the middle; deviation an eighth of the window, 1e-3 at least."""
    weight = np.ones((1, 1, 1))
    for axis, n in enumerate(window):
        x = np.arange(n) - (n - 1) / 2
        weight = weight * np.exp(-(x**2) / (2 * (SIGMA * n) ** 2)).reshape(
            [-1 if a == axis else 1 for a in range(3)]
        )
    return np.maximum(weight, max(float(weight.min()), FLOOR)).astype(np.float32)


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis that is not shorter than a window."""
    if size <= window:
        return [0]
    step = max(int(window * (1 - overlap)), 1)
    count = math.ceil((size - window) / step) + 1
    return [min(n * step, size - window) for n in range(count)]


def pad(image: NumpyArray, window: Sequence[int]) -> tuple[NumpyArray, Size3]:
    """(h, w, d, c) with zeros on both sides where it is smaller than the window, and how many there are before."""
    lacking = [max(w - n, 0) for n, w in zip(image.shape, window)]
    a, b, c = (n // 2 for n in lacking)
    if any(lacking):
        image = np.pad(image, [*((n // 2, n - n // 2) for n in lacking), (0, 0)])
    return image, (a, b, c)


def flip(x: Array, turn: Array) -> Array:
    """(b, h, w, d, c) flipped along the axes where ``turn`` (3,) is true; its own inverse."""
    for axis in range(3):
        x = jnp.where(turn[axis], jnp.flip(x, axis + 1), x)
    return x
