"""Worker processes: none touches an accelerator, none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mambamim_jax.data import datasets, store
from tests.data import ct_files

READING = """
import os, sys
import numpy as np
from mambamim_jax.data import loader, store

class Watched(loader.PretrainLoader):
    def batch(self, number):
        from jax._src import xla_bridge
        facts = os.getpid(), xla_bridge.backends_are_initialized(), os.environ["JAX_PLATFORMS"] == "cpu"
        return super().batch(number) | {"facts": np.array(facts)}

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cuda"  # what a worker must not inherit
    batches = iter(Watched(store.open_store(sys.argv[1]), crop=(16, 16, 16), volumes_per_batch=1, workers=2))
    for _ in range(4):
        print(*next(batches)["facts"], flush=True)
    sys.stdin.read()
"""
PREPARING = """
import sys
from mambamim_jax.data import datasets, store
store.prepare(datasets.discover(sys.argv[1]), sys.argv[2], workers=2, progress=lambda *a: print("one", flush=True))
"""


def children(process):
    """Process ids of whatever its threads have started."""
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    return {pid for thread in threads for pid in (thread / "children").read_text().split()}


def alive(pid):
    """Whether a process runs; one that has ended has no command line, even if nobody has waited for it."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def wait_until_gone(pids):
    end = time.monotonic() + 30
    while any(map(alive, pids)):
        assert time.monotonic() < end, "a worker outlived its parent"


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        cwd=ct_files.REPO,
        env={**os.environ, "PYTHONPATH": str(ct_files.REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_reading_processes(tmp_path):
    cases = datasets.discover(ct_files.dataset(tmp_path / "source", 3))
    store.prepare(cases, tmp_path / "store", workers=1)
    (tmp_path / "reading.py").write_text(READING)
    process = start(tmp_path / "reading.py", tmp_path / "store")
    facts = [list(map(int, process.stdout.readline().split())) for _ in range(4)]
    workers = {pid for pid, _, _ in facts}
    assert len(workers) == 2
    assert process.pid not in workers
    assert all((initialised, on_cpu) == (0, 1) for _, initialised, on_cpu in facts)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until_gone(workers)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_preparing_processes(tmp_path):
    source = ct_files.dataset(tmp_path / "source", 12)
    (tmp_path / "preparing.py").write_text(PREPARING)
    process = start(tmp_path / "preparing.py", source, tmp_path / "store")
    assert process.stdout.readline() == "one\n"
    process.send_signal(signal.SIGSTOP)
    workers = children(process)
    assert len(workers) == 2
    assert all(map(alive, workers))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until_gone(workers)
    store.prepare(datasets.discover(source), tmp_path / "store", workers=1)
    assert len(store.open_store(tmp_path / "store")) == 12
