"""The loop with a stand-in model: metrics, checkpoints, exact resumption, and every way a run can end."""

import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mambamim_jax.settings import LogConfig
from mambamim_jax.train.checkpoint import DamagedError
from mambamim_jax.train.logs import read_rows
from mambamim_jax.train.step import NonFiniteError
from tests.full_disk import full_disk
from tests.train.tiny_run import CONFIG, TASK, Held, TinyLoader, picture_task, run


def losses(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


class Killed(Exception):
    """Stands for a death of the process."""


def die_at(number):
    def disturb(found, batch):
        if found == number:
            raise Killed

    return disturb


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole")
    outcome, printed = run(workdir, task=picture_task())
    return workdir, outcome, printed


def test_everything_is_left_in_the_workdir(whole):
    workdir, outcome, printed = whole
    assert outcome.step == outcome.steps == 9
    assert outcome.last_loss == np.mean(losses(workdir)[-10:])
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [6, 9]
    assert [path.name for path in sorted((workdir / "panels").iterdir())] == [
        f"step_000000{n}.png" for n in (4, 8, 9)
    ]
    assert (workdir / "loss.png").stat().st_size > 1000
    assert next((workdir / "tensorboard").iterdir()).stat().st_size > 1000
    row = read_rows(workdir / "metrics.jsonl")[0]
    assert set(row) == {
        "step", "loss", "grad_norm", "lr", "weight_decay", "seconds", "samples_per_second", "data_wait"
    }  # fmt: skip
    assert "step 4/9  loss " in printed
    for part in ("checkpoints", "panels", "loss.png", "metrics.jsonl", "tensorboard --logdir"):
        assert part in printed
    assert not list(workdir.rglob("*.part"))


@pytest.mark.parametrize("at", [2, 5, 9])
def test_resumed_losses_are_the_undisturbed_ones(whole, tmp_path, at):
    with pytest.raises(Killed):
        run(tmp_path, loader=TinyLoader(die_at(at)))
    assert len(losses(tmp_path)) < 9
    outcome, printed = run(tmp_path)
    assert outcome.step == 9
    assert ("continuing at step" in printed) == (at > 3)
    assert losses(tmp_path) == losses(whole[0])


def test_a_finished_run_is_left_as_it_is(whole, tmp_path):
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    outcome, printed = run(tmp_path)
    assert outcome.step == 9
    assert "done: step 9 of 9" in printed
    assert f"nothing is left to train: {tmp_path}/checkpoints/9 is there, and step 9 is the last" in printed
    assert "schedule" not in printed
    outcome, printed = run(tmp_path, replace(CONFIG, steps=4))
    assert outcome.step == 9
    assert "checkpoints/9 is there, and step 4 is the last" in printed
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_line_cut_short_by_a_kill_is_dropped(whole, tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, loader=TinyLoader(die_at(6)))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('5\n[1]\n{"a": 1}\n{"step": true}\n{"step": 5, "lo')
    run(tmp_path)
    assert losses(tmp_path) == losses(whole[0])


def spoil(number, batch):
    if number >= 5:
        batch["image"][0, 0] = np.inf


def test_a_non_finite_loss_stops_and_leaves_the_last_good_checkpoint(whole, tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path, loader=TinyLoader(spoil))
    message = str(caught.value)
    assert "step 5: loss nan" in message
    assert "non-finite inputs: batch/image (1)" in message
    assert "layers/0/kernel" in message
    assert "last good checkpoint: step 3" in message
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3"]
    run(tmp_path)
    assert losses(tmp_path) == losses(whole[0])


def damage(folder, how):
    """Changes the largest file of a checkpoint."""
    victim = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0x40
    victim.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut", "flipped bit"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(whole, tmp_path, how):
    with pytest.raises(Killed):
        run(tmp_path, loader=TinyLoader(die_at(8)))
    for folder in (tmp_path / "checkpoints" / "6").rglob("d"):
        damage(folder, how)
    _, printed = run(tmp_path)
    assert "WARNING" in printed
    assert "checkpoints/6 is damaged" in printed
    assert "continuing at step 3" in printed
    assert losses(tmp_path) == losses(whole[0])


def test_no_whole_checkpoint_is_an_error(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, loader=TinyLoader(die_at(5)))
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(DamagedError, match="none of the checkpoints"):
        run(tmp_path)


def test_panels_can_be_left_out(tmp_path):
    config, workdir = replace(CONFIG, steps=2, log=LogConfig(every=1, panel_every=0)), tmp_path / "a run"
    _, printed = run(workdir, config, task=picture_task())
    assert not (workdir / "panels").exists()
    assert "  panels  " not in printed
    assert f"tensorboard --logdir '{workdir}/tensorboard'\n" in printed


def test_sigterm_saves_and_ends(whole, tmp_path):
    def kill(number, batch):
        if number == 5:  # read while step 4 is computed
            os.kill(os.getpid(), signal.SIGTERM)

    outcome, printed = run(tmp_path, loader=TinyLoader(kill))
    assert outcome.signal == signal.SIGTERM
    assert 4 <= outcome.step < 9
    assert "stopped by signal 15" in printed
    assert str(outcome.step) in [path.name for path in (tmp_path / "checkpoints").iterdir()]
    run(tmp_path)
    assert losses(tmp_path) == losses(whole[0])


def validated_task(held=None):
    return replace(TASK, ema=0.9, validation=held or Held())


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("validated")
    held = Held()
    run(workdir, task=validated_task(held))
    return workdir, held


def test_validation_at_its_interval_and_at_the_end(validated):
    workdir, held = validated
    rows = read_rows(workdir / "validation.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 9]
    assert [row["earlier"] for row in rows] == [[], [4], [4, 8]]
    assert held.finished == [9]
    assert held.begun == 1


@pytest.mark.parametrize("at", [5, 8, 9])
def test_validation_and_average_resume_bit_for_bit(validated, tmp_path, at):
    with pytest.raises(Killed):
        run(tmp_path, loader=TinyLoader(die_at(at)), task=validated_task())
    resumed = Held()
    run(tmp_path, task=validated_task(resumed))
    assert resumed.begun == 0
    expected = (validated[0] / "validation.jsonl").read_bytes()
    assert (tmp_path / "validation.jsonl").read_bytes() == expected
    run(tmp_path, task=validated_task())
    assert (tmp_path / "validation.jsonl").read_bytes() == expected


def test_a_signal_saves_before_it_validates(validated, tmp_path):
    def kill(number, batch):
        if number == 5:  # read while step 4 is computed
            os.kill(os.getpid(), signal.SIGTERM)

    outcome, _ = run(tmp_path, loader=TinyLoader(kill), task=validated_task())
    assert outcome.step == 4
    assert read_rows(tmp_path / "validation.jsonl") == []
    run(tmp_path, task=validated_task())
    assert (tmp_path / "validation.jsonl").read_bytes() == (validated[0] / "validation.jsonl").read_bytes()


class Stopping(Held):
    """A validation in which a signal comes, the first ``times`` that it is begun."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def measure(self, step, state, earlier, check):
        if self.times:
            self.times -= 1
            os.kill(os.getpid(), signal.SIGTERM)
        check()
        return super().measure(step, state, earlier, check)


@pytest.mark.parametrize("every", [3, 4])
def test_a_signal_within_a_validation_saves_and_leaves_it_owing(validated, tmp_path, every):
    """Whether or not a checkpoint is due at that step; when the run goes on, too."""
    config = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, every=every))
    held = Stopping(times=2)
    for _ in range(2):
        outcome, printed = run(tmp_path, config, task=validated_task(held))
        assert (outcome.signal, outcome.step, held.seen) == (signal.SIGTERM, 4, [])
        assert "stopped by signal 15: step 4 of 9" in printed
        assert "4" in [path.name for path in (tmp_path / "checkpoints").iterdir()]
    outcome, _ = run(tmp_path, config, task=validated_task(held))
    assert (outcome.signal, held.seen) == (0, [[], [4], [4, 8]])
    assert losses(tmp_path) == losses(validated[0])
    assert (tmp_path / "validation.jsonl").read_bytes() == (validated[0] / "validation.jsonl").read_bytes()


def test_a_signal_within_the_last_validation_leaves_the_end_owing(validated, tmp_path):
    held = Stopping(times=0)
    config = replace(CONFIG, steps=8)
    run(tmp_path, replace(CONFIG, steps=7), task=validated_task(held))
    held.times, held.finished = 2, []
    for _ in range(2):
        outcome, printed = run(tmp_path, config, task=validated_task(held))
        assert (outcome.signal, outcome.step, held.finished) == (signal.SIGTERM, 8, [])
        assert "stopped by signal 15: step 8 of 8" in printed
    outcome, printed = run(tmp_path, config, task=validated_task(held))
    assert (outcome.signal, held.finished) == (0, [8])
    assert "done: step 8 of 8" in printed
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == [4, 7, 8]


def test_a_checkpoint_does_not_wait_for_a_validation(tmp_path):
    class Dying(Held):
        def measure(self, step, state, earlier, check):
            raise Killed

    config = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, every=4))
    with pytest.raises(Killed):
        run(tmp_path, config, task=validated_task(Dying()))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


@pytest.fixture
def nothing_cached():
    """JAX would leave half a program in its cache, for other tests to read."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


@pytest.mark.usefixtures("nothing_cached")
def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch):
    """Nor does it lose count: what was measured is known even where it could not be written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with full_disk(100):
        outcome, printed = run(tmp_path, task=replace(picture_task(), ema=0.9, validation=(held := Held())))
    assert outcome.step == 9
    assert "done: step 9 of 9" in printed
    assert held.seen == [[], [4], [4, 8]]
    assert held.finished == [9]
    assert printed.count(" cannot be written (File too large); the run goes on") == 1
    assert "a checkpoint could not be saved, there is none before it" in printed
    assert "metrics.jsonl: the last 9 rows are missing" in printed
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert not list(tmp_path.rglob("*.part"))


def test_the_configuration_is_in_the_checkpoint(whole):
    meta = json.loads((whole[0] / "checkpoints" / "9" / "meta" / "metadata").read_text())
    assert meta["config"]["optim.clip_norm"] == 5.0
    assert meta["data"] == {"index": 9, "name": "set"}
