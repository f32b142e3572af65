"""Checkpoints of a whole run: state, data position and configuration, saved by Orbax in the background.

A save is written aside and renamed, so a killed process leaves the one before. Orbax does not notice a
changed byte in an array's file; a checksum of every tensor, taken on the device as the save starts, does.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mambamim_jax.checks import ConfigError
from mambamim_jax.model_files import models
from mambamim_jax.settings import CheckpointConfig, RunConfig, flat
from mambamim_jax.train.optim import paths
from mambamim_jax.train.processes import all_agree, first_alone, several
from mambamim_jax.train.resume import compare
from mambamim_jax.train.sharding import on_host
from mambamim_jax.train.step import State
from mambamim_jax.train.workdir import unwritable
from mambamim_jax.types import Array

FOLDER = "checkpoints"


SLACK = 2**19
"""Bytes that a checkpoint takes besides its tensors: some dozens of small files."""
NO_SPACE = ("No space left on device", "Disk quota exceeded", "File too large", "ENOSPC", "EDQUOT", "EFBIG")


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

    Raises: ConfigError where that is no folder and cannot be made one.
    """

    def __init__(self, workdir: Path, settings: CheckpointConfig, say: Callable[[str], None] = print):
        self.folder, self.say = workdir / FOLDER, say
        first_alone("checkpoints", lambda: None if jax.process_index() else self._prepare())
        # Left to itself Orbax lets processes wait for each other by a sum over devices, as many of each process.
        waiting = {"active_processes": {*range(jax.process_count())}} if several() else {}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=settings.keep,
            keep_period=settings.keep_every or None,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(**waiting),
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "meta"))

    def save(self, step: int, state: State, data: Mapping[str, Any], config: RunConfig, steps: int) -> None:
        """Starts saving; the state may be donated as soon as this returns. ``steps``: of the whole run.

        Where there is no room nothing is written. Processes agree on that before, since one that fails while the others
        write leaves them waiting for it.
        """
        self.wait()
        room = self._room(state)
        if not all_agree(not room):
            self._say_unsaved(room or "no room for another process's part")
            return
        meta = {"step": step, "steps": steps, "data": dict(data), "config": flat(config)}
        meta = json.loads(json.dumps(meta | {"checksums": checksums(state)}))
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta | {"crc": _crc(meta)})
        )
        try:
            self.manager.save(step, args=args)
        except Exception as error:
            self._report(error)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self.manager.all_steps())

    def meta(self, step: int) -> dict[str, Any]:
        """Step, the run's steps, data position, configuration and checksums of a checkpoint.

        Raises: ValueError, OSError where they are damaged or cannot be read.
        """
        meta = json.loads((self.folder / str(step) / "meta" / "metadata").read_bytes())
        if meta.pop("crc", None) != _crc(meta):
            raise ValueError("the checksum of its description differs")
        return meta

    def newest(self) -> dict[str, Any] | None:
        """``meta`` of the newest checkpoint whose description is whole."""
        for step in reversed(self.steps()):
            with suppress(Exception):  # damaged: restore() will say so
                return self.meta(step)
        return None

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
            restored, reason = None, "damaged for another process"
            try:
                read = self._read(step, like)
            except Exception as error:
                read, reason = None, one_line(error)
            if all_agree(read is not None) and read:
                # Sums over all processes' parts, so that all come to the same verdict.
                wrong = differences(read[0]["checksums"], checksums(read[1]))
                restored, reason = None if wrong else Restored(step, read[1], read[0]["data"]), wrong
            if restored:
                return restored
            self.say(f"WARNING: checkpoint {self.folder / str(step)} is damaged and not used ({reason})")
            self._move_away(step)
        if steps:
            raise DamagedError(
                f"{self.folder}: none of the checkpoints of steps {steps} can be read; expected one that is "
                "whole; start anew in another --workdir"
            )
        return None

    def wait(self) -> None:
        """Returns when the last save is complete on disk, or has been reported to have failed for want of space."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            self._report(error)

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self.wait()
        self.manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if not (kind and several()):  # a process that fails can't wait for the others
            self.close()

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """What a killed save left. Orbax would do it in a thread that a run refused right after outlives."""
        for partial in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)

    def _report(self, error: Exception) -> None:
        """Says that a save has failed for want of space, and takes away what it left; raises any other error."""
        if not any(sign in str(error) for sign in NO_SPACE):
            raise error
        self._remove_unfinished()
        self.manager.reload()
        self._say_unsaved(one_line(error))

    def _say_unsaved(self, reason: str) -> None:
        good = f"that of step {self.steps()[-1]} stays" if self.steps() else "there is none before it"
        self.say(f"WARNING: a checkpoint could not be saved, {good} and the run goes on: {reason}")

    def _room(self, state: State) -> str:
        """What is missing for a checkpoint of this state, as this process sees its disk; nothing where it fits."""
        needed = SLACK + sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        return f"{free} bytes are free in {self.folder}, {needed} needed" if free < needed else ""

    def _read(self, step: int, like: Any) -> tuple[dict[str, Any], State]:
        """Description and state, this process's parts of it: nothing here waits for another process."""
        meta, folder = self.meta(step), self.folder / str(step) / "state"
        return meta, ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(like))

    def _move_away(self, step: int) -> None:
        first_alone(f"damaged {step}", lambda: None if jax.process_index() else self._rename(step))
        self.manager.reload()

    def _rename(self, step: int) -> None:
        aside = self.folder.with_name(f"{FOLDER}.damaged")
        aside.mkdir(exist_ok=True)
        number = sum(1 for _ in aside.glob(f"{step}.*"))
        (self.folder / str(step)).rename(aside / f"{step}.{number}")


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

    Raises: ConfigError: ``never`` and a run or its models, ``must`` and none, or a run of another configuration.
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
    if config.resume == "never" and (left := models(workdir)):
        found = f"found models of a run in {workdir}: {', '.join(left)}"
        advice = "choose another --workdir, or --config.resume=auto to move them to its folder earlier"
        raise ConfigError("config.resume", found, "a workdir without any", advice)
    if saved := checkpoints.newest():
        compare(saved["config"], config, workdir, say)
    return checkpoints


def differences(expected: Mapping[str, int], found: Mapping[str, int]) -> str:
    """What to say of tensors whose checksums differ; nothing where none does."""
    wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return f"the checksums of {len(wrong)} tensors differ, first {wrong[0]}" if wrong else ""


def one_line(error: Exception) -> str:
    """An error's kind and the start of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


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
