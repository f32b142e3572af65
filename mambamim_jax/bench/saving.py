"""``launch/bench.py saving``: what saving in the background costs a run.

python launch/bench.py saving [--interval=100] [--rounds=3] [--folder=FOLDER] [--config=…] [--config.a.b=value …]

The demo's step, compiled once, does an interval of steps with a save at its start and one without, alternately; as in
the training loop the save waits for the step before it, and an interval ends when its checkpoint is complete.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambamim_jax.bench.step import settings
from mambamim_jax.bench.tables import print_table
from mambamim_jax.checks import ConfigError, LineParser, whole
from mambamim_jax.settings import CheckpointConfig, PretrainConfig

PRESET = f"{Path(__file__).parents[2] / 'configs' / 'pretrain.py'}:demo"


class Trainer:
    """The loop's step and its checkpoints, without the rest of the loop."""

    def __init__(self, config: PretrainConfig, folder: Path):
        import jax

        from mambamim_jax.train.checkpoint import Checkpoints
        from mambamim_jax.train.optim import make_optimiser
        from mambamim_jax.train.pretrain import mim_task
        from mambamim_jax.train.sharding import make_placement
        from mambamim_jax.train.step import initial_state, make_step

        task, self.config = mim_task(config), config
        optimiser, schedule = make_optimiser(config.optim, 10**5, task.unused_parameters)
        placement = make_placement(config.mesh, config.data.batch)
        self.state = initial_state(task, optimiser, config.seed, placement)
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        shape = (config.data.batch, *config.data.crop, 1)
        self.batch = placement.put({"image": jax.device_get(jax.random.uniform(jax.random.key(1), shape))})
        self.function = make_step(task, optimiser, schedule, seed=config.seed, placement=placement)
        self.checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
        self.number = 0

    def interval(self, steps: int, saving: bool) -> tuple[float, float]:
        """Seconds of so many steps, and those of them in which the loop stood still for the save."""
        import jax

        started, stood = time.perf_counter(), 0.0
        before: Any = None
        for step in range(steps):
            self.state, metrics = self.function(self.state, self.batch)
            jax.device_get(before)  # as the loop does, the metrics of the step before
            before, self.number = metrics, self.number + 1
            if saving and step == 0:
                jax.device_get(metrics)
                begun = time.perf_counter()
                self.checkpoints.save(self.number, self.state, {}, self.config, self.number)
                stood = time.perf_counter() - begun
        jax.block_until_ready(self.state)
        begun = time.perf_counter()
        self.checkpoints.wait()
        return time.perf_counter() - started, stood + time.perf_counter() - begun


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 where the arguments cannot work."""
    parser = LineParser(prog="bench.py saving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--interval", type=whole(1), default=100, help="steps between two saves")
    parser.add_argument("--rounds", type=whole(1), default=3, help="intervals of each kind")
    parser.add_argument("--folder", help="where to write; a temporary folder if not given")
    options, overrides = parser.parse_known_args(argv)
    preset = [] if any(a.startswith("--config=") for a in overrides) else [f"--config={PRESET}"]
    try:
        config = settings([*preset, *overrides])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        trainer = Trainer(config, Path(folder))
        trainer.interval(2, saving=True)
        stood = []
        for number in range(options.rounds):
            for saving in (number % 2 == 0, number % 2 == 1):  # neither kind is always the first
                took, still = trainer.interval(options.interval, saving)
                seconds[saving].append(took)
                stood += [still] if saving else []
        trainer.checkpoints.close()
    without, saving_too = (statistics.median(seconds[kind]) for kind in (False, True))
    pairs = [f"{b / a - 1:+.1%}" for a, b in zip(seconds[False], seconds[True])]
    rows = [
        ["without", f"{options.interval / without:.3g}", "", "", ""],
        [
            "one save",
            f"{options.interval / saving_too:.3g}",
            f"{saving_too / without - 1:+.1%}",
            ", ".join(pairs),
            f"{statistics.median(stood):.2f}",
        ],
    ]
    title = f"Saving once in {options.interval} steps, a state of {trainer.bytes / 2**20:.1f} MiB"
    print_table(title, ["", "steps/s", "time against without", "pair by pair", "stood still s"], rows)
    return 0
