"""The training loop, whatever the task: steps, metrics, pictures, checkpoints, and a stop that loses nothing.

Metrics of a step are fetched while the next one runs. Before anything is saved, or at the end, the loop
catches up, so no state is saved whose step was not seen to be finite.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mambamim_jax import visualise
from mambamim_jax.settings import RunConfig
from mambamim_jax.train.checkpoint import Checkpoints
from mambamim_jax.train.feed import Feed, Loader
from mambamim_jax.train.logs import RunLog, SilentLog, complete, open_log
from mambamim_jax.train.optim import make_optimiser
from mambamim_jax.train.panel import Panel
from mambamim_jax.train.processes import Watchdog, Work, first_tells
from mambamim_jax.train.progress import Show, Terminal
from mambamim_jax.train.resume import planned
from mambamim_jax.train.sharding import Placement, on_host, one_device
from mambamim_jax.train.signals import Stopped, caught_signals
from mambamim_jax.train.step import (
    STOP,
    NonFiniteError,
    State,
    Task,
    abstract_state,
    explain_non_finite,
    initial_state,
    make_step,
)
from mambamim_jax.train.summary import Outcome, going_on, summarise


@dataclass
class _Pending:
    """A step that has been dispatched, not yet looked at."""

    step: int
    metrics: dict[str, Any]
    batch: dict[str, Any]
    wait: float


def train(
    task: Task,
    loader: Loader,
    config: RunConfig,
    workdir: Path,
    checkpoints: Checkpoints,
    terminal: Terminal,
    placement: Placement | None = None,
) -> Outcome:
    """Trains to the end, from the newest checkpoint where there is one.

    Every process of a run calls it, with the loader of its own rows; the first one alone writes.

    Args:
      placement: the devices, and what goes where; None for one device.

    Raises:
      NonFiniteError: the loss or a gradient was not finite; nothing of that step is kept.
      ConfigError: the data are not those that the run was started with.
    """
    steps, before = planned(config, loader.batches_per_epoch, checkpoints.newest())
    adamw, schedule = make_optimiser(config.optim, steps, task.unused_parameters, task.rate_scales)
    placement = placement or one_device()
    stream = Feed(iter(loader), task.inputs, placement.put)
    like = placement.like(abstract_state(task, adamw))
    restored = checkpoints.restore(like)
    start = restored.step if restored else 0
    if restored:
        stream.resume(restored.data, workdir)
        terminal.say(going_on(checkpoints.folder, start, steps, before))
    log = open_log(workdir, start, task.validation is not None, terminal.say)
    names = list(adamw.trained(like["params"]))
    drawn = task.panel and config.log.panel_every
    panel = Panel(task, next(iter(loader)), config.seed, placement) if drawn else None
    dog = Watchdog(config.distributed.patience, partial(print, file=sys.stderr, flush=True))
    run = _Run(task, config, workdir, checkpoints, terminal, log, placement, dog, names, panel, start, steps)
    try:
        if start < steps:
            state = restored.state if restored else initial_state(task, adamw, config.seed, placement)
            if task.validation is not None and not restored and jax.process_index() == 0:
                task.validation.begin()
            step = make_step(
                task,
                adamw,
                schedule,
                seed=config.seed,
                accumulate=config.optim.accumulate,
                remat=config.remat,
                placement=placement,
            )
            with caught_signals() as run.caught:
                run.go(step, state, stream)
                checkpoints.wait()
        elif restored:
            with caught_signals() as run.caught:
                run.conclude(restored.state)
        return run.finish()
    finally:
        dog.stop()
        log.close()


@dataclass
class _Run:
    """One call of ``train``; the fields that have a default change as it goes."""

    task: Task
    config: RunConfig
    workdir: Path
    checkpoints: Checkpoints
    terminal: Terminal
    log: RunLog | SilentLog
    placement: Placement
    dog: Watchdog
    names: list[str]
    panel: Panel | None
    start: int
    steps: int
    step: int = 0
    loss: float = float("nan")
    signal: int = 0
    samples: int = 0
    seconds: float = 0.0
    clock: float = 0.0
    turns: int = 0
    caught: list[int] = field(default_factory=list)

    def go(self, step_function: Callable, state: State, stream: Feed) -> None:
        """All remaining steps."""
        self.step, caught = self.start, self.caught
        if self.start:
            self.validate(state)
        if self.signal:
            return
        with self.terminal.training(self.task.name, self.start, self.steps, self.config.log.every) as show:
            pending: _Pending | None = None
            quiet = self.placement.flag(0)
            self.clock = time.monotonic()
            for step in range(self.start + 1, self.steps + 1):
                self.dog.beat(f"step {step - 1}")
                before = time.monotonic()
                batch = next(stream)
                wait = time.monotonic() - before
                stop = self.placement.flag(caught[0]) if caught else quiet
                state, metrics = step_function(state, batch | {STOP: stop})
                before = time.monotonic()
                stream.advance()
                wait += time.monotonic() - before
                if pending:
                    self.settle(pending, state, show)
                pending = _Pending(step, metrics, batch, wait)
                if caught and not self.placement.mesh.is_multi_process:
                    self.signal = caught[0]
                if self.signal or self.saves(step) or self.draws(step) or self.validates(step):
                    self.settle(pending, state, show)
                    pending = None
                    self.follow(state, stream, show)
                if self.signal:
                    break
        if self.step == self.steps and not self.signal:
            self.conclude(state)

    def follow(self, state: State, stream: Feed, show: Show) -> None:
        """Whatever is due after a step that has been settled, which may have told of another process's signal.

        Saved before anything else. Once a signal has come there is no time for more; the validation is made up for when
        the run goes on, the last picture would not be.
        """
        step, saving = self.step, bool(self.signal) or self.saves(self.step)
        if saving:
            self.save(state, stream)
        if self.draws(step) and (step == self.steps or not self.signal):
            show(step, "drawing")
            self.draw(state)
        if self.validates(step) and not self.signal:
            show(step, "validating")
            self.validate(state)
            if self.signal and not saving:
                self.save(state, stream)

    def saves(self, step: int) -> bool:
        """Whether a step is one after which a checkpoint is written, signals apart."""
        return step % self.config.checkpoint.every == 0 or step == self.steps

    def save(self, state: State, stream: Feed) -> None:
        """A checkpoint, after the rows that belong to it."""
        self.log.sync()
        self.checkpoints.save(self.step, state, stream.get_state(), self.config, self.steps)

    def conclude(self, state: State) -> None:
        """What follows the last step; done again where a kill may have come before its end."""
        self.step = int(state["step"])
        self.validate(state)
        validation = self.task.validation
        if validation is not None and not self.signal:
            kept = on_host(_same, held_parts(state))
            self.alone(lambda heard: validation.finish(self.step, kept))

    def settle(self, pending: _Pending, state: State, show: Show) -> None:
        """Waits for a step, checks that it was finite, logs and shows it."""
        metrics = jax.device_get(pending.metrics)
        now = time.monotonic()
        seconds, self.clock = now - self.clock, now
        if not metrics["finite"]:
            text = explain_non_finite(pending.step, metrics, self.names, state, pending.batch)
            raise NonFiniteError(f"{text}; {self.last_good()}")
        # Every process sees the same sum of what all have caught, so all of them stop after the same step.
        self.signal = self.signal or int(metrics["stop"])
        size = len(next(iter(pending.batch.values())))
        if pending.step > self.start + 1:
            self.samples, self.seconds = self.samples + size, self.seconds + seconds
        row = {name: float(metrics[name]) for name in ("loss", "grad_norm", "lr", "weight_decay")}
        row |= {"seconds": seconds, "samples_per_second": size / seconds, "data_wait": pending.wait / seconds}
        self.step, self.loss, row = pending.step, row["loss"], {"step": pending.step, **row}
        self.log.row(row)
        if pending.step % self.config.log.every == 0 or pending.step == self.steps:
            self.log.scalars(row)
        show(pending.step, f"loss {row['loss']:.4f}  {self.rate():.2f} samples/s")

    def validates(self, step: int) -> bool:
        """Whether a step is one after which held-out data are looked at."""
        validation = self.task.validation
        return validation is not None and (step % validation.every == 0 or step == self.steps)

    def validate(self, state: State) -> None:
        """Measures on held-out data, unless that has been done: a run stopped by a signal leaves it owing.

        All processes fetch the parameters, the first one alone measures. A signal that any of them catches meanwhile
        ends it, and is then in ``signal`` of all.
        """
        if self.validates(self.step):
            kept = on_host(_same, held_parts(state))
            self.signal = self.alone(lambda heard: self.measure(kept, heard))
            self.clock = time.monotonic()

    def measure(self, state: State, heard: Callable[[], int]) -> int:
        """A row of validation.jsonl, unless it is there; the number of the signal it was given up for, or 0."""

        def check() -> None:
            if number := heard():
                raise Stopped(number)

        validation, rows = self.task.validation, self.log.validation
        assert validation is not None
        assert rows is not None
        earlier = rows.rows()
        if earlier and earlier[-1]["step"] == self.step:
            return 0
        try:
            row = {"step": self.step, **validation.measure(self.step, state, earlier, check)}
        except Stopped as stopped:
            return stopped.number
        rows.append(row)
        self.log.scalars({"step": self.step, "validation": row})
        return 0

    def alone(self, work: Work) -> int:
        """By the first process; the others wait, however long it takes. See ``processes.first_tells``."""
        self.turns += 1
        with self.dog.resting():
            return first_tells(f"turn {self.turns}", work, self.caught)

    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds if self.seconds else 0.0

    def last_good(self) -> str:
        """Where a run that broke can be continued from."""
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        where = f"step {steps[-1]} in {self.checkpoints.folder}" if steps else "none, it had not come so far"
        return f"last good checkpoint: {where}"

    def draws(self, step: int) -> bool:
        """Whether a step is one after which the panel is drawn."""
        return self.panel is not None and (step % self.config.log.panel_every == 0 or step == self.steps)

    def draw(self, state: State) -> None:
        """The panel, as a PNG and for TensorBoard."""
        assert self.panel is not None
        step = self.step
        image = self.panel.draw(state, f"{self.task.name}, step {step}, loss {self.loss:.4f}")
        if image is not None:
            self.log.png(image, self.workdir / "panels" / f"step_{step:07d}.png")
            self.log.picture("panel", image, step)
        self.clock = time.monotonic()

    def finish(self) -> Outcome:
        """The loss curve and the summary."""
        kept, rows = self.checkpoints.steps(), complete(self.log.rows())
        if rows and jax.process_index() == 0:
            picture = visualise.draw_loss_curve(rows, f"{self.task.name}: loss")
            self.log.png(picture, self.workdir / "loss.png")
        drawn, rate = self.panel is not None, self.rate()
        return summarise(
            self.task, self.workdir, rows, self.steps, self.signal, rate, kept, drawn, self.terminal
        )


def held_parts(state: State) -> State:
    """What validation reads of a state."""
    return {name: state[name] for name in ("params", "batch_stats", "ema") if name in state}


def _same(tree: State) -> State:
    return tree
