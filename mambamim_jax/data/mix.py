"""In which order volumes are read, and how often those of each source: a pure function of (seed, index)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import PurePath

import numpy as np

from mambamim_jax.types import NumpyArray

_ORDER, _MEMBERS = 0, 2  # separate streams of random numbers


@dataclass(frozen=True)
class Mix:
    """An epoch takes ``shares[s]`` volumes from source ``s``, whose volumes are ``members[s]``, in random
    order.

    Every source goes through all of its volumes, in a new order each time, before it repeats one. Sources are in the
    order in which ``of`` meets them, so that it does not matter what they are called.
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
            ValueError: a source without a weight or with two, a weight without a source, or no positive weight.
        """
        if weights is None:
            return cls((tuple(range(len(sources))),), (len(sources),))
        names = list(dict.fromkeys(sources))
        share = np.array([float(weights[key]) for key in _keys(names, weights)])
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

    @cached_property
    def division(self) -> str:
        """Digest of which volumes belong together."""
        return hashlib.sha256(str(self.members).encode()).hexdigest()[:16]

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


def _keys(names: Sequence[str], weights: Mapping[str, float]) -> list[str]:
    """Of each source the key of its weight: its path or, without one, its last part; raises as ``Mix.of``.

    A slash at the end does not matter.
    """
    keys = []
    for name in names:
        path = PurePath(name)
        found = [key for key in weights if PurePath(key) == path]
        found = found or [key for key in weights if str(PurePath(key)) == path.name]
        if not found:
            raise ValueError(f"no weight for source {name}; weights are given for {', '.join(weights)}")
        if len(found) > 1:
            raise ValueError(f"source {name} has {len(found)} weights, of {' and '.join(found)}; give it one")
        keys += found
    for key in weights:
        if key not in keys:
            raise ValueError(f"weight for {key!r}, but the sources are {', '.join(names)}")
    return keys


@lru_cache(maxsize=64)
def _order(key: tuple[int, ...], size: int) -> NumpyArray:
    return np.random.default_rng(key).permutation(size)
