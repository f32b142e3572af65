"""A file system that really is full while checkpoints are written: a small tmpfs, filled up and emptied again."""

import os
import signal
import subprocess
import time

import pytest

from tests import cluster

STEPS = 60


@pytest.fixture
def small_disk(tmp_path):
    """A workdir whose checkpoints lie on a file system of 2 MiB."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def steps(workdir):
    return len(cluster.read_rows(workdir / "metrics.jsonl"))


def until(reached, process):
    while not reached():
        assert process.poll() is None
        time.sleep(0.02)


def fill(path):
    """Writes until there is no space."""
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_run_goes_on(small_disk, tmp_path):
    workdir, ballast = small_disk.parent, small_disk.parent / "checkpoints" / "ballast.tmp"
    started = cluster.start(workdir, {"steps": STEPS, "every": 5, "pause": 0.2})
    until(lambda: steps(workdir) >= 12, started[0])
    with pytest.raises(OSError, match="No space left"):
        fill(ballast)
    until(
        lambda: "WARNING: a checkpoint could not be saved, that of step" in cluster.printed(workdir),
        started[0],
    )
    before = steps(workdir)
    ballast.unlink()
    until(lambda: steps(workdir) > before + 6, started[0])
    started[-1].send_signal(signal.SIGTERM)
    assert cluster.end(started) == [75], cluster.printed(workdir)[-3000:]
    saved = max(int(path.name) for path in small_disk.iterdir() if path.name.isdigit())
    assert saved == steps(workdir) > before
    assert cluster.end(cluster.start(workdir, {"steps": saved + 3, "every": 5})) == [0]
    assert f"continuing at step {saved}" in cluster.printed(workdir)
    cluster.losses(workdir, saved + 3)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint_and_two_processes_go_on(small_disk, tmp_path):
    """They do not begin what there is no room for."""
    workdir, ballast = small_disk.parent, small_disk.parent / "checkpoints" / "ballast.tmp"
    started = cluster.start(workdir, {"steps": STEPS, "every": 6, "pause": 0.2}, 2)
    saved = lambda: max((int(p.name) for p in small_disk.iterdir() if p.name.isdigit()), default=0)  # noqa: E731
    until(lambda: saved() >= 6, started[0])  # renamed, so complete; the next is some steps away
    good = saved()
    with pytest.raises(OSError, match="No space left"):
        fill(ballast)
    until(lambda: "WARNING: a checkpoint could not be saved" in cluster.printed(workdir), started[0])
    assert f"that of step {good} stays and the run goes on: 0 bytes are free" in cluster.printed(workdir)
    ballast.unlink()
    until(lambda: saved() > good, started[0])
    assert cluster.end(started) == [0, 0], cluster.printed(workdir)[-3000:]
    assert saved() == STEPS
    cluster.losses(workdir, STEPS)
