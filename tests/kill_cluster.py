"""Kills processes of a two-process run at random moments and checks: a clear end every time, an exact resume.

    python tests/kill_cluster.py FOLDER [kills=50] [seed=0]

One process or both, at any time, while a checkpoint is written, while one is read, or while steps are done.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import cluster

STEPS, EVERY = 40, 3
CONFIG = {"steps": STEPS, "every": EVERY, "pause": 0.03}
MOMENTS = ("saving", "restoring", "stepping", "any time")


def moment(kind, rng, workdir, logs):
    """A condition that comes true at a random moment of the kind."""
    began, seconds = time.monotonic(), rng.uniform(0.5, 25)
    before, wanted = len(cluster.read_rows(workdir / "metrics.jsonl")), rng.randint(1, 4)
    if kind == "saving":
        return lambda: any((workdir / "checkpoints").glob("*tmp*"))
    if (
        kind == "restoring"
    ):  # from the moment that the data are agreed on until the run says that it continues
        return lambda: "connected to 1 peer" in cluster.printed(workdir)[logs:]
    if kind == "stepping":
        return lambda: before < before + wanted <= len(cluster.read_rows(workdir / "metrics.jsonl"))
    return lambda: time.monotonic() - began > seconds


def kill_once(rng, workdir):
    """(kind of moment, victims, exit codes) of one run, or None where it came to its end first."""
    kind, victims = rng.choice(MOMENTS), rng.choice(([0], [1], [0, 1]))
    reached = moment(kind, rng, workdir, len(cluster.printed(workdir)))
    processes = cluster.start(workdir, CONFIG, 2)
    while all(process.poll() is None for process in processes):
        if reached():
            time.sleep(rng.uniform(0, 0.2))
            for victim in victims:
                processes[victim].send_signal(signal.SIGKILL)
            return kind, victims, cluster.end(processes, 150)
        time.sleep(0.005)
    codes = cluster.end(processes, 150)
    assert codes == [0, 0], f"{codes}\n{cluster.printed(workdir)[-3000:]}"
    return None


def campaign(folder, kills, seed, say=print):
    """Kills so often, over as many runs as that takes.

    Raises: AssertionError for a process that hangs and for a loss that is not the undisturbed run's.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    folder.mkdir(exist_ok=True)
    rng, done, runs = random.Random(seed), 0, 0
    undisturbed = folder / "undisturbed"
    shutil.rmtree(undisturbed, ignore_errors=True)
    assert cluster.end(cluster.start(undisturbed, CONFIG, 2)) == [0, 0], cluster.printed(undisturbed)[-3000:]
    expected = cluster.losses(undisturbed, STEPS)
    while done < kills:
        workdir = folder / f"run{runs}"
        shutil.rmtree(workdir, ignore_errors=True)
        workdir.mkdir()
        while done < kills and (killed := kill_once(rng, workdir)):
            done += 1
            kind, victims, codes = killed
            say(f"{done}: killed {victims} while {kind}: exit codes {codes}", flush=True)
            assert "hangs" not in codes, cluster.printed(workdir)[-3000:]
            assert all(codes[victim] == -signal.SIGKILL or codes[victim] == 0 for victim in victims)
        codes = cluster.end(cluster.start(workdir, CONFIG, 2))
        assert codes == [0, 0], f"{codes}\n{cluster.printed(workdir)[-3000:]}"
        assert cluster.losses(workdir, STEPS) == expected, f"seed {seed}, {workdir}"
        runs += 1
    say(f"{kills} kills over {runs} runs: every end clear, all {STEPS} losses those of the undisturbed run")


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[2:]]
    campaign(Path(sys.argv[1]), *(numbers + [50, 0][len(numbers) :]))
