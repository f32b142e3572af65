"""A run of the loop with a stand-in model, data and validation."""

import io
from dataclasses import replace

import jax
import numpy as np
from rich.console import Console

from mambamim_jax.settings import CheckpointConfig, LogConfig, OptimConfig, RunConfig
from mambamim_jax.train.checkpoint import open_checkpoints
from mambamim_jax.train.loop import train
from mambamim_jax.train.progress import Terminal
from tests.train.tiny import tiny_batch, tiny_task

TASK = tiny_task()
CONFIG = RunConfig(
    epochs=0,
    steps=9,
    optim=OptimConfig(learning_rate=5e-2, warmup=0.2),
    log=LogConfig(every=2, panel_every=4),
    checkpoint=CheckpointConfig(every=3, keep=2),
)


class TinyStream:
    def __init__(self, loader):
        self.loader, self.index = loader, 0

    def __next__(self):
        self.index += 1
        return self.loader.batch(self.index)

    def get_state(self):
        return {"index": self.index, "name": self.loader.name}

    def set_state(self, state):
        if state["name"] != self.loader.name:
            raise ValueError(f"saved with {state['name']!r}, this run has {self.loader.name!r}")
        self.index = state["index"]


class TinyLoader:
    """Batches that are a function of their number; ``disturb(number, batch)`` may change them or raise."""

    batches_per_epoch = 3

    def __init__(self, disturb=None, name="set"):
        self.disturb, self.name = disturb, name

    def batch(self, number):
        batch = tiny_batch(number)
        if self.disturb:
            self.disturb(number, batch)
        return batch

    def __iter__(self):
        return TinyStream(self)


def picture_task():
    volume = lambda batch: jax.numpy.resize(batch["image"][:1], (1, 8, 6, 4))  # noqa: E731
    panel = lambda params, stats, batch, key: {"input": volume(batch), "absolute error": volume(batch)}  # noqa: E731
    return replace(TASK, panel=panel, titles=("input", "absolute error"))


def run(workdir, config=CONFIG, loader=None, task=TASK):
    """Trains; the outcome and what was printed."""
    text = io.StringIO()
    terminal = Terminal(Console(file=text, width=200, highlight=False, markup=False))
    workdir.mkdir(exist_ok=True)
    checkpoints = None
    try:
        checkpoints = open_checkpoints(workdir, config, terminal.say)
        return train(task, loader or TinyLoader(), config, workdir, checkpoints, terminal), text.getvalue()
    finally:
        run.printed = text.getvalue()
        if checkpoints:
            checkpoints.close()


class Held:
    """A validation whose figure depends on the averaged parameters and on how many figures there were."""

    every = 4

    def __init__(self):
        self.begun, self.seen, self.finished = 0, [], []

    def begin(self):
        self.begun += 1

    def measure(self, step, state, earlier, check):
        figure = float(sum(np.sum(np.asarray(leaf)) for leaf in jax.tree.leaves(state["ema"])))
        self.seen.append([row["step"] for row in earlier])
        return {"figure": figure, "earlier": self.seen[-1]}

    def finish(self, step, state):
        self.finished.append(step)
