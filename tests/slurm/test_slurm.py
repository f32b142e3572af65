"""Under a real SLURM of this one machine: two tasks find each other, train, are preempted, requeued, and resume.

Skipped where SLURM's programs are missing or may not start (root is needed; Debian: slurm-wlm and munge).
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import cluster

STEPS = 40
SETUP = Path(__file__).parent / "setup.sh"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a machine on which sbatch works."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing or os.geteuid():
        pytest.skip(f"no SLURM here: missing {missing}" if missing else "starting SLURM needs root")
    folder = tmp_path_factory.mktemp("slurm")
    done = subprocess.run([SETUP, folder, "start"], capture_output=True, text=True, check=False)
    try:
        if done.returncode:
            pytest.skip(f"SLURM does not start here: {done.stderr.strip()[-300:]}")
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "JAX_PLATFORMS": "cpu"}
        environment |= {"PYTHONPATH": str(cluster.ROOT)}
        yield environment | {"COMMAND": f"{sys.executable} -m tests.train.worker"}
    finally:
        subprocess.run([SETUP, folder, "stop"], check=False)


def call(slurm, *command):
    done = subprocess.run(command, env=slurm, cwd=cluster.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit(slurm, workdir, pause):
    workdir.mkdir()
    options = [
        "--parsable",
        "--ntasks-per-node=2",
        "--chdir",
        str(cluster.ROOT),
        f"--output={workdir}/out.txt",
    ]
    script = str(cluster.ROOT / "launch" / "slurm" / "pretrain.sbatch")
    return call(
        slurm, "sbatch", *options, script, str(workdir), f"steps={STEPS}", "every=10", f"pause={pause}"
    )


def state(slurm, job):
    return dict(
        part.split("=", 1)
        for part in call(slurm, "scontrol", "-o", "show", "job", job).split()
        if "=" in part
    )


def wait(slurm, workdir, job, reached, seconds=240):
    """Until reached()."""
    until = time.monotonic() + seconds
    while not reached():
        out = (workdir / "out.txt").read_text() if (workdir / "out.txt").exists() else ""
        assert time.monotonic() < until, f"{state(slurm, job)}\n{out[-2000:]}"
        time.sleep(0.2)


def started(slurm, job):
    """Whether its tasks have been started, if only just."""
    return f"{job}.0" in call(slurm, "squeue", "--noheader", "--steps", f"--jobs={job}")


def steps(workdir):
    return len(cluster.read_rows(workdir / "metrics.jsonl"))


@pytest.mark.slow
def test_preempted_jobs_end_with_the_losses_of_an_undisturbed_one(slurm, tmp_path):
    """By a signal, by one as the tasks start, by a job of a partition that goes first, and by an administrator."""
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "preempted"
    job = submit(slurm, undisturbed, 0)
    wait(slurm, undisturbed, job, lambda: state(slurm, job)["JobState"] == "COMPLETED")
    expected = cluster.losses(undisturbed, STEPS)
    job = submit(slurm, workdir, 0.5)
    urgent = ("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true", "--comment")
    preemptions = (
        (5, "scancel", "--signal=USR1"),
        (0, "scancel", "--signal=TERM"),
        (15, *urgent),
        (25, "scontrol", "requeue"),
    )
    for number, (at, *preempt) in enumerate(preemptions):
        wait(slurm, workdir, job, lambda at=at: steps(workdir) >= at and started(slurm, job))
        call(slurm, *preempt, job)
        wait(slurm, workdir, job, lambda n=number: int(state(slurm, job)["Restarts"]) > n)
    wait(slurm, workdir, job, lambda: state(slurm, job)["JobState"] == "COMPLETED")
    out = (workdir / "out.txt").read_text()
    assert cluster.losses(workdir, STEPS) == expected
    assert out.count("srun: exit code") == len(preemptions) + 1
    # the signals, not the interval, decided where it went on
    continued = [int(line.split()[3]) for line in out.splitlines() if "continuing at step" in line]
    assert len(continued) == 3, out
    assert not {10, 20, 30} >= set(continued), out


@pytest.mark.slow
def test_a_cancelled_job_saves_and_does_not_come_back(slurm, tmp_path):
    workdir = tmp_path / "cancelled"
    job = submit(slurm, workdir, 0.5)
    wait(slurm, workdir, job, lambda: steps(workdir) >= 5)
    call(slurm, "scancel", job)
    wait(slurm, workdir, job, lambda: state(slurm, job)["JobState"] == "CANCELLED")
    assert state(slurm, job)["Restarts"] == "0"
    out = (workdir / "out.txt").read_text()
    assert "srun: exit code 75" in out
    assert "stopped by signal 15" in out
