"""Errors of a device's memory are one line, with what to do."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mambamim_jax import command, device_memory
from mambamim_jax.settings import PretrainConfig
from mambamim_jax.settings_finetune import ValidationConfig
from mambamim_jax.train import processes, signals
from mambamim_jax.train.validation import HeldOut

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
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 1.5GiB (1610612736B) on device ordinal 0",
            "out of memory, 1.5 GiB were wanted",
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 5242880 bytes.",
            "out of memory, 5.0 MiB were wanted",
        ),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 512 bytes.", "out of memory, 0.5 KiB were wanted"),
        ("RESOURCE_EXHAUSTED: CUDA graph", "out of memory"),
        ("INTERNAL: allocating 3 bytes", None),
    ],
)
def test_what_xla_says(text, line):
    assert device_memory.exhausted(RuntimeError(text)) == line


def trained(workdir, monkeypatch, work):
    """The exit code of the demo's pre-training, were it this work."""
    monkeypatch.setattr(processes, "leave", lambda code: code)
    monkeypatch.setattr(signals, "end_at_once", lambda: None)
    before = jax.config.jax_compilation_cache_dir
    try:
        arguments = [f"--config={ROOT / 'configs' / 'pretrain.py'}:demo", f"--workdir={workdir / 'run'}"]
        return command.run_training(arguments, PretrainConfig, "usage", work)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("several", [False, True], ids=["alone", "several processes"])
def test_a_training_that_has_not_enough_ends_with_one_line(several, tmp_path, monkeypatch, capsys):
    """It isn't started again, as it is where another process is gone."""
    monkeypatch.setattr(processes, "several", lambda: several)
    assert trained(tmp_path, monkeypatch, _too_much) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory, 37252.9 GiB were wanted")
    assert error.count("\n") == 1
    assert "config.optim.accumulate" in error


@pytest.mark.parametrize(
    ("batch", "less"), [(4, "config.validation.batch"), (1, "config.data.crop, in a new run")]
)
def test_a_validation_that_has_not_enough_names_its_own_settings(batch, less, tmp_path, monkeypatch):
    monkeypatch.setattr(HeldOut, "_dice", _too_much)
    store = type("Cases", (list,), {"entries": [SimpleNamespace(id="a")]})([0])
    data = SimpleNamespace(table=SimpleNamespace(foreground=["liver"]), held_out=store)
    held = HeldOut(data, None, (32, 32, 48), ValidationConfig(batch=batch), 1, {}, tmp_path, print)
    with pytest.raises(device_memory.DeviceMemoryError) as caught:
        held.measure(1, {"params": {}}, [])
    line = str(caught.value)
    assert line.startswith(
        f"out of memory, 37252.9 GiB were wanted on a device, for the validation's {batch} windows"
    )
    assert "of 32 × 32 × 48 voxels" in line
    assert line.endswith(f"what needs less: a smaller {less}")


def test_an_error_that_tells_its_line_is_told(tmp_path, monkeypatch, capsys):
    def work(*_):
        raise device_memory.DeviceMemoryError("out of memory, for the validation")

    assert trained(tmp_path, monkeypatch, work) == 2
    assert capsys.readouterr().err == "error: out of memory, for the validation\n"
