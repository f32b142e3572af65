"""One run at a time writes to a workdir: real processes, real locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mambamim_jax.checks import ConfigError
from mambamim_jax.train.workdir import LOCK, claimed
from tests.full_disk import full_disk

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from mambamim_jax.train.workdir import claimed
with claimed(Path(sys.argv[1]), print):
    print("claimed", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def _holder(workdir):
    """A process that has the workdir until a line reaches it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(workdir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def _claim(workdir, say, **options):
    with claimed(workdir, say, **options):
        pass


def test_a_second_run_here_is_refused_at_once_and_a_killed_one_leaves_nothing(tmp_path, capsys):
    workdir, said = tmp_path / "run", []
    with _holder(workdir) as process:
        with pytest.raises(ConfigError, match=f"is in use by process {process.pid} on ") as refused:
            _claim(workdir, said.append)
        assert "\n" not in str(refused.value)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with claimed(workdir, said.append):
            assert json.loads((workdir / LOCK).read_text()) == {
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
    assert said == []


def test_the_run_of_another_host_is_waited_for(tmp_path):
    """It might be gone with its host, and the file server about to find that out."""
    workdir, said = tmp_path / "run", []
    with _holder(workdir) as process:
        (workdir / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": process.pid}))
        with pytest.raises(ConfigError, match=f"is in use by process {process.pid} on elsewhere"):
            _claim(workdir, said.append, patience=0.2)
        assert said == [f"Waiting for process {process.pid} on elsewhere to leave {workdir}, 0 s at most"]
        process.stdin.write("\n")
        process.stdin.flush()
        with claimed(workdir, said.append, patience=60):
            assert process.wait() == 0


def test_without_locks_it_goes_on_and_says_so(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    said = []
    _claim(tmp_path, said.append)
    assert len(said) == 1
    assert "no locks (No locks available)" in said[0]


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"^--workdir: .* can't be written \(.+\); expected a folder"
    ) as refused:
        _claim(tmp_path / place, print)
    assert "\n" not in str(refused.value)


def test_a_workdir_on_a_full_disk_is_one_line(tmp_path):
    with (
        full_disk(),
        pytest.raises(ConfigError, match=r"^--output: .*run can't be written \(File too large\)"),
    ):
        _claim(tmp_path / "run", print, option="--output")
    _claim(tmp_path / "run", print)


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_the_scripts_leave_another_runs_workdir_alone(tmp_path, script):
    workdir = tmp_path / "run"
    arguments = [f"--config={ROOT}/configs/{script}.py:demo", f"--workdir={workdir}"]
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments]
    with claimed(workdir, print):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: --workdir: {workdir} is in use by process {os.getpid()} on ")
        assert done.stderr.count("\n") == 1
        assert [path.name for path in workdir.iterdir()] == [LOCK]
