"""``launch/bench.py mixer``: one Mamba mixer, forward and forward + backward, in float32 and bfloat16.

python launch/bench.py mixer [--grid=4x54,64x54,...] [--channels=384] [--dtypes=float32,bfloat16] [--rounds=7]

A mixer is the scan and what surrounds it: projections, the causal convolution with SiLU, the last projection.
The convolution is timed alone too: what putting it into the scan's kernel could save at most; and as JAX derives it,
instead of with its own backward pass. On a GPU where PyTorch, mamba_ssm and the extensions ``selective_scan_cuda`` and
``causal_conv1d_cuda`` can be imported, mamba_ssm's mixer (``mamba_inner_fn``; bfloat16 by autocast) is a side, with our
weights, after its result has been compared with ours. All sides are timed alternately, many runs in one launch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambamim_jax.bench.mamba_ssm_kernel import MambaInner
from mambamim_jax.bench.repeat import Compile, Run, alternate, copies_for, repeated
from mambamim_jax.bench.scan import GRID, NEEDS, iterations_for, sizes
from mambamim_jax.bench.tables import print_table
from mambamim_jax.checks import LineParser, whole
from mambamim_jax.model.mamba import Mamba
from mambamim_jax.ops.causal_conv1d import before_silu, causal_conv1d

MODES = tuple(NEEDS)
AGREE = 0.03
"""Largest difference of two mixers' results, relative to the largest value, in TensorFloat-32 or bfloat16."""


