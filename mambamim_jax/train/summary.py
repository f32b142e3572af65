"""The end of a run: how it went, on one screen."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambamim_jax.train.logs import METRICS
from mambamim_jax.train.progress import Terminal, duration
from mambamim_jax.train.step import Task

ENDS = 10


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: updates done. steps: updates planned.
      first_loss, last_loss: means over the first and the last ten steps of the whole run.
      samples_per_second: since this process started training, without its first step (compilation).
      signal: the number of the signal that ended it early, or 0.
    """

    step: int
    steps: int
    first_loss: float
    last_loss: float
    samples_per_second: float
    signal: int = 0


def going_on(checkpoints: Path, step: int, steps: int, before: int) -> str:
    """What a run that has a checkpoint of a step begins with; ``before``: its length when it was saved."""
    where = checkpoints / str(step)
    if step >= steps:
        return f"nothing is left to train: {where} is there, and step {steps} is the last"
    line = f"continuing at step {step} of {steps} from {where}"
    if steps == before:
        return line
    schedule = "from here on the learning rate and the weight decay follow the schedule of the new length"
    return f"{line}\n{schedule}: {steps} steps, was {before}"


def summarise(
    task: Task,
    workdir: Path,
    rows: Sequence[Mapping[str, Any]],
    steps: int,
    signal: int,
    rate: float,
    kept: Sequence[int],
    drawn: bool,
    terminal: Terminal,
) -> Outcome:
    """Says how a run went and where everything is.

    Args:
      rows: the metrics of all steps.
      steps, signal, rate: see ``Outcome``.
      kept: steps of the checkpoints.
      drawn: whether there are panels.
    """
    losses = [row["loss"] for row in rows] or [float("nan")]
    first, last = float(np.mean(losses[:ENDS])), float(np.mean(losses[-ENDS:]))
    outcome = Outcome(rows[-1]["step"] if rows else 0, steps, first, last, rate, signal)
    done = f"stopped by signal {signal}" if signal else "done"
    reached = f"step {outcome.step}" + (f" of {steps}" if outcome.step <= steps else "")
    took = duration(sum(row["seconds"] for row in rows))
    lines = [
        "",
        f"{task.name} {done}: {reached}, {took} of training",
        *(f"  {line}" for line in task.description),
        f"  loss         {first:.4f} → {last:.4f} (means of {ENDS} steps)",
        f"  speed        {rate:.2f} samples/s",
        f"  checkpoints  {workdir / 'checkpoints'} (steps {', '.join(map(str, kept))})",
        *([f"  panels       {workdir / 'panels'}"] if drawn else []),
        f"  loss curve   {workdir / 'loss.png'}",
        f"  metrics      {workdir / METRICS}",
        f"  TensorBoard  tensorboard --logdir {shlex.quote(str(workdir / 'tensorboard'))}",
    ]
    for line in lines:
        terminal.say(line)
    return outcome
