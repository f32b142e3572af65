"""Preprocessing in worker processes of their own: no accelerator, no fork, and none outlives its parent.

Each worker is ``python -m mambamim_jax.data.worker``: one JSON job per line in, one JSON answer per line out.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from mambamim_jax.data import preprocess


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """What ``multiprocessing`` starts meanwhile never gets Ctrl-C, which a terminal sends to all processes at once.

    To this process it comes afterwards.
    """
    resource_tracker.ensure_running()  # its start would undo the rest
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_jobs(jobs: Sequence[dict[str, Any]], workers: int) -> Iterator[dict[str, Any]]:
    """Run ``preprocess.run`` on every job and yield the records as they come; in this process if ``workers``
    < 2.

    Raises:
        OSError: the store can't be written. Workers are ended first.
    """
    if workers < 2 or len(jobs) < 2:
        yield from map(preprocess.run, jobs)
        return
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    stop, running = threading.Event(), set[subprocess.Popen]()
    threads = [
        threading.Thread(target=_serve, args=(waiting, done, stop, running), daemon=True)
        for _ in range(min(workers, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            answer = done.get()
            if "errno" in answer:
                raise OSError(answer["errno"], answer["strerror"], answer["filename"])
            yield answer
    finally:
        stop.set()
        for process in tuple(running):  # none, unless it failed or was interrupted
            process.terminate()
        for thread in threads:
            thread.join()


def _serve(
    waiting: queue.SimpleQueue, done: queue.SimpleQueue, stop: threading.Event, running: set[subprocess.Popen]
) -> None:
    """Feed one worker process from the queue; start another in its place if it dies."""
    process: subprocess.Popen | None = None
    while not stop.is_set():
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            break
        if process is None or process.poll() is not None:
            process = _start()
        running.add(process)
        if stop.is_set():  # what ends all that runs may have come before
            process.terminate()
        answer = _ask(process, job)
        running.discard(process)
        if answer is None:
            _end(process)
            ended = f"worker process ended with {process.returncode}; out of memory? Use fewer workers"
            message = f"{job['images'][0]}: {ended}"
            keep = ("id", "source", "label")
            answer = {k: job[k] for k in keep} | {"image": job["images"][0], "status": "refused"}
            answer |= {"code": "worker_died", "message": f"{message} [worker_died]"}
        done.put(answer)
    if process is not None:
        _end(process)


def _start() -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    single = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    environment = os.environ | single | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "mambamim_jax.data.worker", str(os.getpid())]
    # A group of its own: Ctrl-C, which a terminal sends to the whole group, is for the parent to act on.
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
    )


def _end(process: subprocess.Popen) -> None:
    """Close a worker's pipes, which ends it, and wait for it."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()  # type: ignore[union-attr]
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]


def _ask(process: subprocess.Popen, job: dict[str, Any]) -> dict[str, Any] | None:
    try:
        process.stdin.write(json.dumps(job).encode() + b"\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    except BrokenPipeError:
        return None
    line = process.stdout.readline()  # type: ignore[union-attr]
    return json.loads(line) if line.endswith(b"\n") else None


def _die_with_parent(parent: int) -> None:
    """Have the kernel end this process with its parent (Linux; elsewhere the closed pipe ends it after its
    job).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def main() -> None:
    """A worker process: answers the parent's requests until it ends."""
    _die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing half-written is left
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing but answers goes to the pipe
    for line in sys.stdin.buffer:
        try:
            answer = preprocess.run(json.loads(line))
        except OSError as error:
            answer = {"errno": error.errno, "strerror": error.strerror, "filename": str(error.filename)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
