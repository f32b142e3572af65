"""``launch/bench.py scaling``: the training step on 1 to N devices of this machine, or on paper for a cluster.

python launch/bench.py scaling [--devices=1,2,4] [--mesh=-1,1,1] [--batch=4] [--fake=N] [--config.a.b=value …]
python launch/bench.py scaling --simulate=8,64,256,1024 [--mesh=-1,1,1 --mesh=-1,8,1] [--batch=16] [--rate=59.9]

Both keep the crops of a device the same. The first trains, on every number of devices in turn; --fake divides the
CPU into N devices, which share its cores. The second compiles the step for so many described devices (of a CPU) and
reads memory, arithmetic and collectives from the compiled program; --rate is what one device computes alone, crops/s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mambamim_jax.bench.collectives import KINDS, Links, Program, by_kind
from mambamim_jax.bench.profile import matrix_flops
from mambamim_jax.bench.step import settings
from mambamim_jax.bench.tables import print_table
from mambamim_jax.checks import ConfigError, LineParser, whole
from mambamim_jax.settings import MeshConfig, PretrainConfig

STEPS = 1000  # of the schedule
SMALL = 2**20
"""Bytes below which a collective is one of BatchNorm's, the loss's and the like: what follows waits for it."""


def _parts(config: PretrainConfig, mesh: Sequence[int], devices: int, batch: int) -> tuple[Any, ...]:
    """Task, optimiser, placement and jitted step for ``batch`` crops a device."""
    import jax

    from mambamim_jax.train.optim import make_optimiser
    from mambamim_jax.train.pretrain import mim_task
    from mambamim_jax.train.sharding import make_placement
    from mambamim_jax.train.step import make_step

    task = mim_task(config)
    optimiser, schedule = make_optimiser(config.optim, STEPS, task.unused_parameters)
    placement = make_placement(MeshConfig(*mesh), batch * devices, jax.devices()[:devices])
    step = make_step(
        task,
        optimiser,
        schedule,
        seed=0,
        accumulate=config.optim.accumulate,
        remat=config.remat,
        placement=placement,
    )
    return task, optimiser, placement, step


def shape_of(placement: Any) -> str:
    """The mesh as the tables show it."""
    sizes = placement.mesh.shape
    return " × ".join(str(size) for axis, size in sizes.items() if axis != "space" or size > 1)


class Run:
    """Training on the first so many devices; ``seconds`` of a step fill up as it is measured."""

    def __init__(self, config: PretrainConfig, mesh: Sequence[int], devices: int, batch: int):
        import numpy as np

        from mambamim_jax.train.step import STOP, initial_state

        task, optimiser, self.placement, self.function = _parts(config, mesh, devices, batch)
        self.devices, self.batch = devices, batch
        self.state = initial_state(task, optimiser, config.seed, self.placement)
        image = np.random.default_rng(0).uniform(size=(batch * devices, *config.data.crop, 1))
        self.crops = self.placement.put({"image": image.astype(np.float32)})
        self.crops[STOP] = self.placement.flag(0)
        self.seconds: list[float] = []

    def step(self, steps: int) -> float:
        """Does some steps and returns the seconds of one."""
        import jax

        started = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.function(self.state, self.crops)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - started) / steps

    def row(self, alone: Run) -> list[str]:
        """Its line of the table; ``alone`` is the run on the fewest devices."""
        median = statistics.median(self.seconds)
        rate, best = self.batch / median, alone.batch / statistics.median(alone.seconds)
        return [
            str(self.devices),
            shape_of(self.placement),
            str(self.batch * self.devices),
            f"{median:.3g}",
            f"{min(self.seconds):.3g}–{max(self.seconds):.3g}",
            f"{rate * self.devices:.3g}",
            f"{rate:.3g}",
            f"{rate / best:.1%}",
        ]


def train(options: argparse.Namespace, config: PretrainConfig) -> int:
    """Measures and prints the table."""
    import jax

    there = len(jax.devices())
    counts = options.devices or [2**n for n in range(there.bit_length())]
    if max(counts) > there:
        raise ConfigError("--devices", f"found {max(counts)}", f"at most the {there} here")
    runs = [Run(config, mesh, count, options.batch) for mesh in options.mesh for count in counts]
    for run in runs:
        run.step(2)
    compiled = Compilations()
    for _ in range(options.rounds):
        for run in runs:
            run.seconds.append(run.step(options.steps))
    device = jax.devices()[0]
    note = ", fake devices that share the cores" if device.platform == "cpu" and there > 1 else ""
    crop = "×".join(map(str, config.data.crop))
    title = f"Weak scaling of the pre-training step on {device.device_kind}{note}: {config.model.encoder}, "
    title += f"{config.model.dtype}, {crop}, {options.batch} crops a device, {options.rounds} × {options.steps} steps; "
    title += f"{compiled.count} compilations after the first steps"
    header = ["devices", "data × fsdp × model", "crops", "median s", "range s", "crops/s", "a device"]
    print_table(title, [*header, "efficiency"], [run.row(runs[0]) for run in runs])
    return 0


@dataclass
class Compilations:
    """Counts what XLA compiles from now on."""

    count: int = 0

    def __post_init__(self) -> None:
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event.endswith("backend_compile_duration")


@dataclass
class Plan:
    """The step, compiled for a mesh that isn't there.

    Attributes:
      flops: of the compiled program, on one device. written: of the program as written, over the devices.
      memory: bytes on one device: arguments (state and batch), and what the step needs beside them.
    """

    devices: int
    mesh: str
    program: Program
    flops: float
    written: float
    memory: tuple[int, int]
    seconds: float
    links: Links = field(default_factory=Links)

    def communication(self) -> tuple[float, float]:
        """Seconds of the large collectives, and of the small ones, which follow each other."""
        large = [c for c in self.program.collectives if c.bytes >= SMALL]
        small = [c for c in self.program.collectives if c.bytes < SMALL]
        waits = self.program.in_sequence * self.links.wait(self.devices)
        return sum(map(self.links.seconds, large)), sum(map(self.links.seconds, small)) + waits

    def efficiency(self, alone: float, flops: float) -> tuple[float, float]:
        """Where nothing large is hidden behind arithmetic, and where all is.

        Args:
          alone: seconds of the step on one device. flops: its arithmetic; more on one of many takes longer.
        """
        busy = alone * max(1.0, self.flops / flops)
        large, small = self.communication()
        return alone / (busy + large + small), alone / (max(busy, large) + small)


def plan(config: PretrainConfig, mesh: Sequence[int], devices: int, batch: int) -> Plan:
    """Compiles the step; nothing is allocated on the devices."""
    import jax
    import jax.numpy as jnp

    from mambamim_jax.train.step import RUN_SELDOM, abstract_state

    started = time.perf_counter()
    task, optimiser, placement, step = _parts(config, mesh, devices, batch)
    state = placement.like(abstract_state(task, optimiser))
    shape = (batch * devices, *config.data.crop, 1)
    crops = {"image": jax.ShapeDtypeStruct(shape, jnp.int16, sharding=placement.of_batch(len(shape)))}
    traced = step.trace(state, crops)
    compiled = traced.lower().compile(compiler_options=RUN_SELDOM)
    memory: Any = compiled.memory_analysis()
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    cost: Any = compiled.cost_analysis()
    return Plan(
        devices,
        shape_of(placement),
        Program(compiled.as_text() or ""),
        cost["flops"],
        matrix_flops(traced.jaxpr) / devices,
        (memory.argument_size_in_bytes, beside),
        time.perf_counter() - started,
    )


def simulate(options: argparse.Namespace, config: PretrainConfig) -> int:
    """Compiles for every mesh and number of devices, and prints the table."""
    rows, first, mebi = [], None, 2.0**20
    for mesh in options.mesh:
        for count in options.simulate:
            found = plan(config, mesh, count, options.batch)
            first = first or found
            sent = by_kind(found.program.collectives)
            low, high = found.efficiency(options.batch / options.rate, first.flops)
            row = [str(count), found.mesh, *(f"{size / mebi:.1f}" for size in found.memory)]
            row += [f"{found.flops / 1e12:.3g}", f"{found.flops / found.written:.2f}"]
            row += [f"{sent.get(kind, 0) / mebi:.1f}" for kind in KINDS] + [str(found.program.in_sequence)]
            row += [f"{1e3 * seconds:.1f}" for seconds in found.communication()]
            rows.append([*row, f"{low:.0%}–{high:.0%}", f"{found.seconds:.0f}"])
            print(f"compiled for {count} devices, {found.mesh}: {found.seconds:.0f} s", file=sys.stderr)
    links = Links()
    crop = "×".join(map(str, config.data.crop))
    title = (
        f"The step on paper: {config.model.encoder}, {config.model.dtype}, {crop}, {options.batch} crops a device, "
        f"{1e3 * options.batch / options.rate:.0f} ms alone; {links.host} devices a host, links of "
        f"{links.inside / 1e9:.0f} GB/s within and {links.between / 1e9:.0f} GB/s a device between hosts, "
        f"{links.reached:.0%} reached, {1e6 * links.latency:.0f} µs latency, as much again for each doubling of hosts"
    )
    header = ["devices", "data × fsdp × model", "arguments MiB", "beside MiB", "TFLOP", "of as written"]
    header += [f"{kind} MiB" for kind in KINDS] + ["in sequence", "large ms", "small ms", "efficiency"]
    print_table(title, [*header, "compiled s"], rows)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 where the arguments cannot work."""
    options, overrides = _parser().parse_known_args(argv)
    options.mesh = options.mesh or [(-1, 1, 1)]
    import jax

    count = max(options.simulate or [options.fake])
    if count:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    try:
        return (simulate if options.simulate else train)(options, settings(overrides))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> LineParser:
    parser = LineParser(prog="bench.py scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--devices", type=_numbers, help="how many in turn; powers of two up to all if not given"
    )
    parser.add_argument("--mesh", type=_mesh, action="append", help="data,fsdp,model[,space]; one may be -1")
    parser.add_argument("--batch", type=whole(1), default=4, help="crops a device")
    parser.add_argument("--rounds", type=whole(1), default=3, help="measurements of each number of devices")
    parser.add_argument("--steps", type=whole(1), default=1, help="steps of one measurement")
    parser.add_argument("--fake", type=whole(0), default=0, help="divide the CPU into so many devices")
    parser.add_argument("--simulate", type=_numbers, help="compile for so many devices instead")
    parser.add_argument(
        "--rate", type=float, default=59.9, help="crops/s of one device alone, for --simulate"
    )
    return parser


def _numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def _mesh(text: str) -> tuple[int, int, int, int]:
    sizes = _numbers(text)
    data, fsdp, model, space = sizes if len(sizes) == 4 else (*sizes, 1)
    return data, fsdp, model, space
