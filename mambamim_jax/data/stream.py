"""What every loader of crops has in common: which samples make a batch, reading ahead by Grain, resumption.

A sample is one volume and the crops drawn from it. It depends on nothing but the seed and its global index,
which counts volumes from the start of training. So any number of threads and of processes, and any restart,
give the same samples.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from absl import flags

from mambamim_jax.data.mix import Mix
from mambamim_jax.data.store import Store
from mambamim_jax.data.worker import deaf_children
from mambamim_jax.types import NumpyArray

_SAMPLE = 1  # its own stream of random numbers, apart from those of ``mix``
_ENDLESS = 2**48


class Loader(ABC):
    """An endless, resumable stream of batches; every epoch holds each volume exactly once.

    Where the set is no multiple of ``volumes_per_batch``, a batch goes on into the next epoch: nothing is
    dropped. A subclass says what a batch is.

    Args:
        store: what to read. crops_per_volume: random crops of a sample.
        volumes_per_batch: over all processes. seed: of order and crops.
        threads: reading ahead in this process (0: read when asked).
        workers: processes that read in place of threads; of use with blosc2, whose reading holds Python's
            lock.
        rows: the crops of each batch that this process hands out, where several processes share a batch;
            None for all.
        weights: share of each source in an epoch, by the source's path or its last part; None for all
            volumes alike.

    Raises:
        ValueError: sizes or weights that do not fit.
    """

    def __init__(
        self,
        store: Store,
        *,
        crops_per_volume: int,
        volumes_per_batch: int,
        seed: int = 0,
        threads: int = 2,
        workers: int = 0,
        rows: range | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if len(store) == 0:
            raise ValueError(f"{store.folder}: the store holds no usable volume")
        if volumes_per_batch < 1 or crops_per_volume < 1:
            raise ValueError(f"a batch of {volumes_per_batch} x {crops_per_volume} crops, expected some")
        every = range(volumes_per_batch * crops_per_volume)
        rows = every if rows is None else rows
        if not rows or rows.step != 1 or rows[0] not in every or rows[-1] not in every:
            raise ValueError(f"{rows}, expected neighbouring rows of a batch's {len(every)}")
        self.store, self.seed = store, seed
        self.crops_per_volume, self.volumes_per_batch = crops_per_volume, volumes_per_batch
        self.threads, self.workers = threads, workers
        self.rows = rows
        sources = [entry.source for entry in store.entries]
        self.mix = Mix.of(sources, weights)
        names = list(dict.fromkeys(sources))
        self.sources_sorted = weights is None or names == sorted(names)

    @abstractmethod
    def batch(self, number: int) -> dict[str, NumpyArray]:
        """All crops of ``samples(number)``, whole samples, of batch ``number`` since the start of training."""

    @property
    @abstractmethod
    def sampling(self) -> str:
        """Whatever else decides what a sample looks like, in one text."""

    @property
    def batches_per_epoch(self) -> Fraction:
        """Batches that as many volumes as there are make; not a whole number where a batch goes on into the next
        epoch.
        """
        return Fraction(len(self.store), self.volumes_per_batch)

    @property
    def identity(self) -> dict[str, Any]:
        """What a saved iterator state must agree with for its samples to be the same.

        "sources" says which volumes share which part of an epoch; older states lack it, whose runs drew from weighted
        sources in the order of their paths.
        """
        sampling = f"{self.crops_per_volume} {self.mix.shares} {self.sampling}"
        return {
            "seed": self.seed,
            "volumes_per_batch": self.volumes_per_batch,
            "fingerprint": self.store.fingerprint,
            "sampling": hashlib.sha256(sampling.encode()).hexdigest()[:16],
            "sources": self.mix.division,
        }

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def samples(self, number: int) -> list[int]:
        """Global indices of the samples of batch ``number`` that this process hands out crops of."""
        first, count = number * self.volumes_per_batch, self.crops_per_volume
        return [*range(first + self.rows[0] // count, first + self.rows[-1] // count + 1)]

    def part(self, number: int) -> dict[str, NumpyArray]:
        """This process's rows of batch ``number``; "index" has an entry for each sample that they are of."""
        start = self.rows[0] % self.crops_per_volume
        cut = slice(start, start + len(self.rows))
        return {name: a if name == "index" else a[cut] for name, a in self.batch(number).items()}

    def volume_of(self, index: int) -> int:
        """The volume that sample ``index`` reads."""
        return self.mix.volume(self.seed, index)

    def generator(self, index: int) -> np.random.Generator:
        """The random numbers of sample ``index``."""
        return np.random.default_rng((_SAMPLE, self.seed, index))


class BatchIterator(Iterator[dict[str, NumpyArray]]):
    """Iterator over a ``Loader`` whose state is a small dict that JSON can hold."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._batches: list[Any] = []  # of Grain's iterators, the one in use
        weakref.finalize(self, _close, self._batches)
        self._start(0)

    def _start(self, number: int) -> None:
        """Read from batch ``number`` on. Starting anew needs no state of Grain's, which depends on the
        workers.
        """
        _close(self._batches)
        loader, self._number = self._loader, number
        source = grain.MapDataset.range(number, _ENDLESS).map(_Reader(loader))
        threads = 0 if loader.workers else loader.threads
        batches = source.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=max(2 * threads, 1)))
        if loader.workers:
            prepare_workers()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(loader.workers, per_worker_buffer_size=2)
            )
        self._batches.append(iter(batches))
        self._starting = loader.workers > 0

    def __next__(self) -> dict[str, NumpyArray]:
        with deaf_children() if self._starting else nullcontext():
            batch = next(self._batches[0])
        self._starting = False
        self._number += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Samples (volumes, of all processes) handed out so far, and what they belong to."""
        return {"examples": self._number * self._loader.volumes_per_batch, **self._loader.identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; threads and processes may differ, the data and the batch may not.

        Raises:
            ValueError: the state belongs to another seed, batch size, data set, mix of sources or way of cropping.
        """
        if "sources" not in state and not self._loader.sources_sorted:
            what = "by an earlier version, which drew from weighted sources in the order of their paths"
            advice = "this run's stand in another, so that its samples would differ: begin anew"
            raise ValueError(f"iterator state was saved {what}; {advice}")
        for key, expected in self._loader.identity.items():
            if state.get(key, expected if key == "sources" else None) != expected:
                what = f"{key} {state.get(key)!r}, this run has {expected!r}"
                raise ValueError(
                    f"iterator state was saved with {what}: resume with the same data and config, or anew"
                )
        self._start(state["examples"] // self._loader.volumes_per_batch)


def _close(batches: list[Any]) -> None:
    """End the threads and processes behind an iterator; at the latest before the interpreter is taken apart,
    when Grain no longer can.
    """
    while batches:
        batches.pop().close()


def prepare_workers() -> None:
    """Grain's processes need parsed flags, which a plain script does not have."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


class _Reader:
    """``loader.batch``, in a worker process with a care for what that process must not do: touch an
    accelerator,
    or outlive its parent.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader, self._settled = loader, False

    def __getstate__(self) -> dict[str, Any]:
        return {"_loader": self._loader, "_settled": False}

    def __call__(self, number: int) -> dict[str, NumpyArray]:
        if not self._settled and multiprocessing.parent_process() is not None:
            os.environ["JAX_PLATFORMS"] = "cpu"
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        self._settled = True
        return self._loader.part(number)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
