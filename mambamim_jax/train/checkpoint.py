"""Checkpoints of a whole run: state, data position and configuration, saved by Orbax in the background.

A save is written aside and renamed, so a killed process leaves the one before. Orbax does not notice a
changed byte in an array's file; a checksum of every tensor, taken on the device as the save starts, does.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mambamim_jax.settings import CheckpointConfig, ConfigError, RunConfig, flat
from mambamim_jax.train.optim import paths
from mambamim_jax.train.sharding import on_host
from mambamim_jax.train.step import State
from mambamim_jax.types import Array

FOLDER = "checkpoints"


class DamagedError(RuntimeError):
    """No checkpoint of a run can be read."""

    exit_code = 4


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    state: State
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: they lie in WORKDIR/checkpoints, one folder per step.
      settings: which of them are kept.
      say: prints a line that a person must see.
    """

    def __init__(self, workdir: Path, settings: CheckpointConfig, say: Callable[[str], None] = print):
        self.folder, self.say = workdir / FOLDER, say
        options = ocp.CheckpointManagerOptions(
            max_to_keep=settings.keep, keep_period=settings.keep_every or None, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "meta"))

    def save(self, step: int, state: State, data: Mapping[str, Any], config: RunConfig) -> None:
        """Starts saving; the state may be donated as soon as this returns."""
        meta = {"step": step, "data": dict(data), "config": flat(config), "checksums": checksums(state)}
        meta = json.loads(json.dumps(meta))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta | {"crc": _crc(meta)})
        )
        self.manager.save(step, args=args)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self.manager.all_steps())

    def meta(self, step: int) -> dict[str, Any]:
        """Step, data position, configuration and checksums of a checkpoint.

        Raises: ValueError where they are damaged; whatever Orbax raises where they cannot be read.
        """
        meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        if meta.pop("crc", None) != _crc(meta):
            raise ValueError("the checksum of its description differs")
        return meta

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Damaged ones are reported, and moved to WORKDIR/checkpoints.damaged: their steps can be saved anew.

        Args:
          like: the state's shapes, dtypes and shardings, as jax.eval_shape gives them.

        Raises: DamagedError where every checkpoint is damaged.
        """
        steps = self.steps()
        _ignore_late_futures()
        for step in reversed(steps):
            try:
                return self._restore(step, like)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
                self.say(f"WARNING: checkpoint {self.folder / str(step)} is damaged and not used ({reason})")
                self._move_away(step)
        if steps:
            raise DamagedError(
                f"{self.folder}: none of the checkpoints of steps {steps} can be read; expected one that is "
                "whole; start anew in another --workdir"
            )
        return None

    def wait(self) -> None:
        """Returns when the last save is complete on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _restore(self, step: int, like: Any) -> Restored:
        meta = self.meta(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        state = self.manager.restore(step, args=args)["state"]
        found = checksums(state)
        wrong = [name for name, value in meta["checksums"].items() if found.get(name) != value]
        if wrong or len(found) != len(meta["checksums"]):
            raise ValueError(f"the checksums of {len(wrong)} tensors differ, first {wrong[:1]}")
        return Restored(step, state, meta["data"])

    def _move_away(self, step: int) -> None:
        aside = self.folder.with_name(f"{FOLDER}.damaged")
        aside.mkdir(exist_ok=True)
        number = sum(1 for _ in aside.glob(f"{step}.*"))
        (self.folder / str(step)).rename(aside / f"{step}.{number}")
        self.manager.reload()


@cache
def _ignore_late_futures() -> None:
    """Silences Orbax's futures that, after a failed read, call back into an event loop already closed.

    They come from other threads, long after the failure is dealt with: so for the rest of the process.
    """
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            usual(unraisable)

    sys.unraisablehook = hook


def open_checkpoints(workdir: Path, config: RunConfig, say: Callable[[str], None] = print) -> Checkpoints:
    """The workdir's checkpoints, if ``config.resume`` and the saved configuration allow to go on from them.

    Raises: ConfigError: there is a run and ``never``, none and ``must``, or one of another configuration.
    """
    checkpoints = Checkpoints(workdir, config.checkpoint, say)
    steps = checkpoints.steps()
    if config.resume == "must" and not steps:
        advice = "check --workdir, or --config.resume=auto to start one"
        raise ConfigError("config.resume", f"found no checkpoint in {workdir}", "a run to continue", advice)
    if config.resume == "never" and steps:
        found = f"found a run in {workdir} at step {steps[-1]}"
        advice = "choose another --workdir, or --config.resume=auto to continue it"
        raise ConfigError("config.resume", found, "a workdir without one", advice)
    for step in reversed(steps):
        try:
            saved = checkpoints.meta(step)["config"]
        except Exception:  # damaged: restore() will say so
            continue
        compare(saved, config, workdir, say)
        break
    return checkpoints


def compare(saved: dict[str, Any], config: RunConfig, workdir: Path, say: Callable[[str], None]) -> None:
    """Tells harmless differences to the saved configuration and refuses the others.

    Raises: ConfigError that names every key that would change what is trained.
    """
    now = flat(config)
    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    free = {
        key for key in changed if any(key == name or key.startswith(f"{name}.") for name in config.harmless)
    }
    for key in [key for key in changed if key in free and key != "resume"]:
        say(f"config.{key}: now {now.get(key)!r}, was {saved.get(key)!r} when the run was saved")
    fatal = [key for key in changed if key not in free]
    if fatal:
        differences = ", ".join(f"{key} {now.get(key)!r} (was {saved.get(key)!r})" for key in fatal)
        keys = "config." + ", config.".join(fatal)
        advice = "take those, or another --workdir for a new run"
        raise ConfigError(keys, f"found {differences}", f"the values of the run in {workdir}", advice)


def checksums(state: State) -> dict[str, int]:
    """{path: sum of the tensor's bits as unsigned integers}; independent of how the tensor is sharded."""
    values = on_host(_checksums, state)
    return {name: int(value) for name, value in zip(paths(state), values)}


def _checksums(state: State) -> Array:
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(state)])


def _checksum(leaf: Array) -> Array:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, kind)
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def _crc(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
