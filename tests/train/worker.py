"""One process of a run of the tiny network: the real loop, checkpoints, processes and signals, quick to compile.

python -m tests.train.worker WORKDIR steps=40 every=5 mesh.fsdp=2 distributed.process=0 …

With validate=N it validates every N steps, which takes as long as there is a file WORKDIR/hold.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import jax

from mambamim_jax.settings import (
    CheckpointConfig,
    DistributedConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
)
from mambamim_jax.train import processes, signals
from mambamim_jax.train.checkpoint import DamagedError, open_checkpoints
from mambamim_jax.train.loop import train
from mambamim_jax.train.progress import Terminal
from mambamim_jax.train.sharding import make_placement
from tests.train.tiny import tiny_batch, tiny_task
from tests.train.tiny_run import picture_task

SIZE = 64


class Stream:
    """This process's rows of batches that are a function of their number."""

    def __init__(self, rows: range, pause: float):
        self.rows, self.pause, self.index = rows, pause, 0

    def __next__(self):
        self.index += 1
        time.sleep(self.pause)
        return {"image": tiny_batch(self.index, SIZE)["image"][self.rows[0] : self.rows[-1] + 1]}

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


class Loader:
    batches_per_epoch = 5

    def __init__(self, rows: range, pause: float):
        self.rows, self.pause = rows, pause

    def __iter__(self):
        return Stream(self.rows, self.pause)


class Held:
    """A validation that says when it has begun."""

    def __init__(self, workdir: Path, every: int):
        self.workdir, self.every = workdir, every

    def begin(self):
        pass

    def measure(self, step, state, earlier, check):
        (self.workdir / "validating").touch()
        while (self.workdir / "hold").exists():
            time.sleep(0.02)
            check()
        return {"earlier": [row["step"] for row in earlier]}

    def finish(self, step, state):
        (self.workdir / "finished").touch()


def settings(given: dict[str, str]) -> RunConfig:
    """The run's settings of the command line's."""
    config = RunConfig(
        epochs=0,
        steps=int(given.get("steps", 40)),
        optim=OptimConfig(learning_rate=5e-2, warmup=0.2),
        log=LogConfig(every=10, panel_every=int(given.get("panel_every", 0))),
        checkpoint=CheckpointConfig(every=int(given.get("every", 5)), keep=2),
        mesh=MeshConfig(**{axis: int(given.get(f"mesh.{axis}", 1)) for axis in ("fsdp", "model", "space")}),
        distributed=DistributedConfig(
            join=60, heartbeat=int(given.get("heartbeat", 10)), patience=float(given.get("patience", 120))
        ),
    )
    if "distributed.process" in given:
        place = (given["coordinator"], int(given["distributed.processes"]), int(given["distributed.process"]))
        names = ("coordinator", "processes", "process")
        config = replace(config, distributed=replace(config.distributed, **dict(zip(names, place))))
    return config


def work(workdir: Path, config: RunConfig, pause: float, validate: int) -> int:
    placement = make_placement(config.mesh, SIZE)
    terminal = Terminal(quiet=jax.process_index() > 0)
    with open_checkpoints(workdir, config, terminal.say) as checkpoints:
        loader = processes.first_alone("data", lambda: Loader(placement.rows(SIZE), pause))
        task = picture_task() if config.log.panel_every else tiny_task()
        task = replace(task, validation=Held(workdir, validate) if validate else None)
        outcome = train(task, loader, config, workdir, checkpoints, terminal, placement)
    return signals.exit_code(outcome.signal)


def main(workdir: str, *arguments: str) -> int:
    given = dict(argument.split("=", 1) for argument in arguments)
    config = settings(given)
    signals.end_at_once()
    try:
        processes.start(config.distributed)
        return work(Path(workdir), config, float(given.get("pause", 0)), int(given.get("validate", 0)))
    except (DamagedError, processes.PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return processes.leave(error.exit_code)
    except jax.errors.JaxRuntimeError as error:
        lost = processes.lost_peer(error)
        print(f"error: {lost}", file=sys.stderr)
        return processes.leave(lost.exit_code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
