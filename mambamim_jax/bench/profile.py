"""Where the time of a step goes (a ``jax.profiler`` trace joined with HLO text) and its matrix products."""

from __future__ import annotations

import gzip
import json
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\w+\[[\d,]*\]")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


@dataclass(frozen=True)
class Cost:
    """One operation of the compiled step: its share of the busy time and where in our code it comes from."""

    name: str
    source: str
    milliseconds: float
    share: float
    calls: int


def costliest(step: Callable[[], Any], hlo: str, *, steps: int = 3, count: int = 5) -> list[Cost]:
    """Traces ``steps`` calls of ``step`` and ranks their operations by time.

    Args:
      step: runs the compiled program once and waits for it.
      hlo: ``compiled.as_text()``; names of instructions are looked up there.
      steps: how many calls to trace; times returned are per call.
      count: how many operations to return.

    Returns:
      The costliest first; empty where the backend's trace names no operations.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        files = sorted(Path(folder).rglob("*.trace.json.gz"))
        events = [event for file in files for event in read_events(file)]
    return rank(events, instructions(hlo), steps=steps, count=count)


def read_events(file: Path) -> list[dict[str, Any]]:
    """Complete events of a trace that are operations on a device (or XLA:CPU's own), with ``track`` added."""
    with gzip.open(file, "rt") as text:
        events = json.load(text).get("traceEvents", [])
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"].get("name", "")
        elif event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"].get("name", "")
    found = []
    for event in events:
        if event.get("ph") != "X":
            continue
        process = processes.get(event["pid"], "")
        track = threads.get((event["pid"], event["tid"]), "")
        on_device = "/device:" in process and "Stream" in track
        if on_device or ("/device:" not in process and "hlo_op" in event.get("args", {})):
            found.append(event | {"on_device": on_device})
    on_device = any(event["on_device"] for event in found)
    return [event for event in found if event["on_device"] == on_device]


def instructions(hlo: str) -> dict[str, tuple[str, str]]:
    """Instruction → (opcode or the library call's name, the JAX operation it comes from and its result)."""
    table = {}
    for line in hlo.splitlines():
        if found := _INSTRUCTION.match(line):
            name, result, opcode = found.groups()
            target, source, array = _TARGET.search(line), _OP_NAME.search(line), _ARRAY.search(result)
            made_from = short_source(source.group(1)) if source else ""
            shown = f"{made_from} {array.group()}" if made_from and array else made_from
            table[name] = (target.group(1) if target else opcode, shown)
    return table


def rank(
    events: Iterable[Mapping[str, Any]],
    table: Mapping[str, tuple[str, str]],
    *,
    steps: int,
    count: int,
) -> list[Cost]:
    """Sums durations by JAX operation (by kernel name where the trace names none) and keeps the largest.

    An operation that holds others (a loop, a call) is left out, since its parts are counted.
    """
    times: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for event in events:
        op = event.get("args", {}).get("hlo_op", "")
        opcode, source = table.get(op, ("", ""))
        if opcode in ("while", "conditional", "call"):
            continue
        key = (opcode or event.get("name", "?"), source or op or event.get("name", "?"))
        times[key] += event.get("dur", 0)
        calls[key] += 1
    total = sum(times.values())
    return [
        Cost(name, source, time / 1e3 / steps, time / total if total else 0.0, calls[name, source] // steps)
        for (name, source), time in times.most_common(count)
    ]


def short_source(op_name: str) -> str:
    """``jit(f)/transpose(jvp(while))/conv`` → ``while/conv (backward)``: the last three steps of the path."""
    backward = "transpose(" in op_name
    plain = re.sub(r"(?:jit|jvp|vmap|transpose|checkpoint|rematted_computation)\([^()/]*", "", op_name)
    parts = [part for part in re.split(r"[/()]+", plain) if part and part not in ("body", "closed_call")]
    return "/".join(parts[-3:]) + " (backward)" * (backward and bool(parts))


def matrix_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products and convolutions of a jaxpr, loops unrolled.

    A ``while`` whose length is not known counts once, of a ``cond`` the costliest branch; padding is counted.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * size * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            window = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
            total += 2 * size * window // math.prod(equation.params["lhs_dilation"])
        inner = [matrix_flops(part) for part in _sub_jaxprs(equation.params)]
        repeats = equation.params.get("length", 1) if name == "scan" else 1
        total += repeats * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def _sub_jaxprs(params: Mapping[str, Any]) -> Iterable[Any]:
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                yield part


def product_ceiling(dtype: str, side: int, *, repeats: int = 5) -> float:
    """FLOP/s of one large square matrix product on the default device, the best of a few runs."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