def make_inputs(b: int, l: int, channels: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """A mixer's graph and weights, tokens (b, l, c) and a gradient of the result, of ordinary size."""
    mixer = nnx.split(Mamba(channels, rngs=nnx.Rngs(0)))
    x, g = np.random.default_rng(0).standard_normal((2, b, l, channels), np.float32)
    return mixer, x, g


def mixer_side(mixer: Any, x: Any, g: Any, mode: str, dtype: str, iterations: int) -> Compile:
    """Many runs of our mixer."""
    _, weights = mixer
    inner = weights["D"].get_value().size
    graph = nnx.split(Mamba(x.shape[2], dtype=dtype, rngs=nnx.Rngs(0)))[0]

    def apply(weights: Any, x: Any) -> Any:
        return nnx.merge(graph, weights)(x)

    def once(weights: Any, x: Any, g: Any) -> Any:
        if mode == "forward":
            return apply(weights, x)
        out, pull = jax.vjp(apply, weights, x)
        return out, pull(g.astype(out.dtype))

    copies = copies_for(x.shape[0] * x.shape[1] * inner, iterations)
    return repeated(once, _calls, (weights, _shifted(x, copies), jnp.asarray(g)), iterations // copies)


def convolution_side(
    mixer: Any, x: Any, mode: str, dtype: str, iterations: int, *, derived: bool = False
) -> Compile:
    """Many runs of the mixer's convolution with SiLU alone, over tokens (b, l, 2 c); derived by JAX if asked for."""
    _, weights = mixer
    taps = [weights[name].get_value() for name in ("conv_kernel", "conv_bias")]
    u = np.concatenate([x, x], axis=-1)

    def once(taps: Any, u: Any, g: Any) -> Any:
        def convolve(taps: Any, u: Any) -> Any:
            if derived:
                return jax.nn.silu(before_silu(u, *taps)).astype(u.dtype)
            return causal_conv1d(u, *taps, silu=True)

        if mode == "forward":
            return convolve(taps, u)
        out, pull = jax.vjp(convolve, taps, u)
        return out, pull(g)

    copies = copies_for(u.size, iterations)
    given = (taps, _shifted(u, copies, dtype), jnp.asarray(u, dtype))
    return repeated(once, _calls, given, iterations // copies)


def _calls(given: Any) -> list[tuple[Any, Any, Any]]:
    weights, xs, g = given
    return [(weights, x, g) for x in xs]


def _shifted(x: Any, copies: int, dtype: str = "float32") -> list[Any]:
    return [jnp.asarray(x + np.float32(k / 1000), dtype) for k in range(copies)]


def theirs(mixer: Any, x: Any, g: Any) -> MambaInner:
    """mamba_ssm's side with our weights.

    Raises: ImportError if something is missing; ValueError if its result is not ours.
    """
    graph, weights = mixer
    named = {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(weights)}
    side = MambaInner({name: value.get_value() for name, value in named.items()}, x, g)
    ours = np.asarray(jax.jit(lambda weights, x: nnx.merge(graph, weights)(x))(weights, x))
    found = side.once("forward", "float32").detach().cpu().numpy()
    difference = float(np.max(np.abs(found - ours)) / np.max(np.abs(ours)))
    if not difference <= AGREE:
        raise ValueError(
            f"mamba_inner_fn: found a result {difference:.2g} from ours, expected {AGREE} at most"
        )
    return side


def measure(
    b: int, l: int, mode: str, options: argparse.Namespace, pool: Executor
) -> Callable[[], list[list[str]]]:
    """Begins to compile one size's sides; gives a function that measures them for the table's rows."""
    mixer, x, g = make_inputs(b, l, options.channels)
    iterations = options.iterations or iterations_for(4 * b * l * options.channels)
    begun: dict[str, Future[tuple[Run, int | None]]] = {}
    for dtype in options.dtypes:
        sides = {
            "mixer": mixer_side(mixer, x, g, mode, dtype, iterations),
            "convolution alone": convolution_side(mixer, x, mode, dtype, iterations),
        }
        if mode != "forward":
            sides["convolution as JAX derives it"] = convolution_side(
                mixer, x, mode, dtype, iterations, derived=True
            )
        begun |= {f"{name}, {dtype}": pool.submit(side) for name, side in sides.items()}

    def rows() -> list[list[str]]:
        sides = {name: future.result()[0] for name, future in begun.items()}
        if jax.default_backend() == "gpu":
            try:
                other = theirs(mixer, x, g)
                for dtype in options.dtypes:
                    sides[f"mamba_inner_fn, {dtype}"] = other.run(mode, dtype, iterations)
            except ImportError as error:
                print(f"mamba_inner_fn is not measured: {error}")
        times = {name: seconds for name, (seconds, _) in alternate(sides, options.rounds).items()}
        first = next(iter(times.values()))
        return [
            [f"{b}, {l}", mode, name, f"{seconds * 1e6:.1f}", f"{seconds / first:.2f}"]
            for name, seconds in times.items()
        ]

    return rows


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ("float32", "bfloat16"):
            raise argparse.ArgumentTypeError(f"found {name!r}, expected some of float32, bfloat16")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0."""
    parser = LineParser(prog="bench.py mixer", description=(__doc__ or "").splitlines()[0])
    on_gpu = jax.default_backend() == "gpu"
    grid = GRID if on_gpu else "2x54,2x216"
    parser.add_argument("--grid", type=sizes, default=grid, help="BxL,... (%(default)s)")
    parser.add_argument(
        "--channels", type=whole(1), default=384, help="of the tokens; the scan has twice as many"
    )
    parser.add_argument(
        "--dtypes", type=_dtypes, default="float32,bfloat16", help="the first is what ratios refer to"
    )
    parser.add_argument("--rounds", type=whole(1), default=7)
    parser.add_argument("--iterations", type=whole(0), default=0 if on_gpu else 1)
    options = parser.parse_args(argv)
    with ThreadPoolExecutor() as pool:
        begun = [measure(b, l, mode, options, pool) for b, l in options.grid for mode in MODES]
    table = [row for finish in begun for row in finish()]  # all is compiled now, so that nothing disturbs it
    title = f"Mamba mixer, c = {options.channels}, n = 16, {jax.devices()[0].device_kind}"
    header = ["b, l", "pass", "side", "µs", f"time / mixer's in {options.dtypes[0]}"]
    print_table(title, header, table)
    return 0
