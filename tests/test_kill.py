"""A real process killed with -9 at random moments, also while it writes a checkpoint, resumes exactly.

MAMBAMIM_KILLS sets how often (3 by default), MAMBAMIM_KILL_SEED when.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mambamim_jax.train.logs import read_rows

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("MAMBAMIM_KILLS", "3"))
SEED = int(os.environ.get("MAMBAMIM_KILL_SEED", str(random.SystemRandom().randrange(10**6))))
STEPS = 6 + 2 * KILLS
OURS = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
AS_A_USER = {name: value for name, value in os.environ.items() if name not in OURS}
CONFIG = {
    "steps": STEPS,
    "data.crop": (32, 32, 32),
    "data.crops_per_volume": 1,
    "data.phantoms": 3,
    "model.encoder": "vision_mamba",
    "model.vision_mamba.channels": (2, 2, 4, 4, 6),
    "model.vision_mamba.state": 2,
    "model.decoder_width": 16,
    "checkpoint.every": 2,
    "log.panel_every": 10**6,
}


def start(workdir):
    overrides = [f"--config.{key}={value}" for key, value in CONFIG.items()]
    command = [sys.executable, "launch/pretrain.py", "--config=configs/pretrain.py:demo", *overrides]
    with open(workdir / "log.txt", "ab") as log:
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"], cwd=ROOT, env=AS_A_USER, stdout=log, stderr=log
        )


def moment(rng, workdir):
    """A condition that comes true at a random moment: while saving, after some steps, or at any time."""
    steps = lambda: len(read_rows(workdir / "metrics.jsonl"))  # noqa: E731
    kind, before, began = rng.choice(["saving", "stepping", "any time"]), steps(), time.monotonic()
    if kind == "saving":
        return kind, lambda: any((workdir / "checkpoints").glob("*tmp*"))
    if kind == "stepping":
        wanted = before + rng.randint(1, 3)
        return kind, lambda: before < wanted <= steps()
    seconds = rng.uniform(1, 30)
    return kind, lambda: time.monotonic() - began > seconds


def kill_once(rng, workdir):
    """Runs until a random moment, then kills; the kind of moment, or None where the run ended before."""
    kind, reached = moment(rng, workdir)
    delay = rng.uniform(0, 0.05)
    process = start(workdir)
    try:
        while process.poll() is None:
            if reached():
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                process.wait()
                return kind
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, (workdir / "log.txt").read_text()
    return None


def losses(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.slow
def test_killed_runs_end_as_the_undisturbed_one(tmp_path):
    rng = random.Random(SEED)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "run"
    killed.mkdir()
    assert start(killed).wait() == 0, (killed / "log.txt").read_text()
    expected = losses(killed)
    killed.rename(undisturbed)  # what is compiled is found again only under the same name
    kinds, runs = [], 0
    while len(kinds) < KILLS:
        shutil.rmtree(killed, ignore_errors=True)
        killed.mkdir()
        shutil.copytree(undisturbed / "compilation_cache", killed / "compilation_cache")
        shutil.copytree(undisturbed / "phantoms", killed / "phantoms")
        while len(kinds) < KILLS and (kind := kill_once(rng, killed)):
            kinds.append(kind)
        process = start(killed)
        assert process.wait() == 0, (killed / "log.txt").read_text()
        assert losses(killed) == expected, f"seed {SEED}, killed while {kinds}"
        runs += 1
    print(f"{KILLS} kills ({', '.join(kinds)}) over {runs} runs: all {STEPS} losses as undisturbed")
