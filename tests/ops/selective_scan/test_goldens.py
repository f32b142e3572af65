"""The selective scan against numbers of the published code, in float64."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from mambamim_jax.ops.selective_scan.contract import ScanInputs
from tests.ops.selective_scan.cases import assert_close, run

GOLDENS = Path(__file__).parents[2] / "goldens" / "selective_scan.npz"


@pytest.mark.parametrize("name", ["reference", "associative", "sequential"])
@pytest.mark.parametrize("case", ["short", "odd", "long"])
def test_equals_published_numbers(case, name):
    with np.load(GOLDENS) as file:
        golden = {key.removeprefix(f"{case}."): file[key] for key in file if key.startswith(f"{case}.")}
    fields = [key for key in ScanInputs._fields if key != "initial_state"]
    inputs = ScanInputs(**{key: golden[key] for key in fields})
    with jax.enable_x64(True):
        (y, last), pull = jax.vjp(jax.jit(lambda inputs: run(inputs, name)), inputs)
        (gradients,) = pull((golden["cotangent"], np.zeros_like(last)))
    wanted: ScanInputs = ScanInputs(**{key: golden[f"grad_{key}"] for key in fields})
    assert_close((y, last), (golden["y"], golden["last_state"]), 1e-10, "value")
    assert_close(gradients, wanted, 1e-10, "gradient")
