"""Trial on a GPU, not part of the package: the scan's kernels of before (``previous_scan``) and candidates.

python gpu_try.py [--budget=SECONDS] [--only=NAME,...]

The kernels of a size are compiled by as many threads. At every size
values and gradients are compared with the previous kernels', and those with the associative scan's; then all are timed
alternately, many runs in one launch. Prints as it goes, so that a run that is cut off still tells something.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import statistics
import sys
import time
import warnings

warnings.simplefilter("ignore")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from mambamim_jax.bench.scan import floor_seconds, make_inputs  # noqa: E402
from mambamim_jax.ops.selective_scan import associative, triton  # noqa: E402
from mambamim_jax.ops.selective_scan.contract import ScanInputs  # noqa: E402
from mambamim_jax.ops.selective_scan.tuning import Launch  # noqa: E402
from previous_scan import triton as previous  # noqa: E402
from previous_scan.tuning import TUNED as PREVIOUS  # noqa: E402

FILL = 132 * 12
BASE = Launch(8, 8, 1, 1, FILL, 48)
CANDIDATES = {
    "2ch T8": BASE,
    "2ch T4 kept ahead": BASE._replace(chunk=4, part=4, kept=4, again=False, ahead=True, backward_ahead=True),
    "2ch T4 kept": BASE._replace(chunk=4, part=4, kept=4, again=False),
    "2ch T4": BASE._replace(chunk=4, part=4),
    "2ch T6": BASE._replace(chunk=6, part=6),
    "2ch T6 joined": BASE._replace(chunk=6, part=6, joined=True, backward_warps=4),
    "2ch T4 joined": BASE._replace(chunk=4, part=4, joined=True, backward_warps=4),
    "2ch T8 joined": BASE._replace(joined=True, backward_warps=4),
    "2ch T8 walked": BASE._replace(part=4, kept=4, again=False),
    "4ch T2 early": BASE._replace(channels=4, chunk=2, part=2, kept=2, again=False, early=True),
    "4ch T4": BASE._replace(channels=4, chunk=4, part=4),
}
FORWARDS = {
    f"forward {channels}ch T{chunk}{' ahead' * ahead}": BASE._replace(
        channels=channels, inference_chunk=chunk, ahead=ahead
    )
    for channels in (2, 4)
    for chunk in (4, 8)
    for ahead in (False, True)
}
START = time.time()


def say(*parts) -> None:
    print(f"[{time.time() - START:5.0f} s]", *parts, flush=True)


SIDES = {
    "previous": (previous, PREVIOUS[9, 0]),
    **{name: (triton, launch) for name, launch in {**CANDIDATES, **FORWARDS}.items()},
}


def step(name: str, mode: str):
    """A side's function, arrays -> y, or y and the gradients of Σ y²/2."""
    module, launch = SIDES[name]

    def once(*arrays):
        inputs = ScanInputs(*arrays)
        y, last, saved = module.forward(inputs, False, mode != "forward", launch=launch)
        if mode == "forward":
            return (y,)
        if mode == "save":
            return y, saved
        return y, *module.backward(inputs, saved, y, jnp.zeros_like(last), False, launch=launch)[:8]

    return once


def associated(*arrays):
    """The same by the associative scan."""
    y, pull = jax.vjp(lambda *arrays: associative.scan(ScanInputs(*arrays), False)[0], *arrays)
    return y, *pull(y)


