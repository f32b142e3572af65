"""The scan on the day when jax has lost a backend of Pallas: in a process of its own, where it can't be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LACKING = r"selective_scan: implementation '\w+': jax \S+ has no such backend of Pallas \(.+\); use 'auto'"
PROGRAM = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[f"jax.experimental.pallas.{name}"] = None
import jax.numpy as jnp
import mambamim_jax.bench.scan
import mambamim_jax.train.pretrain
from mambamim_jax.ops.selective_scan import api, selective_scan
x, s = jnp.ones((1, 3, 8)), jnp.ones((1, 3, 4))
arrays = x, x, -jnp.ones((8, 4)), s, s
print(*selective_scan(*arrays).shape)
for capability in ("8.0", "9.0"):
    api._device = lambda: ("gpu", capability)
    print(api._choose(api.ScanInputs(*arrays)))
api._device = lambda: ("cpu", "")
for name in ("pallas_triton", "pallas_mosaic"):
    try:
        print(*selective_scan(*arrays, implementation=name).shape)
    except ValueError as error:
        print(str(error).splitlines()[0])
"""


@pytest.mark.parametrize(
    ("missing", "older", "newer"),
    [
        ("triton", "associative", "pallas_mosaic"),
        ("mosaic_gpu", "pallas_triton", "pallas_triton"),
        ("triton,mosaic_gpu", "associative", "associative"),
    ],
)
def test_the_scan_does_without_a_backend(missing, older, newer):
    command = [sys.executable, "-c", PROGRAM, missing]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape, *chosen, triton, mosaic = done.stdout.splitlines()
    assert (shape, chosen) == ("1 3 8", [older, newer])
    assert bool(re.fullmatch(LACKING, triton)) == ("triton" in missing)
    assert bool(re.fullmatch(LACKING, mosaic)) == ("mosaic" in missing)
    assert ("associative scan runs instead" in done.stderr) == (older == "associative")
    assert ("pallas_mosaic runs instead" in done.stderr) == (newer == "pallas_mosaic")
