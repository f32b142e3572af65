"""``launch/bench.py scan``: every implementation of the selective scan, forward and forward + backward.

python launch/bench.py scan [--grid=4x54,64x54,...] [--implementations=...] [--dtype=float32]
    [--pass=forward] [--launch=abreast_below=0] [--sweep]

On a GPU the share of the floor is printed beside: the largest of the times that moving the fewest bytes,
the arithmetic and the exponentials need on that card. Where PyTorch and mamba_ssm's extension
``selective_scan_cuda`` can be imported, its kernel is measured too. All sides are timed alternately, many
iterations inside one launch, so that neither the dispatch of JAX nor that of PyTorch is in the figures. All is
compiled before anything is timed.
On a CPU the time of all processor threads is printed too, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from mambamim_jax.bench.mamba_ssm_kernel import mamba_ssm
from mambamim_jax.bench.repeat import Compile, Run, alternate, copies_for, repeated
from mambamim_jax.bench.scan_launches import changed, sweep_launches
from mambamim_jax.bench.tables import print_table
from mambamim_jax.checks import LineParser, whole
from mambamim_jax.ops.selective_scan import api, tuning
from mambamim_jax.ops.selective_scan.contract import ScanInputs

GRID = "4x54,64x54,64x216,2x1728,1x110592"
CEILINGS = {
    "H200": (4.3e12, 67e12, 4.2e12),
    "H100": (3.0e12, 67e12, 4.2e12),
    "A100": (1.4e12, 19.5e12, 2.4e12),
}
"""Bytes, floating-point operations and exponentials a second."""
STATES = 16
NEEDS = {"forward": (4, 137, 20), "forward + backward": (11, 560, 58)}
"""Per (b, l, e) with so many states: array elements moved, floating-point operations, exponentials."""
IDLE = 384
"""Programs of the kernel that does nothing: as many as walk four sequences of 768 channels."""


def make_inputs(b: int, l: int, e: int, n: int, dtype: str) -> ScanInputs:
    """Random inputs of ordinary size, without an initial state."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    u, delta, z = (normal(b, l, e).astype(dtype) for _ in range(3))
    B, C = (normal(b, l, n).astype(dtype) for _ in range(2))
    A = -jnp.broadcast_to(jnp.arange(1.0, n + 1), (e, n))
    return ScanInputs(u, delta, A, B, C, normal(e), z, normal(e) - 4)


def ours(
    inputs: ScanInputs, mode: str, iterations: int, name: str, launch: tuning.Launch | None = None
) -> Compile:
    """Many runs of one implementation, with this launch of the kernels or the tuned one."""
    scan: Any = api.selective_scan
    copies = copies_for(inputs.u.size, iterations)

    def once(inputs: ScanInputs) -> Any:
        if launch is not None:
            from mambamim_jax.ops.selective_scan import triton  # its backend may be missing

            saved: Any
            y, _, saved = triton.forward(inputs, False, mode != "forward", launch=launch)
            if mode == "forward":
                return y
            return y, triton.backward(inputs, saved, y, None, False, launch=launch)
        arrays: Any = inputs[:8]
        if mode == "forward":
            return scan(*arrays, implementation=name)
        y, pull = jax.vjp(functools.partial(scan, implementation=name), *arrays)
        return y, pull(y)

    def calls(given: Any) -> list[tuple[ScanInputs]]:
        inputs, biases = given
        return [(inputs._replace(delta_bias=bias),) for bias in biases]

    assert inputs.delta_bias is not None
    biases = [inputs.delta_bias + k / 1000 for k in range(copies)]
    return repeated(once, calls, (inputs, biases), iterations // copies, scratch=True)


def idle(programs: int, copies: int, turns: int) -> Compile:
    """Many runs of a kernel that only stores zeros, from programs of a warp: what launching takes of any of them."""
    from jax.experimental.pallas import triton as pltriton  # may be missing

    def kernel(given: Any, out: Any) -> None:
        del given  # the calls differ in it
        pltriton.store(out.at[pl.program_id(0) * 32 + jnp.arange(32)], jnp.zeros(32))

    once = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((programs * 32,), jnp.float32),
        grid=(programs,),
        compiler_params=pltriton.CompilerParams(num_warps=1),
    )
    given = [jnp.full(1, k, jnp.float32) for k in range(copies)]
    return repeated(once, lambda given: [(x,) for x in given], given, turns)


