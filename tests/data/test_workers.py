"""Worker processes: none touches an accelerator, none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mambamim_jax.data import datasets, store
from mambamim_jax.data.preprocess import TEMPORARY
from tests.data import ct_files

READING = """
import os, signal, sys
import numpy as np
from mambamim_jax.data import loader, store

class Watched(loader.PretrainLoader):
    def batch(self, number):
        from jax._src import xla_bridge
        facts = os.getpid(), xla_bridge.backends_are_initialized(), os.environ["JAX_PLATFORMS"] == "cpu"
        deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return super().batch(number) | {"facts": np.array([*facts, deaf])}

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
    workers = {pid for pid, *_ in facts}
    assert len(workers) == 2
    assert process.pid not in workers
    assert all(rest == [0, 1, 1] for _, *rest in facts)  # the last one: Ctrl-C is for the parent alone
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


INTERRUPTED = """
import os, signal, sys
from mambamim_jax.data import datasets, store
from mambamim_jax.program import CONTINUE, run

def main(arguments):
    source, folder = arguments
    to_all = lambda *_: os.killpg(0, signal.SIGINT)  # as a terminal does on Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    store.prepare(datasets.discover(source), folder, workers=2, progress=to_all)

run(main, CONTINUE)
"""


def test_ctrl_c_while_preparing_is_one_line_and_leaves_no_halves(tmp_path):
    source = ct_files.dataset(tmp_path / "source", 12)
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, tmp_path / "interrupted.py", source, tmp_path / "store"],
        env={**os.environ, "PYTHONPATH": str(ct_files.REPO)},
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted; run the same command again to continue\n")
    assert not list((tmp_path / "store").rglob(f"{TEMPORARY}*"))
    assert len(list((tmp_path / "store" / "volumes").iterdir())) < 12
    store.prepare(datasets.discover(source), tmp_path / "store", workers=1)
    assert len(store.open_store(tmp_path / "store")) == 12
