"""The kernels lower for named CUDA targets, without a GPU, to exactly the custom calls they should."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import pytest

from mambamim_jax.ops.selective_scan import mosaic, selective_scan, triton, tuning

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def _target(kind):
    """The named GPU as the device that jax ≥ 0.11 lowers for; older ones need none."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    return use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, None, "gpu")))


def _custom_calls(function, shape, dtype, name="__gpu$xla.gpu.triton"):
    b, l, e, n = shape
    shapes = [(b, l, e)] * 2 + [(e, n)] + [(b, l, n)] * 2 + [(e,), (b, l, e), (e,)]
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32 if len(s) < 3 else dtype) for s in shapes]
    lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count(f"custom_call @{name}(")


@pytest.mark.parametrize(("kind", "capability"), [("NVIDIA A100-SXM4-80GB", (8, 0)), ("NVIDIA H200", (9, 0))])
@pytest.mark.parametrize(
    ("length", "forward", "gradient"),
    [(10, 1, 3), (50, 1, 3), (110_592, 3, 7)],
    ids=["whole", "side by side", "segmented"],
)
def test_lowers_to_one_call_a_kernel(kind, capability, length, forward, gradient, monkeypatch):
    launch = tuning.launch_for(capability)._replace(inference_chunk=2, chunk=4)
    monkeypatch.setattr(triton, "_default_launch", lambda: launch)

    def scan(*arrays):
        return selective_scan(*arrays, implementation="pallas_triton")

    def loss(*arrays):
        return jnp.sum(scan(*arrays).astype(jnp.float32))

    shape = (2, length, 64, 4)
    with _target(kind):
        assert _custom_calls(scan, shape, jnp.bfloat16) == forward
        assert _custom_calls(jax.grad(loss, argnums=tuple(range(8))), shape, jnp.float32) == gradient


def test_mosaic_lowers_to_one_call_a_kernel(monkeypatch):
    monkeypatch.setattr(mosaic, "CHUNK", 1)

    def loss(*arrays):
        return jnp.sum(selective_scan(*arrays, implementation="pallas_mosaic").astype(jnp.float32))

    with _target("NVIDIA H200"):
        arguments = (2, 3, 40, 1), jnp.bfloat16, "mosaic_gpu_v2"
        assert _custom_calls(loss, *arguments) == 1
        assert _custom_calls(jax.grad(loss, argnums=tuple(range(8))), *arguments) == 2
