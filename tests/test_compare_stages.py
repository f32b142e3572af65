"""The stages of a comparison: where they run, and that a failure or a signal ends the others."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from mambamim_jax.bench import starts
from mambamim_jax.bench.stages import StageError, Stages

LAUNCHED = """
import os, signal, sys, time
print("started", flush=True)
if {stays}:
    signal.signal(signal.{sent}, lambda *_: (print("saved", flush=True), os._exit(75)))
    open({ready!r}, "w").close()
    time.sleep(60)
sys.exit("no such thing")
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Stages whose commands are small scripts: "stay" until a signal, "fail" at once."""
    (tmp_path / "launch").mkdir()
    for name, sent in (("stay", "SIGUSR1"), ("stay_term", "SIGTERM"), ("fail", "SIGTERM")):
        text = LAUNCHED.format(stays=name != "fail", sent=sent, ready=str(tmp_path / "ready"))
        (tmp_path / "launch" / f"{name}.py").write_text(text)
    monkeypatch.setattr("mambamim_jax.bench.stages.ROOT", tmp_path)
    return Stages(tmp_path / "run", jobs=2)


def test_runs_are_spread_over_the_gpus_that_there_are(tmp_path, monkeypatch):
    found = {}
    for visible in ("", "4,5"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        slots = Stages(tmp_path, jobs=3, gpus=2).slots
        found[visible] = [slots.get().environment(tmp_path)["CUDA_VISIBLE_DEVICES"] for _ in range(3)]
    assert found == {"": ["0", "1", "0"], "4,5": ["4", "5", "4"]}


def until_ready(tmp_path):
    end = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_failed_stage_names_its_log_and_the_others_end(stages, tmp_path, monkeypatch):
    def fail(*_):
        until_ready(tmp_path)
        stages.run("all", "fail", "--a=b c")

    monkeypatch.setattr(starts, "pretrain", fail)

    def stay(stages, run, *_):
        if run.start == "scratch":
            stages.run(run.name, "stay_term")

    monkeypatch.setattr(starts, "finetune_and_score", stay)
    options = SimpleNamespace(workdir=stages.workdir, seeds=1, shares=[1.0])
    with pytest.raises(
        StageError, match=r"fail of all ended with 1: no such thing \(see .*logs/all_fail.txt\)$"
    ):
        starts.run_all(stages, options, [])
    logs = {path.name: path.read_text().split() for path in (stages.workdir / "logs").iterdir()}
    assert logs == {
        "all_fail.txt": ["started", "no", "such", "thing"],
        "scratch_100_0_stay_term.txt": ["started", "saved"],
    }
    assert "python launch/fail.py '--a=b c'" in (stages.workdir / "commands.txt").read_text()


def test_a_signal_ends_the_stages_which_save(stages, tmp_path, monkeypatch, capsys):
    """Under a scheduler's SIGTERM, which may have reached the stages too, they get the other signal."""
    monkeypatch.setattr(starts, "prepare", lambda options: None)
    monkeypatch.setattr(starts, "Stages", lambda *_: stages)
    monkeypatch.setattr(starts, "pretrain", lambda stages, options: stages.run("all", "stay"))

    def terminate(stages, run, *_):
        if run == starts.Run("scratch", 1.0, 0):
            until_ready(tmp_path)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(starts, "finetune_and_score", terminate)
    assert starts.main([f"--source={tmp_path}", f"--workdir={tmp_path / 'run'}"]) == 75
    assert capsys.readouterr().err == "Ended by SIGTERM; the same command goes on\n"
    assert (stages.workdir / "logs" / "all_stay.txt").read_text() == "started\nsaved\n"
    with pytest.raises(StageError, match="was not started"):
        stages.run("all", "stay")
