"""In which order volumes are read, and how often those of each source: a pure function of (seed, index)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath

import numpy as np

from mambamim_jax.types import NumpyArray

_ORDER, _MEMBERS = 0, 2  # separate streams of random numbers


@dataclass(frozen=True)
class Mix:
    """An epoch takes ``shares[s]`` volumes from source ``s``, whose volumes are ``members[s]``, in random
    order.

    Every source goes through all of its volumes, in a new order each time, before it repeats one.
    """

    members: tuple[tuple[int, ...], ...]
    shares: tuple[int, ...]

    @classmethod
    def of(cls, sources: Sequence[str], weights: Mapping[str, float] | None) -> Mix:
        """Divide an epoch of ``len(sources)`` volumes, where volume ``n`` comes from ``sources[n]``: as close to the
        weights as whole volumes come, and at least one of each source with a weight.

        Args:
            weights: of each source, by path or last part of it; any scale. None: all volumes alike.

        Raises:
            ValueError: a source without a weight, a weight without a source, or no positive weight.
        """
        if weights is None:
            return cls((tuple(range(len(sources))),), (len(sources),))
        names = sorted(set(sources))
        known = {name: key for name in names for key in weights if key in (name, PurePath(name).name)}
        for name in names:
            if name not in known:
                raise ValueError(f"no weight for source {name}; weights are given for {', '.join(weights)}")
        for key in weights:
            if key not in known.values():
                raise ValueError(f"weight for {key!r}, but the sources are {', '.join(names)}")
        share = np.array([float(weights[known[name]]) for name in names])
        if not np.isfinite(share).all() or (share < 0).any() or share.sum() == 0:
            raise ValueError(f"weights {dict(weights)}, expected numbers of zero or more, not all zero")
        exact = share / share.sum() * len(sources)
        counts = np.floor(exact).astype(int)
        rest = len(sources) - counts.sum()
        counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
        for source in np.flatnonzero((counts == 0) & (share > 0)):  # it would never be read at all
            counts[[source, np.argmax(counts)]] += 1, -1
        members = tuple(tuple(n for n, source in enumerate(sources) if source == name) for name in names)
        return cls(members, tuple(counts.tolist()))

    def volume(self, seed: int, index: int) -> int:
        """The volume that sample ``index``, counted from the start of training, reads."""
        epoch, place = divmod(index, sum(self.shares))
        slot = int(_order((_ORDER, seed, epoch), sum(self.shares))[place])
        for number, (members, share) in enumerate(zip(self.members, self.shares)):
            if slot < share:
                turn, rank = divmod(epoch * share + slot, len(members))
                return members[int(_order((_MEMBERS, seed, turn, number), len(members))[rank])]
            slot -= share
        raise AssertionError


@lru_cache(maxsize=64)
def _order(key: tuple[int, ...], size: int) -> NumpyArray:
    return np.random.default_rng(key).permutation(size)
