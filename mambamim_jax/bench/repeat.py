"""Many runs of one function within one launch, so that the cost of launching it is not in its time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Run = Callable[[], float]
"""Times one launch; seconds a run."""
Compile = Callable[[], tuple[Run, int | None]]
"""Compiles, safely and faster for several at once; gives what times it, and a run's scratch in bytes if known."""
COPIED_ELEMENTS = 32_000_000
"""(b, l, e) elements up to which a loop's body holds several runs, so that the loop's own cost does not show."""


def copies_for(elements: int, iterations: int) -> int:
    """How many runs of so many elements a loop's body holds."""
    return min(max(COPIED_ELEMENTS // elements, 1), 16, iterations)


def repeated(
    once: Callable[..., Any],
    calls: Callable[[Any], list[tuple[Any, ...]]],
    given: Any,
    turns: int,
    *,
    scratch: bool = False,
) -> Compile:
    """A loop of so many turns, each of which calls ``once`` with every one of ``calls(given)``.

    The calls' arguments must differ, or the compiler makes one of them. ``given`` goes through the loop behind a
    barrier, so that no turn's work is moved out of it. A single turn of a single call is no loop. The scratch of a call
    in a loop costs another compilation, and is found only if asked for.
    """
    function: Any = jax.jit(once)  # so that its copies are lowered once
    first = calls(given)

    def many(given: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            given, _ = carry
            found = [function(*call) for call in calls(given)]
            return jax.lax.optimization_barrier((given, found))

        one = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(once, *first[0]))
        return jax.lax.fori_loop(0, turns, body, (given, [one for _ in first]))[1]

    runs = turns * len(first)
    single: Any = function.lower(*first[0]) if scratch or runs == 1 else None
    loop: Any = jax.jit(many).lower(given) if runs > 1 else None

    def compiled() -> tuple[Run, int | None]:
        alone: Any = single and single.compile()
        repeating: Any = loop and loop.compile()

        def run() -> float:
            start = time.perf_counter()
            jax.block_until_ready(repeating(given) if repeating else alone(*first[0]))
            return (time.perf_counter() - start) / runs

        return run, alone.memory_analysis().temp_size_in_bytes if alone else None

    return compiled


def alternate(sides: dict[str, Run], rounds: int) -> dict[str, tuple[float, float]]:
    """Each side's median seconds, and median processor seconds, over rounds in which each runs once."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            run()  # untimed: the first run after another side also pays for the memory which that one gave back
            wall, processor = time.perf_counter(), time.process_time()
            seconds = run()
            busy = (time.process_time() - processor) / (time.perf_counter() - wall)
            times[name].append((seconds, seconds * busy))
    return {
        name: (statistics.median(wall), statistics.median(processor))
        for name, (wall, processor) in ((name, zip(*values)) for name, values in times.items())
    }
