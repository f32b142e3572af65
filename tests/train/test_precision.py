"""Mixed precision trains like single precision: the demo's losses with bfloat16 on and off.

Run by hand, since bfloat16 convolutions take minutes on a CPU: MAMBAMIM_PRECISION_STEPS sets for how many steps (the
claim is for 50), MAMBAMIM_PRECISION_CROP the crop's side (48 in the demo).
"""

import io
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mambamim_jax.config import validate
from mambamim_jax.settings import PretrainConfig
from mambamim_jax.train.logs import read_rows
from mambamim_jax.train.pretrain import pretrain
from mambamim_jax.train.progress import Terminal

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = int(os.environ.get("MAMBAMIM_PRECISION_STEPS", "0"))
SIDE = int(os.environ.get("MAMBAMIM_PRECISION_CROP", "48"))


def losses(folder, dtype):
    config = runpy.run_path(str(CONFIGS / "pretrain.py"))["get_config"]("demo")
    config.steps, config.model.dtype, config.data.crop = STEPS, dtype, (SIDE, SIDE, SIDE)
    config.data.store = str(folder / "store")
    config.log.panel_every = config.checkpoint.every = 10**6
    terminal = Terminal(Console(file=io.StringIO()))
    pretrain(validate(config, PretrainConfig), folder / dtype, terminal)
    return np.array([row["loss"] for row in read_rows(folder / dtype / "metrics.jsonl")])


@pytest.mark.slow
@pytest.mark.skipif(not STEPS, reason="minutes on a CPU; set MAMBAMIM_PRECISION_STEPS")
def test_bfloat16_gives_the_losses_of_float32(tmp_path):
    single, half = losses(tmp_path, "float32"), losses(tmp_path, "bfloat16")
    assert len(single) == len(half) == STEPS
    apart = np.abs(half / single - 1)
    print(f"largest difference of the loss in {STEPS} steps at {SIDE}³: {apart.max():.3%}")
    assert 0 < apart.max() < 0.01
