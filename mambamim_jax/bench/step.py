"""``launch/bench.py step``: one pre-training step, ours against the released PyTorch code's, alternately.

python launch/bench.py step [--released=PATH] [--batch=1] [--dtype=float32] [--steps=3] [--config.a.b=value …]

A step is forward, backward, clipping and AdamW on random crops, the mask drawn anew. The released code runs
on the CPU only. On a GPU, --batch=4,16 --dtype=float32,bfloat16 measures each pair in a process of its own; a step is
handed over before the one before it has ended there, as in training, and steps are timed in turns of two seconds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambamim_jax.bench.alternate import Side, SideError, measure
from mambamim_jax.bench.profile import Cost, costliest, matrix_flops, product_ceiling
from mambamim_jax.bench.tables import print_table
from mambamim_jax.bench.torch_baseline import checkout
from mambamim_jax.checks import ConfigError, LineParser, whole, whole_numbers
from mambamim_jax.config import parse_command_line
from mambamim_jax.settings import PHANTOMS, PretrainConfig

PRESET = f"{Path(__file__).parents[2] / 'configs' / 'pretrain.py'}:hymamba_b"
GIB = 2**30
HERE = "mambamim_jax.bench.step"


class OurStep:
    """The training loop's own step on random crops.

    Args:
      arguments: --config and overrides, as for launch/pretrain.py.
      batch: crops.
      dtype: compute dtype.
      costs: how many of the costliest operations to look for when asked for facts.
    """

    def __init__(self, arguments: Sequence[str], batch: int, dtype: str, costs: int = 0):
        import jax

        from mambamim_jax.train.optim import make_optimiser
        from mambamim_jax.train.pretrain import mim_task
        from mambamim_jax.train.step import initial_state, make_step

        config = settings([*arguments, f"--config.model.dtype={dtype}"])
        self.costs, self.dtype = costs, dtype
        task = mim_task(config)
        optimiser, schedule = make_optimiser(config.optim, 1000, task.unused_parameters)
        self.state = initial_state(task, optimiser, config.seed)
        self.batch = {"image": jax.random.uniform(jax.random.key(1), (batch, *config.data.crop, 1))}
        self.step = make_step(task, optimiser, schedule, seed=config.seed)
        self.on_gpu = jax.default_backend() != "cpu"
        self.pending: Any = None
        self.turn = 2.0 if self.on_gpu else 0.0
        self.flops = matrix_flops(self.step.trace(self.state, self.batch).jaxpr)

    def __call__(self) -> float:
        """Does one step and returns its loss; on a GPU starts one, waits for that before and returns its loss."""
        import jax

        self.state, metrics = self.step(self.state, self.batch)
        if not self.on_gpu:
            jax.block_until_ready(self.state)
            return float(metrics["loss"])
        before, self.pending = self.pending or metrics, metrics
        return float(before["loss"])

    def facts(self) -> dict[str, Any]:
        """Device, FLOPs, ceiling of matrix products, device memory and the costliest operations."""
        import jax

        device, on_gpu = jax.devices()[0], self.on_gpu
        jax.block_until_ready(self.state)
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
        side = 8192 if on_gpu else 2048
        facts = {"device": device.device_kind, "on_gpu": on_gpu, "flops": self.flops, "device_bytes": memory}
        facts["ceiling"] = product_ceiling(self.dtype, side)
        if self.costs:
            assert self.step.compiled is not None
            steps, text = 3 if on_gpu else 1, self.step.compiled.as_text() or ""
            waited = lambda: jax.block_until_ready((self(), self.state))  # noqa: E731
            facts["costs"] = [vars(c) for c in costliest(waited, text, steps=steps, count=self.costs)]
        return facts


def theirs(released: str, config: dict[str, Any], batch: int, threads: int = 0) -> Any:
    """The released code's step on the CPU."""
    import torch

    from mambamim_jax.bench.torch_baseline import PretrainStep

    if threads:
        torch.set_num_threads(threads)
    return PretrainStep(released, config, batch)


def settings(arguments: Sequence[str]) -> PretrainConfig:
    """The configuration of launch/pretrain.py's arguments; data are never touched."""
    unused = ["--workdir=.", f"--config.data.source={PHANTOMS}"]
    config = [] if any(a.startswith("--config=") for a in arguments) else [f"--config={PRESET}"]
    return parse_command_line([*config, *unused, *arguments], PretrainConfig, __doc__ or "")[0]


