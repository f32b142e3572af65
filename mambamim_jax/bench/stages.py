"""Launch scripts as stages of a longer piece of work, several at a time."""

from __future__ import annotations

import os
import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mambamim_jax.checks import ConfigError
from mambamim_jax.train.signals import PREEMPTIONS

ROOT = Path(__file__).resolve().parents[2]


class StageError(RuntimeError):
    """A command failed, or would fail; the message is one line, with its log if there is one."""


@dataclass(frozen=True)
class Slot:
    """What one command at a time has: one GPU of several, or else some of the cores."""

    cores: Sequence[int]
    gpu: str | None

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables of the command's process. Programs are found again only under the same name of the cache."""
        gpu = {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}
        return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)} | gpu


def gpu_names(count: int) -> list[str]:
    """As many GPUs as asked for, of those that CUDA_VISIBLE_DEVICES names where it is set.

    Raises: ConfigError if it names fewer.
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if visible and len(visible) < count:
        raise ConfigError("--gpus", f"found {count}", f"at most the {len(visible)} of CUDA_VISIBLE_DEVICES")
    return (visible or [str(number) for number in range(count)])[:count]


class Stages:
    """Runs command lines, ``jobs`` at a time, each on its part of the cores or on its GPU, output in a log.

    Args:
      workdir: commands.txt, logs, and the compilation cache that all share.
      jobs: commands at a time.
      gpus: over how many GPUs they are spread; with 0 a command sees all.

    Raises: OSError if the workdir can't be written; ConfigError as ``gpu_names``.
    """

    def __init__(self, workdir: Path, jobs: int, gpus: int = 0):
        self.workdir, self.cache = workdir, workdir / "compilation_cache"
        for folder in (self.cache, workdir / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        names = gpu_names(gpus)
        for job in range(jobs):
            self.slots.put(Slot([], names[job % gpus]) if gpus else Slot(cores[job::jobs], None))
        self.pool = ThreadPoolExecutor(jobs)
        self._running: set[subprocess.Popen] = set()
        self._lock, self._ending = threading.Lock(), False

    def run(self, name: str, script: str, *arguments: str) -> None:
        """Runs launch/SCRIPT.py.

        Raises: StageError if it fails, or after ``end``.
        """
        log, slot = self.workdir / "logs" / f"{name}_{script}.txt", self.slots.get()
        try:
            process = self._start(log, slot, script, arguments)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        finally:
            self.slots.put(slot)
        if code:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise StageError(f"{script} of {name} ended with {code}: {last} (see {log})")

    def end(self, caught: int = 0) -> None:
        """Starts nothing more, ends what runs, and returns when it has ended, a training with a checkpoint.

        Args:
          caught: the signal that is the reason. Whoever sent it may have sent it to the commands as well, and twice
            the same one ends a training before it has saved: they get the other one.
        """
        number = next(number for number in PREEMPTIONS if number != caught)
        with self._lock:
            self._ending = True
            for process in self._running:
                process.send_signal(number)
        self.pool.shutdown(cancel_futures=True)

    def _start(self, log: Path, slot: Slot, script: str, arguments: Sequence[str]) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments]
        with self._lock:
            if self._ending:
                raise StageError(f"{script} was not started")
            with open(self.workdir / "commands.txt", "a") as file:
                file.write(f"python launch/{script}.py {shlex.join(arguments)}\n")
            with open(log, "w") as output:
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=slot.environment(self.cache)
                )
            self._running.add(process)
        if slot.cores:
            os.sched_setaffinity(process.pid, slot.cores)
        return process
