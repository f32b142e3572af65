"""``launch/bench.py toki``: our token interpolation against the released loops, forward and backward.

python launch/bench.py toki [--released=PATH] [--side=6] [--channels=384] [--active=54] [--steps=5]
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mambamim_jax.bench.alternate import Side, SideError, measure
from mambamim_jax.bench.tables import print_table


def ours(active: Sequence[bool], channels: int, dtype: str = "float32", seed: int = 0) -> Callable[[], float]:
    """Forward and backward of one sample with gradients of A and the tokens, as a callable; active (l,)."""
    import jax
    import jax.numpy as jnp

    from mambamim_jax.model.toki import toki

    keys = jax.random.split(jax.random.key(seed))
    features = jax.random.normal(keys[0], (1, len(active), channels), dtype)
    A = 0.05 * jax.random.normal(keys[1], (channels, channels), dtype)
    mask = jnp.asarray(active)[None]

    def loss(features, A):
        tokens = toki(features, mask, A)
        return jnp.sum(tokens * tokens)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return lambda: float(jax.block_until_ready(step(features, A))[0])


def theirs(released: str, active: Sequence[bool], channels: int, threads: int = 0) -> Callable[[], float]:
    """The same with the released code, on the CPU."""
    import torch

    from mambamim_jax.bench.torch_baseline import TokiStep

    if threads:
        torch.set_num_threads(threads)
    return TokiStep(released, active, channels)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 where a side cannot run."""
    parser = argparse.ArgumentParser(prog="bench.py toki", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--released", metavar="PATH", help="a checkout of the authors' code (needs PyTorch)")
    parser.add_argument("--side", type=int, default=6, help="patches along each axis (6 at 96 voxels)")
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--active", type=int, default=54, help="visible tokens")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="cores for each side, 0 for all")
    options = parser.parse_args(argv)
    tokens = options.side**3
    chosen = set(random.Random(0).sample(range(tokens), min(options.active, tokens)))
    shared: dict[str, Any] = {"active": [i in chosen for i in range(tokens)], "channels": options.channels}
    here = "mambamim_jax.bench.toki"
    sides = [Side("ours", f"{here}:ours", shared, options.threads)]
    if options.released:
        extra = {"released": options.released, "threads": options.threads}
        sides.append(Side("released", f"{here}:theirs", shared | extra, options.threads))
    try:
        measure(sides, steps=options.steps, warm_up=2)
    except SideError as error:
        print(error, file=sys.stderr)
        return 2
    title = f"TOKI, l = {tokens}, c = {options.channels}, {len(chosen)} active, forward and backward, float32"
    rows = [
        [
            side.name,
            f"{1e3 * side.median:.1f}",
            f"{1e3 * min(side.seconds):.1f}–{1e3 * max(side.seconds):.1f}",
        ]
        for side in sides
    ]
    for row, side in zip(rows, sides):
        row.append(f"{side.median / sides[0].median:.0f}×")
    print_table(title, ["", "median ms", "range ms", "time against ours"], rows)
    return 0