@jax.jit
def difference(found, wanted):
    """The largest of all arrays' errors, each relative to the array's largest element."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted))
    return jnp.max(jnp.stack([jnp.max(jnp.abs(w - f)) / jnp.max(jnp.abs(w)) for f, w in pairs]))


def looped(once, arrays, iterations):
    """``once`` compiled, and a function that times ``iterations`` runs in one launch: seconds a run."""

    def many(arrays):
        def body(_, carry):
            arrays, _ = carry
            return jax.lax.optimization_barrier((arrays, once(*arrays)))

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(once, *arrays))
        return jax.lax.fori_loop(0, iterations, body, (arrays, start))[1]

    compiled = jax.jit(many).lower(arrays).compile()
    jax.block_until_ready(compiled(arrays))

    def run():
        start = time.perf_counter()
        jax.block_until_ready(compiled(arrays))
        return (time.perf_counter() - start) / iterations

    return compiled, run


def compare(names, b, l, mode, rounds=5, width=768) -> dict[str, float]:
    """Prints errors and medians, the sides alternately; returns the medians of those that are right."""
    arrays = make_inputs(b, l, width, 16, "float32")[:8]
    iterations = max(3, min(200, 300_000_000 // (b * l * width)))
    with concurrent.futures.ThreadPoolExecutor(14) as threads:
        building = {name: threads.submit(looped, step(name, mode), arrays, iterations) for name in names}
    runs = {}
    for name, future in building.items():
        try:
            runs[name] = future.result()
        except Exception as error:
            say(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    say(f"({b}, {l}) {mode}: compiled")
    wanted = runs["previous"][0](arrays)
    if mode == "both" and b * l <= 20_000:
        with jax.default_matmul_precision("highest"):
            say(f"previous from associative: {difference(wanted, jax.jit(associated)(*arrays)):.1e}")
    errors, times = {}, {name: [] for name in runs}
    for name, (compiled, _) in runs.items():
        found = compiled(arrays)
        errors[name] = float(difference(found, wanted) if mode == "both" else difference(found[0], wanted[0]))
        del found
    del wanted
    for _ in range(rounds):
        for name, (_, run) in runs.items():
            times[name].append(run())
    medians = {name: statistics.median(values) for name, values in times.items()}
    floor = floor_seconds(b, l, width, "forward" if mode == "forward" else "forward + backward", "float32") or 0
    for name, seconds in sorted(medians.items(), key=lambda item: item[1]):
        share = f"{100 * floor / seconds:3.0f}%"
        say(f"({b}, {l}) {mode:7s} {seconds * 1e6:8.1f} us {share}  {name}, error {errors[name]:.1e}")
    return {name: seconds for name, seconds in medians.items() if errors[name] < 1e-4}


def sums() -> None:
    """How long XLA takes over the sums over warps of dB and dC, in the present layout and with warps first."""
    for warps in (12, 24, 48):
        x = jnp.ones((64, 216, warps, 32), jnp.float32)
        first = jnp.ones((warps, 64 * 216 * 32), jnp.float32)
        for name, array, axis in (("(b, l, warps, 32)", x, 2), ("(warps, b l 32)", first, 0)):
            run = looped(lambda a, axis=axis: jnp.sum(a, axis=axis), (array,), 50)[1]
            seconds = statistics.median(run() for _ in range(5))
            say(f"sum over {warps} warps, {name}: {seconds * 1e6:.1f} us, {array.size * 4 / seconds / 1e12:.2f} TB/s")


def fastest(medians: dict[str, float], count: int) -> list[str]:
    """The previous kernels and the fastest of the others."""
    order = sorted((name for name in medians if name != "previous"), key=lambda name: medians[name])
    return ["previous", *order[:count]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=370)
    parser.add_argument("--only", default=",".join(CANDIDATES))
    options = parser.parse_args()
    say(jax.devices()[0].device_kind, jax.__version__)
    names = ["previous", *(name for name in options.only.split(",") if name in CANDIDATES)]
    more = [(64, 54), (2, 1728), (1, 110592)]

    def left(needed: float) -> bool:
        return time.time() - START + needed < options.budget

    best = fastest(compare(names, 64, 216, "both"), 3)
    quick = ["previous"]
    if left(60):
        quick = fastest(compare(["previous", *FORWARDS], 64, 216, "forward"), 2)
    if left(40):
        compare(best, 64, 216, "save")
    if left(20):
        sums()
    for b, l in more:
        if left(70):
            compare(best, b, l, "both", 3)
    for b, l in more:
        if left(40):
            compare(quick, b, l, "forward", 3)
    say("done")


if __name__ == "__main__":
    main()
