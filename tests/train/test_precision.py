"""Mixed precision trains like single precision: losses of the demo with bfloat16 on and off.

Here a few steps at a small size; the claim is for MAMBAMIM_PRECISION_STEPS=50 at MAMBAMIM_PRECISION_CROP=48, run by
hand, since bfloat16 convolutions take minutes on a CPU.
"""

import dataclasses
import io
import os
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mambamim_jax.config import validate
from mambamim_jax.settings import PretrainConfig
from mambamim_jax.train import pretrain
from mambamim_jax.train.logs import read_rows
from mambamim_jax.train.progress import Terminal

CONFIGS = Path(__file__).parents[2] / "configs"
BY_HAND = "MAMBAMIM_PRECISION_STEPS" in os.environ
STEPS = int(os.environ.get("MAMBAMIM_PRECISION_STEPS", "4"))
SIDE = int(os.environ.get("MAMBAMIM_PRECISION_CROP", "48" if BY_HAND else "32"))
AS_MADE = pretrain.mim_task


def demo(folder, dtype):
    config = runpy.run_path(str(CONFIGS / "pretrain.py"))["get_config"]("demo")
    config.steps, config.model.dtype, config.data.crop = STEPS, dtype, (SIDE, SIDE, SIDE)
    config.data.store = str(folder / "store")
    config.log.panel_every = config.checkpoint.every = 10**6
    return validate(config, PretrainConfig)


def losses(folder, dtype, name):
    pretrain.pretrain(demo(folder, dtype), folder / name, Terminal(Console(file=io.StringIO())))
    found = np.array([row["loss"] for row in read_rows(folder / name / "metrics.jsonl")])
    assert len(found) == STEPS
    assert np.isfinite(found).all()
    return found


@pytest.mark.slow
def test_the_same_weights_give_the_same_loss(tmp_path, monkeypatch):
    """At every step of a run in float32."""
    seen = []

    def with_both(config):
        single, half = AS_MADE(config), AS_MADE(demo(tmp_path, "bfloat16"))

        def loss(params, stats, *rest):
            value, new = single.loss(params, stats, *rest)
            other, _ = half.loss(*jax.lax.stop_gradient((params, stats)), *rest)
            jax.debug.callback(lambda *pair: seen.append(np.array(pair)), value, other)
            return value, new

        return dataclasses.replace(single, loss=loss)

    monkeypatch.setattr(pretrain, "mim_task", with_both)
    run = losses(tmp_path, "float32", "both")
    jax.effects_barrier()
    single, half = np.array(seen).T
    np.testing.assert_array_equal(np.sort(single), np.sort(run).astype(np.float32))
    apart = np.abs(half / single - 1)
    print(f"\nat the weights of {STEPS} steps at {SIDE}³: at most {apart.max():.3%} apart")
    assert 0 < apart.max() < 0.01


@pytest.mark.slow
@pytest.mark.skipif(not BY_HAND, reason="minutes on a CPU; set MAMBAMIM_PRECISION_STEPS")
def test_training_with_bfloat16_gives_the_losses_of_float32(tmp_path, monkeypatch):
    """At every step; the third run shows how far float32 gets from itself when started a hair away."""
    single, half = (losses(tmp_path, dtype, dtype) for dtype in ("float32", "bfloat16"))

    def nudged(config):
        task = AS_MADE(config)

        def init(key):
            params, stats = task.init(key)
            return jax.tree.map(lambda x: jnp.nextafter(x, jnp.inf), params), stats

        return dataclasses.replace(task, init=init)

    monkeypatch.setattr(pretrain, "mim_task", nudged)
    again = losses(tmp_path, "float32", "nudged")
    for name, run in (("bfloat16", half), ("float32 from weights one unit in the last place higher", again)):
        apart, single_steps = run.mean() / single.mean() - 1, np.abs(run / single - 1)
        print(
            f"\n{name}: {apart:+.3%} over {STEPS} steps at {SIDE}³; single steps up to {single_steps.max():.3%}"
        )
    assert 0 < abs(half.mean() / single.mean() - 1) < 0.01
    assert np.abs(half / single - 1).max() < 0.01