def iterations_for(elements: int) -> int:
    """Enough runs of so many elements (b, l, e) in one launch that its own cost does not show."""
    return max(4, min(10_000, 3_000_000_000 // elements))


def floor_seconds(b: int, l: int, e: int, n: int, mode: str, dtype: str) -> float | None:
    """The shortest possible time on this card; None if its ceilings or the needs of so many states are not known."""
    kind = jax.devices()[0].device_kind
    ceilings = next((value for key, value in CEILINGS.items() if key in kind), None)
    if ceilings is None or n != STATES:
        return None
    elements, operations, exponentials = NEEDS[mode]
    needs = elements * jnp.dtype(dtype).itemsize, operations, exponentials
    return b * l * e * max(need / rate for need, rate in zip(needs, ceilings))


def measure(
    b: int, l: int, mode: str, options: argparse.Namespace, pool: Executor
) -> Callable[[], list[list[str]]]:
    """Begins to compile one size's sides; gives a function that measures them for the table's rows."""
    e, n = options.width, options.state
    inputs = make_inputs(b, l, e, n, options.dtype)
    iterations = options.iterations or iterations_for(b * l * e)
    begun: dict[str, Future[tuple[Run, int | None]]] = {}

    def failed(name: str, error: Exception) -> None:
        print(f"{name} at {b} x {l}, {mode}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")

    for name in options.implementations:
        slow = name not in ("pallas_triton", "pallas_mosaic")
        try:
            begun[name] = pool.submit(
                ours(inputs, mode, min(max(4, iterations // 10), iterations) if slow else iterations, name)
            )
        except Exception as error:
            failed(name, error)
    for change in options.launch:
        from mambamim_jax.ops.selective_scan import triton  # its backend may be missing

        name = "pallas_triton, " + ", ".join(f"{key} {value}" for key, value in change.items())
        launch = triton._default_launch()._replace(**change)
        begun[name] = pool.submit(ours(inputs, mode, iterations, "pallas_triton", launch))

    def rows() -> list[list[str]]:
        sides: dict[str, Run] = {}
        memory: dict[str, int | None] = {}
        for name, future in begun.items():
            try:
                sides[name], memory[name] = future.result()
                sides[name]()
            except Exception as error:
                sides.pop(name, None)
                failed(name, error)
        if jax.default_backend() == "gpu" and options.dtype == "float32":
            try:
                sides["mamba_ssm CUDA"] = mamba_ssm(inputs, mode, min(iterations, 1000))
            except ImportError as error:
                print(f"mamba_ssm is not measured: {error}")
        return _rows(b, l, mode, sides, memory, options) if sides else []

    return rows


def _rows(
    b: int,
    l: int,
    mode: str,
    sides: dict[str, Run],
    memory: dict[str, int | None],
    options: argparse.Namespace,
) -> list[list[str]]:
    times = alternate(sides, options.rounds)
    floor = floor_seconds(b, l, options.width, options.state, mode, options.dtype)
    first = next(iter(times.values()))
    on_cpu = jax.default_backend() == "cpu"
    return [
        [
            f"{b}, {l}",
            mode,
            name,
            f"{seconds * 1e6:.1f}",
            "–" if floor is None else f"{100 * floor / seconds:.0f}%",
            "–" if (scratch := memory.get(name)) is None else f"{scratch / 2**20:.1f}",
            f"{seconds / first[0]:.2f}",
            f"{processor * 1e6:.1f}" if on_cpu else "–",
            f"{processor / first[1]:.2f}" if on_cpu else "–",
        ]
        for name, (seconds, processor) in times.items()
    ]


def sweep(b: int, l: int, options: argparse.Namespace, pool: Executor) -> list[list[str]]:
    """The rows of the sweep from which `tuning.TUNED` is chosen."""
    from mambamim_jax.ops.selective_scan import triton

    inputs = make_inputs(b, l, options.width, options.state, options.dtype)
    iterations = iterations_for(b * l * options.width)
    base = triton._default_launch()
    rows = []
    for mode in options.modes or NEEDS:
        begun = {
            str(tuple(launch)): pool.submit(ours(inputs, mode, iterations, "pallas_triton", launch))
            for launch in sweep_launches(base, b * options.width, mode)
        }
        sides = {name: future.result()[0] for name, future in begun.items()}
        for name, (seconds, _) in sorted(alternate(sides, 5).items(), key=lambda item: item[1]):
            rows.append([f"{b}, {l}", mode, name, f"{seconds * 1e6:.1f}"])
    return rows


def sizes(text: str) -> list[tuple[int, int]]:
    """The pairs of "4x54,64x216".

    Raises: ArgumentTypeError if the text is no such list.
    """
    try:
        found = [(int(b), int(l)) for b, l in (size.split("x") for size in text.split(","))]
    except ValueError:
        found = []
    if not found or min(min(size) for size in found) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected batch x length, such as 64x216,2x1728")
    return found


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in api.IMPLEMENTATIONS:
            raise argparse.ArgumentTypeError(
                f"found {name!r}, expected some of {', '.join(api.IMPLEMENTATIONS)}"
            )
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; 0."""
    parser = LineParser(prog="bench.py scan", description=(__doc__ or "").splitlines()[0])
    on_gpu = jax.default_backend() == "gpu"
    default = "pallas_triton,associative" if on_gpu else "sequential,associative"
    grid = GRID if on_gpu else "2x54,2x216,2x1728"
    parser.add_argument("--grid", type=sizes, default=grid, help="BxL,... (%(default)s)")
    parser.add_argument(
        "--implementations", type=_names, default=default, help="the first is what ratios refer to"
    )
    parser.add_argument("--width", type=whole(1), default=768)
    parser.add_argument("--state", type=whole(1), default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=whole(1), default=7)
    parser.add_argument("--iterations", type=whole(0), default=0 if on_gpu else 1)
    parser.add_argument("--pass", dest="modes", action="append", choices=list(NEEDS), help="(all)")
    parser.add_argument(
        "--launch",
        type=changed,
        action="append",
        default=[],
        help="also this launch of the Triton kernels, such as abreast_below=0",
    )
    parser.add_argument("--sweep", action="store_true", help="time launch sizes of the GPU kernel instead")
    options = parser.parse_args(argv)
    device = jax.devices()[0].device_kind
    title = f"selective scan, e = {options.width}, n = {options.state}, {options.dtype}, {device}"
    if (options.sweep or options.launch) and not on_gpu:
        flag = "--sweep" if options.sweep else "--launch"
        parser.error(
            f"{flag}: found no GPU (the default device is {device}), expected one: it times GPU kernels"
        )
    if options.sweep:
        with ThreadPoolExecutor() as pool:
            rows = [row for b, l in options.grid for row in sweep(b, l, options, pool)]
        fields = ", ".join(tuning.Launch._fields)
        print_table(f"{title}: launch sizes ({fields})", ["b, l", "pass", "launch", "µs"], rows)
        return 0
    names = options.implementations
    with ThreadPoolExecutor() as pool:
        begun = [
            measure(b, l, mode, options, pool) for b, l in options.grid for mode in options.modes or NEEDS
        ]
        least = pool.submit(idle(IDLE, 16, 500)) if on_gpu and "pallas_triton" in names else None
    rows = [row for finish in begun for row in finish()]
    if least is not None:
        launching = alternate({"": least.result()[0]}, options.rounds)[""][0]
        print(
            f"a kernel of {IDLE} programs that does nothing takes {launching * 1e6:.2f} µs in the same loop"
        )
    if not rows:
        parser.error(f"--implementations: none of {', '.join(names)} runs on this device ({device})")
    header = ["b, l", "pass", "implementation", "µs", "of floor", "scratch MiB", f"time / {names[0]}'s"]
    header += ["processor µs", "ratio"]
    print_table(title, header, rows)
    return 0
