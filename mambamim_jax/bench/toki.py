"""``launch/bench.py toki``: our token interpolation against the released loops, forward and backward.

python launch/bench.py toki [--released=PATH] [--side=6] [--channels=384] [--active=54] [--masks=16]

Each call takes the next mask of a number drawn like those of training; times are means over them. A turn lasts a
second at least: alone between the other side's, a step of milliseconds would be timed while its cores wake up
(``--turn=0`` does that). The first four turns of each side do not count: a process needs seconds to settle.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mambamim_jax.bench.alternate import Side, SideError, measure
from mambamim_jax.bench.tables import print_table
from mambamim_jax.bench.torch_baseline import checkout
from mambamim_jax.checks import LineParser, whole


def masks(tokens: int, active: int, count: int) -> list[list[bool]]:
    """So many masks, each of so many tokens, some active."""
    chosen = [set(random.Random(seed).sample(range(tokens), min(active, tokens))) for seed in range(count)]
    return [[token in some for token in range(tokens)] for some in chosen]


def ours(
    active: Sequence[Sequence[bool]], channels: int, dtype: str = "float32", seed: int = 0
) -> Callable[[], Any]:
    """Forward and backward of one sample with gradients of A and the tokens; each call has the next mask (l,)."""
    import jax
    import jax.numpy as jnp

    from mambamim_jax.model.toki import toki

    keys = jax.random.split(jax.random.key(seed))
    features = jax.random.normal(keys[0], (1, len(active[0]), channels), dtype)
    A = 0.05 * jax.random.normal(keys[1], (channels, channels), dtype)
    given = itertools.cycle([jnp.asarray(mask)[None] for mask in active])

    def loss(features, A, mask):
        tokens = toki(features, mask, A)
        return jnp.sum(tokens * tokens)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(step(features, A, next(given)))[0]


def theirs(
    released: str, active: Sequence[Sequence[bool]], channels: int, threads: int = 0
) -> Callable[[], float]:
    """The same with the released code, on the CPU."""
    import torch

    from mambamim_jax.bench.torch_baseline import TokiStep

    if threads:
        torch.set_num_threads(threads)
    return TokiStep(released, active, channels)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 where a side cannot run."""
    parser = LineParser(prog="bench.py toki", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--released", type=checkout, metavar="PATH", help="a checkout of the authors' code (needs PyTorch)"
    )
    parser.add_argument("--side", type=whole(1), default=6, help="patches along each axis (6 at 96 voxels)")
    parser.add_argument("--channels", type=whole(1), default=384)
    parser.add_argument("--active", type=whole(1), default=54, help="visible tokens")
    parser.add_argument("--masks", type=whole(1), default=16, help="how many, and turns of each side")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds of a turn, at least; 0: one call")
    parser.add_argument("--threads", type=whole(0), default=0, help="cores for each side, 0 for all")
    options = parser.parse_args(argv)
    tokens = options.side**3
    if options.active > tokens:
        parser.error(
            f"--active: found {options.active}, expected at most {tokens}, the tokens of --side={options.side}"
        )
    active = masks(tokens, options.active, options.masks)
    shared: dict[str, Any] = {"active": active, "channels": options.channels}
    here = "mambamim_jax.bench.toki"
    sides = [Side("ours", f"{here}:ours", shared, options.threads, options.turn)]
    if options.released:
        extra = {"released": options.released, "threads": options.threads}
        sides.append(Side("released", f"{here}:theirs", shared | extra, options.threads, options.turn))
    try:
        measure(sides, steps=options.masks, warm_up=4)
    except SideError as error:
        print(error, file=sys.stderr)
        return 2
    size = f"l = {tokens}, c = {options.channels}, {sum(active[0])} active, {options.masks} masks"
    means = [statistics.fmean(side.seconds) for side in sides]
    rows = [
        [
            side.name,
            f"{1e3 * mean:.2f}",
            f"{1e3 * min(side.seconds):.2f}–{1e3 * max(side.seconds):.2f}",
            f"{mean / means[0]:.0f}×",
        ]
        for side, mean in zip(sides, means)
    ]
    columns = ["", "mean ms", "range of turns, ms", "time against ours"]
    print_table(f"TOKI, {size}, forward and backward, float32", columns, rows)
    return 0
