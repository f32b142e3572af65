"""Random inputs of the selective scan, its float64 answers, and how answers are compared."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mambamim_jax.ops.selective_scan import selective_scan
from mambamim_jax.ops.selective_scan.contract import ScanInputs

Shape = tuple[int, int, int, int]
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def random_inputs(shape: Shape, dtype="float32", seed: int = 0) -> ScanInputs:
    """Inputs of ordinary size with every optional argument given, as NumPy arrays."""
    b, l, e, n = shape
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    inputs = ScanInputs(
        u=normal((b, l, e)),
        delta=normal((b, l, e)),
        A=-np.exp(normal((e, n)) * 0.5),
        B=normal((b, l, n)),
        C=normal((b, l, n)),
        D=normal(e),
        z=normal((b, l, e)),
        delta_bias=normal(e) * 0.5 - 1,
        initial_state=normal((b, e, n)),
    )
    return ScanInputs(*(x.astype(dtype) for x in inputs))


def run(inputs: ScanInputs, implementation: str, reverse: bool = False):
    """(y, last state) of one implementation."""
    *arrays, state = inputs
    return selective_scan(
        *arrays,
        initial_state=state,
        return_last_state=True,
        reverse=reverse,
        implementation=implementation,
    )


def cotangents(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Fixed random cotangents of y and of the last state, float32."""
    b, l, e, n = shape
    rng = np.random.default_rng(1)
    return (
        rng.standard_normal((b, l, e)).astype(np.float32),
        rng.standard_normal((b, e, n)).astype(np.float32),
    )


def values_and_gradients(inputs: ScanInputs, weights, implementation: str, reverse: bool = False):
    """((y, last), gradients) for the given cotangents, jitted."""

    @jax.jit
    def both(inputs, weights):
        out, pull = jax.vjp(lambda inputs: run(inputs, implementation, reverse), inputs)
        return out, pull(jax.tree.map(lambda w, o: w.astype(o.dtype), weights, out))[0]

    return jax.tree.map(np.asarray, both(inputs, weights))


@functools.lru_cache
def expected(shape: Shape, reverse: bool = False, absent: tuple[str, ...] = (), dtype="float32"):
    """`values_and_gradients` of the reference in float64, for `random_inputs` as rounded to `dtype`."""
    inputs = random_inputs(shape, jnp.dtype(dtype))._replace(**dict.fromkeys(absent))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), (inputs, cotangents(shape)))
        return values_and_gradients(*wide, "reference", reverse)


def assert_close(found, wanted, tolerance: float, what: str) -> None:
    """Checks max |found - wanted| ≤ tolerance · max |wanted| for each array of two equal trees."""
    paths, structure = jax.tree.flatten_with_path(wanted)
    assert jax.tree.structure(found) == structure
    for (path, w), f in zip(paths, jax.tree.leaves(found)):
        f, w = np.asarray(f, np.float64), np.asarray(w, np.float64)
        assert f.shape == w.shape
        error = np.max(np.abs(f - w)) / max(float(np.max(np.abs(w))), 1e-30)
        assert error <= tolerance, f"{what}{jax.tree_util.keystr(path)}: {error:.2e} > {tolerance:.0e}"
