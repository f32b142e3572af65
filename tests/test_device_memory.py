"""Errors of a device's memory are one line, with what to do."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mambamim_jax import command, device_memory
from mambamim_jax.settings import PretrainConfig
from mambamim_jax.train import processes, signals

ROOT = Path(__file__).parents[1]


def _too_much(*_):
    return jnp.zeros(10**13).block_until_ready()


def test_an_allocation_that_fails_is_told_with_its_size():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        _too_much()
    assert device_memory.exhausted(caught.value) == "out of memory, 37252.9 GiB were wanted"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.50GiB.",
            "out of memory, 3.5 GiB were wanted",
        ),
        ("RESOURCE_EXHAUSTED: CUDA graph", "out of memory"),
        ("INTERNAL: allocating 3 bytes", None),
    ],
)
def test_what_xla_says(text, line):
    assert device_memory.exhausted(RuntimeError(text)) == line


@pytest.mark.parametrize("several", [False, True], ids=["alone", "several processes"])
def test_a_training_that_has_not_enough_ends_with_one_line(several, tmp_path, monkeypatch, capsys):
    """It isn't started again, as it is where another process is gone."""
    monkeypatch.setattr(processes, "several", lambda: several)
    monkeypatch.setattr(processes, "leave", lambda code: code)
    monkeypatch.setattr(signals, "end_at_once", lambda: None)
    before = jax.config.jax_compilation_cache_dir
    try:
        arguments = [f"--config={ROOT / 'configs' / 'pretrain.py'}:demo", f"--workdir={tmp_path / 'run'}"]
        assert command.run_training(arguments, PretrainConfig, "usage", _too_much) == 2
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory, 37252.9 GiB were wanted")
    assert error.count("\n") == 1
    assert "config.optim.accumulate" in error