def released_sizes(config: PretrainConfig) -> dict[str, Any]:
    """Our settings as sizes of the released model.

    Raises: ConfigError for what it cannot be built as.
    """
    model, crop = config.model, config.data.crop
    possible = model.encoder == "hymamba" and model.hymamba.state == 16 and len(set(crop)) == 1
    if not possible:
        found = f"{model.encoder}, crop {crop}"
        raise ConfigError("--released", found, "hymamba with state 16 on a cube, all the released code has")
    own = model.hymamba
    sizes: dict[str, Any] = {"size": crop[0], "channels": own.channels, "mamba_depth": own.mamba_depth}
    sizes |= {"depths": (1, *own.depths), "expansion": (2, *own.expansion)}
    return sizes | {"decoder_width": model.decoder_width, "mask_ratio": model.mask_ratio}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; 0, 1 where a measurement failed, 2 where the arguments cannot work."""
    options, overrides = _parser().parse_known_args(argv)
    try:
        for dtype in options.dtype:
            config = settings([*overrides, f"--config.model.dtype={dtype}"])
        sizes = released_sizes(config) if options.released else {}
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    failed, rows, details = 0, [], []
    for batch in options.batch:
        for dtype in options.dtype:
            ours = {"arguments": overrides, "batch": batch, "dtype": dtype, "costs": options.costliest}
            sides = [Side("ours", f"{HERE}:OurStep", ours, options.threads)]
            if options.released and dtype == "float32":
                other = {"released": options.released, "config": sizes, "batch": batch}
                other["threads"] = options.threads
                sides.append(Side("released", f"{HERE}:theirs", other, options.threads))
            try:
                measure(sides, steps=options.steps, warm_up=options.warm_up)
            except SideError as error:
                failed = 1
                rows.append([f"ours, {dtype}", str(batch), f"failed: {error}", *[""] * 5])
                continue
            rows += [_row(side, sides, dtype, batch) for side in sides]
            for side in sides:  # at once, since what is still to come can take minutes and may be stopped
                print(
                    f"{side.name}, {dtype}, batch {batch}: {side.median:.3g} s", file=sys.stderr, flush=True
                )
            details.append((dtype, batch, sides[0].facts))
    crop = "×".join(map(str, config.data.crop))
    header = [
        "",
        "batch",
        "median s",
        "range s",
        "crops/s",
        "peak GiB",
        "time against ours",
        "TFLOP/s (share)",
    ]
    print_table(f"Pre-training step, {config.model.encoder}, {crop}{_device(details)}", header, rows)
    for dtype, batch, facts in details:
        _print_costs(dtype, batch, facts.get("costs", []))
    return failed


def _parser() -> LineParser:
    parser = LineParser(prog="bench.py step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--released", type=checkout, metavar="PATH", help="a checkout of the authors' code (needs PyTorch)"
    )
    parser.add_argument(
        "--batch", type=whole_numbers(1), default=(1,), help="crops, several separated by commas"
    )
    parser.add_argument(
        "--dtype", type=lambda text: text.split(","), default=["float32"], help="float32, bfloat16 or both"
    )
    parser.add_argument("--steps", type=whole(1), default=3, help="measured steps of each side")
    parser.add_argument("--warm-up", type=whole(0), default=1, help="steps before, of each side")
    parser.add_argument("--threads", type=whole(0), default=0, help="cores for each side, 0 for all")
    parser.add_argument("--costliest", type=whole(0), default=5, help="operations to list, 0 for none")
    return parser


def _row(side: Side, sides: Sequence[Side], dtype: str, batch: int) -> list[str]:
    """One line of the table. Memory is the device's on a GPU, else all that the process ever held."""
    peak = side.facts.get("device_bytes") or side.peak_bytes
    rate = side.facts.get("flops", 0) / side.median
    ceiling = side.facts.get("ceiling", math.inf)
    return [
        f"{side.name}, {dtype}",
        str(batch),
        f"{side.median:.3g}",
        f"{min(side.seconds):.3g}–{max(side.seconds):.3g}",
        f"{batch / side.median:.3g}",
        f"{peak / GIB:.2f}",
        f"{side.median / sides[0].median:.2f}×",
        f"{rate / 1e12:.3g} ({rate / ceiling:.0%} of {ceiling / 1e12:.3g})" if rate else "",
    ]


def _device(details: Sequence[tuple[str, int, dict[str, Any]]]) -> str:
    kinds = {facts["device"] for _, _, facts in details if facts.get("on_gpu")}
    return f", on {', '.join(sorted(kinds))}" if kinds else ""


def _print_costs(dtype: str, batch: int, costs: Sequence[dict[str, Any]]) -> None:
    if costs:
        found = [Cost(**cost) for cost in costs]
        rows = [[c.name, c.source, f"{c.milliseconds:.2f}", f"{c.share:.1%}", str(c.calls)] for c in found]
        header = ["operation", "from", "ms a step", "of busy time", "calls"]
        print_table(f"Costliest operations, {dtype}, batch {batch}", header, rows)
