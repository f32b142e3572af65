"""The benchmarks over devices and saves, with a tiny network; figures are never asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = {
    "data.crop": "(32,32,32)",
    "model.encoder": "vision_mamba",
    "model.vision_mamba.channels": "(4,4,4,4,12)",
    "model.vision_mamba.mamba_depth": 4,
    "model.vision_mamba.feature_depths": "(1,2,3,4)",
    "model.vision_mamba.state": 2,
    "model.decoder_width": 32,
}


def bench(*arguments):
    overrides = [f"--config.{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-W", "error", str(ROOT / "launch" / "bench.py"), *arguments, *overrides]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return done.stdout, [dict(zip(header, row)) for row in rows]


@pytest.mark.slow
def test_the_step_on_paper():
    """Per device the arithmetic stays, the state is divided by fsdp, and gradients travel once."""
    _, rows = bench("scaling", "--simulate=8,64", "--mesh=-1,1,1", "--mesh=-1,8,1", "--batch=1")
    few, many, _, mixed = rows
    assert [row["data × fsdp × model"] for row in rows] == [
        "8 × 1 × 1",
        "64 × 1 × 1",
        "1 × 8 × 1",
        "8 × 8 × 1",
    ]
    flops = [float(row["TFLOP"]) for row in rows]
    assert max(flops) < 1.05 * min(flops)
    assert float(mixed["arguments MiB"]) < 0.3 * float(many["arguments MiB"])
    assert float(mixed["all-gather MiB"]) > float(many["all-gather MiB"])
    assert float(few["all-reduce MiB"]) * 8 / 7 == pytest.approx(
        float(many["all-reduce MiB"]) * 64 / 63, abs=0.2
    )


@pytest.mark.slow
def test_the_step_on_fake_devices_and_the_cost_of_saving():
    printed, rows = bench("scaling", "--fake=2", "--batch=1", "--rounds=1")
    assert "; 0 compilations after the first steps" in printed
    assert [(row["devices"], row["crops"]) for row in rows] == [("1", "1"), ("2", "2")]
    assert rows[0]["efficiency"] == "100.0%"
    _, rows = bench("saving", "--interval=2", "--rounds=1")
    assert float(rows[1]["stood still s"]) > 0
    assert json.loads(rows[0]["steps/s"]) > 0
