"""Launch scripts as stages of a longer piece of work, several at a time."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class StageError(RuntimeError):
    """A command failed; the message is one line that names its log."""


@dataclass(frozen=True)
class Slot:
    """What one command at a time has: one GPU of several, or else some of the cores."""

    cores: Sequence[int]
    gpu: int | None

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables of the command's process. Programs are found again only under the same name of the cache."""
        gpu = {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": str(self.gpu)}
        return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)} | gpu


class Stages:
    """Runs command lines, ``jobs`` at a time, each on its part of the cores or on its GPU, output in a log.

    Args:
      workdir: commands.txt, logs, and the compilation cache that all share.
      jobs: commands at a time.
      gpus: over how many GPUs they are spread; with 0 a command sees all.
    """

    def __init__(self, workdir: Path, jobs: int, gpus: int = 0):
        self.workdir, self.cache = workdir, workdir / "compilation_cache"
        for folder in (self.cache, workdir / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for job in range(jobs):
            self.slots.put(Slot([], job % gpus) if gpus else Slot(cores[job::jobs], None))
        self.pool = ThreadPoolExecutor(jobs)

    def run(self, name: str, script: str, *arguments: str) -> None:
        """Runs launch/SCRIPT.py.

        Raises: StageError if it fails.
        """
        command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments]
        with open(self.workdir / "commands.txt", "a") as file:
            file.write(f"python launch/{script}.py {' '.join(arguments)}\n")
        log, slot = self.workdir / "logs" / f"{name}_{script}.txt", self.slots.get()
        try:
            with open(log, "w") as output:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=slot.environment(self.cache),
                )
                if slot.cores:
                    os.sched_setaffinity(process.pid, slot.cores)
                code = process.wait()
        finally:
            self.slots.put(slot)
        if code:
            last = (log.read_text().strip().splitlines() or [""])[-1]
            raise StageError(f"{script} of {name} ended with {code}: {last} (see {log})")
