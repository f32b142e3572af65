"""Two or more sides measured alternately in one run, each in a process of its own.

A side is a factory ``module:function`` with keyword arguments that JSON can hold; it returns a callable that
does one step and returns a number (or an array of one), and may have ``prepare()`` and ``rest()``, called untimed
before and after each step, ``facts()``, asked for after the last step, and ``turn``, see below. Each process stays
alive and steps only when told to, and what goes on in the background ends in ``rest``, so the sides never compete
for cores, drifts of the machine hit both alike, and each peak of memory belongs to one side. A turn is one step, or as
many as ``turn`` seconds hold: a step of milliseconds alone, after a wait in which its cores slept, measures how they
wake up.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class SideError(RuntimeError):
    """A side that could not be built or could not step; the message is its own last line."""


@dataclass
class Side:
    """One side of a comparison; ``seconds`` fills up as it is measured."""

    name: str
    factory: str
    arguments: Mapping[str, Any]
    threads: int = 0
    turn: float = 0.0
    """Seconds that a turn has at least; steps are repeated until then, and their mean is the turn's time."""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    value: float = float("nan")
    peak_bytes: int = 0
    build_seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "mambamim_jax.bench.alternate", self.factory, str(self.threads)]
        self.process = subprocess.Popen(
            [*command, str(self.turn), json.dumps(self.arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def ask(self, what: str) -> dict[str, Any]:
        """The answer to "step" or "facts".

        Raises: SideError if the process failed.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
            reply = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        except BrokenPipeError:
            reply = {"error": "the process ended"}
        if "error" in reply:
            raise SideError(f"{self.name}: {reply['error']}")
        return reply

    def step(self) -> tuple[float, float]:
        """Takes a turn and returns a step's seconds: on the clock, and of all its process's threads on a CPU."""
        reply = self.ask("step")
        self.value, self.peak_bytes = reply["value"], reply["peak_bytes"]
        self.build_seconds = reply["build_seconds"]
        return reply["seconds"], reply["cpu_seconds"]

    def stop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        """Like ``median``, of the time on a CPU, which other work on the machine lengthens less."""
        return statistics.median(self.cpu_seconds)


def measure(sides: Sequence[Side], *, steps: int, warm_up: int = 1) -> None:
    """Steps every side in turn, ``warm_up`` rounds unmeasured and then ``steps`` rounds measured.

    Raises: SideError if a side fails; all processes are stopped in any case.
    """
    for side in sides:
        side.start()
    try:
        for number in range(warm_up + steps):
            for side in sides:
                seconds, cpu_seconds = side.step()
                if number >= warm_up:
                    side.seconds.append(seconds)
                    side.cpu_seconds.append(cpu_seconds)
        for side in sides:
            side.facts = side.ask("facts")
    finally:
        for side in sides:
            side.stop()


def peak_bytes() -> int:
    """Most memory this process ever held in RAM (Linux: VmHWM, which a parent's size does not touch)."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        import resource

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _use_threads(count: int) -> None:
    """Keeps this process to ``count`` cores (0: all), whatever library computes in it."""
    if count and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    if count:
        os.environ["OMP_NUM_THREADS"] = str(count)


def _serve(factory: str, threads: int, turn: float, arguments: Mapping[str, Any]) -> int:
    """The process of one side: a line in, a step, a line of JSON out."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries print must not spoil the replies
    _use_threads(threads)
    step, built = None, 0.0
    for line in sys.stdin:
        try:
            if step is None:
                started = time.perf_counter()
                module, name = factory.split(":")
                step = getattr(importlib.import_module(module), name)(**arguments)
                built = time.perf_counter() - started
            if line.strip() == "facts":
                reply = step.facts() if hasattr(step, "facts") else {}
            else:
                reply = _turn(step, max(turn, getattr(step, "turn", 0.0)))
                reply |= {"peak_bytes": peak_bytes(), "build_seconds": built}
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            print(json.dumps({"error": f"{type(error).__name__}: {text}"}), file=replies)
            return 1
        print(json.dumps(reply), file=replies)
    return 0


def _turn(step: Any, at_least: float) -> dict[str, float]:
    """One step, or more until their seconds are ``at_least`` so many; the mean times, and the last one's value."""
    count, seconds, cpu_seconds = 0, 0.0, 0.0
    while not count or seconds < at_least:
        if hasattr(step, "prepare"):
            step.prepare()
        started, spent = time.perf_counter(), time.process_time()
        value = step()
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - spent
        if hasattr(step, "rest"):
            step.rest()
        count += 1
    return {"value": float(value), "seconds": seconds / count, "cpu_seconds": cpu_seconds / count}


if __name__ == "__main__":
    sys.exit(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), json.loads(sys.argv[4])))
