"""Real runs of launch/pretrain.py with a tiny network, as one or several processes that talk over loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from mambamim_jax.train.logs import read_rows
from tests import compiled

ROOT = Path(__file__).parents[1]
TINY = {
    "data.crop": (32, 32, 32),
    "data.crops_per_volume": 2,
    "data.volumes_per_batch": 4,
    "data.phantoms": 6,
    "data.workers": 1,
    "model.encoder": "vision_mamba",
    "model.vision_mamba.channels": (2, 2, 4, 4, 6),
    "model.vision_mamba.mamba_depth": 4,
    "model.vision_mamba.state": 2,
    "model.decoder_width": 16,
    "optim.eps": 1e-4,
    "log.panel_every": 10**6,
    "distributed.join": 120,
    "distributed.heartbeat": 20,
    "distributed.patience": 300,
}


def tiny(workdir, config):
    """The command line of ``tests.train.worker``."""
    return [
        sys.executable,
        "-m",
        "tests.train.worker",
        str(workdir),
        *(f"{k}={v}" for k, v in config.items()),
    ]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def pretrain(workdir, config):
    """The command line of one process."""
    overrides = [f"--config.{key}={value}" for key, value in {**TINY, **config}.items()]
    script = [sys.executable, str(ROOT / "launch" / "pretrain.py")]
    return [*script, f"--config={ROOT}/configs/pretrain.py:demo", *overrides, f"--workdir={workdir}"]


def start(workdir, config, processes=1, devices=1, line=tiny):
    """Starts the processes of one run; what they print goes to WORKDIR/log.N.txt.

    ``devices``: how many each of them has, or a tuple of how many the first has, the second, and so on.
    """
    workdir.mkdir(exist_ok=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    devices = devices if isinstance(devices, tuple) else processes * (devices,)
    environment["PYTHONPATH"] = str(ROOT)
    started, address = [], f"127.0.0.1:{free_port()}"
    name = "coordinator" if line is tiny else "distributed.coordinator"
    for index in range(processes):
        environment["XLA_FLAGS"] = compiled.devices(devices[index])
        own = {name: address, "distributed.processes": processes, "distributed.process": index}
        with open(workdir / f"log.{index}.txt", "ab") as log:
            arguments = line(workdir, {**config, **(own if processes > 1 else {})})
            started.append(subprocess.Popen(arguments, stdout=log, stderr=log, env=environment, cwd=ROOT))
    return started


def end(processes, timeout=300):
    """Exit codes; a process that has not ended by itself is killed and counts as "hangs"."""
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(timeout))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append("hangs")
    return codes


def printed(workdir):
    return "".join(path.read_text(errors="replace") for path in sorted(workdir.glob("log.*.txt")))


def losses(workdir, steps):
    """Loss and gradient norm of every step, each logged once and in order."""
    rows = read_rows(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), printed(workdir)[-3000:]
    return [(row["loss"], row["grad_norm"]) for row in rows]
