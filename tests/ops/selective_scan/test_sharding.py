"""The selective scan sharded over the batch and over the channels, on fake devices in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compiled

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mambamim_jax.ops.selective_scan import mosaic, selective_scan, triton, tuning
from tests.ops.selective_scan.cases import assert_close, random_inputs

name, axes = sys.argv[1], (int(sys.argv[2]), int(sys.argv[3]))
mesh = jax.make_mesh(axes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
specs = tuple(P(*s) for s in [("data", None, "model")] * 2 + [("model", None)] + [("data", None, None)] * 2
              + [("model",), ("data", None, "model"), ("model",)])
arrays = random_inputs((4, 7, 64, 3))[:8]
triton._default_launch = lambda: tuning.Launch(2, 4, 4, 2, 1, 1, 1, 48, 0, 1, 10**6, 1, 2, 4, 0)

def scan(*arrays):
    return selective_scan(*arrays, implementation=name)

sharded = scan
if name.startswith("pallas"):  # a kernel has to be told its part
    sharded = jax.shard_map(scan, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)

def gradients(scan):
    return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(scan(*a))), argnums=tuple(range(8))))

def plain(*arrays):
    return selective_scan(*arrays, implementation="reference")

with triton.interpreted(), mosaic.interpreted():
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]
    compiled = gradients(sharded).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text(), "gathers"
    assert "all-to-all" not in compiled.as_text(), "moves"
    assert_close(compiled(*placed), gradients(plain)(*arrays), 1e-4, "sharded")
"""


@pytest.mark.parametrize("axes", [(2, 1), (2, 2)], ids=["2 devices", "4 devices"])
@pytest.mark.parametrize("name", ["sequential", "pallas_triton", "pallas_mosaic"])
def test_shards_without_gathering(name, axes):
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "XLA_FLAGS": compiled.devices(4),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-c", SCRIPT, name, *map(str, axes)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
