"""The processes of one run: how they find each other, wait for each other, and end when one of them is gone."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax

from mambamim_jax.checks import ConfigError
from mambamim_jax.device_memory import exhausted
from mambamim_jax.settings import DistributedConfig, MeshConfig
from mambamim_jax.train.sharding import make_placement, on_host
from mambamim_jax.train.signals import TRY_AGAIN, interruptible

T = TypeVar("T")
Work: TypeAlias = Callable[[Callable[[], int]], int | None]
"""What the first process does alone, see ``first_tells``."""
FIRST_PORT, PORTS = 61440, 4096
FAREWELL = 10.0
"""Seconds that the first process waits for the others to end, and they for it to be told."""
DAYS = 7 * 24 * 3600 * 1000  # ms


class PeerError(RuntimeError):
    """Another process of the run has failed or is gone; a restart goes on from the newest checkpoint."""

    exit_code = TRY_AGAIN


@dataclass(frozen=True)
class Processes:
    """One process among the others.

    Attributes:
      coordinator: HOST:PORT of process 0. count, index: how many there are, and which this is.
      local: the only device of its host that this process uses, or None for all it sees.
    """

    coordinator: str
    count: int
    index: int
    local: int | None = None


def find(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> Processes | None:
    """The run's processes by the settings, or else by SLURM's, Open MPI's or a JobSet's environment; None for one.

    Raises: ConfigError where an address is missing.
    """
    given = (config.coordinator, config.processes, config.process)
    if any(value != default for value, default in zip(given, ("", 0, -1))):
        if not config.coordinator or config.processes < 1 or not 0 <= config.process < config.processes:
            expected = "all of coordinator=HOST:PORT, processes=N and process=0 to N-1"
            raise ConfigError("config.distributed", f"found {given}", expected, "or none of them")
        return Processes(config.coordinator, config.processes, config.process)
    for scheduler in (_slurm, _open_mpi, _jobset):
        found = scheduler(environment)
        if found and found.count > 1:
            return found
    return None


def _slurm(env: Mapping[str, str]) -> Processes | None:
    """A task that srun has started."""
    if "SLURM_STEP_NUM_TASKS" not in env or "SLURM_PROCID" not in env:
        return None
    host = first_host(env["SLURM_STEP_NODELIST"])
    a_node = int(re.split(r"\D", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    local = _only_device(env, a_node, int(env.get("SLURM_LOCALID", "0")))
    address = f"{host}:{_port(env.get('SLURM_JOB_ID', ''))}"
    return Processes(address, int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"]), local)


def _open_mpi(env: Mapping[str, str]) -> Processes | None:
    """A rank that mpirun has started."""
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    count, a_node = int(env["OMPI_COMM_WORLD_SIZE"]), int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    head = re.search(r"tcp://([\w.:-]+?)[,:]", env.get("OMPI_MCA_orte_hnp_uri", ""))
    if not head and a_node < count:
        expected = "the address of rank 0, which this Open MPI does not tell"
        raise ConfigError(
            "config.distributed.coordinator", "found none", expected, "pass HOST:PORT, processes and process"
        )
    job = env.get("OMPI_MCA_ess_base_jobid", env.get("PMIX_NAMESPACE", ""))
    address = f"{head[1] if head else '127.0.0.1'}:{_port(job)}"
    local = _only_device(env, a_node, int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")))
    return Processes(address, count, int(env["OMPI_COMM_WORLD_RANK"]), local)


def _jobset(env: Mapping[str, str]) -> Processes | None:
    """A pod of launch/k8s/pretrain.yaml, which sets the first two."""
    if "JOBSET_COORDINATOR" not in env or "JOBSET_PROCESSES" not in env:
        return None
    address = f"{env['JOBSET_COORDINATOR']}:{FIRST_PORT}"
    return Processes(address, int(env["JOBSET_PROCESSES"]), int(env["JOB_COMPLETION_INDEX"]))


def first_host(nodes: str) -> str:
    """SLURM's list of nodes, such as "gpu[003-007,9],login" → its first, "gpu003"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _port(job: str) -> int:
    """The same for all processes of a job, another for most other jobs."""
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def _only_device(env: Mapping[str, str], a_node: int, local: int) -> int | None:
    """A process that shares its node takes one GPU, unless the scheduler shows it a single one."""
    shown = [gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return local if a_node > 1 and len(shown) != 1 else None


def start(config: DistributedConfig) -> None:
    """Joins the run's other processes, if there are any; before anything else of JAX.

    Raises: ConfigError, PeerError: they cannot be reached.
    """
    found = find(config)
    if found is None:
        return
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # its signal handler would take the place of ours
    try:
        interruptible(partial(_join, found, config))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PeerError(
            f"process {found.index} of {found.count} did not reach {found.coordinator}: {reason}"
        ) from error


def _join(found: Processes, config: DistributedConfig) -> None:
    jax.distributed.initialize(
        found.coordinator,
        found.count,
        found.index,
        found.local,
        cluster_detection_method="deactivate",
        initialization_timeout=config.join,
        heartbeat_timeout_seconds=config.heartbeat,
    )


def several() -> bool:
    """Whether other processes take part in the run."""
    return jax.process_count() > 1


def first_alone(name: str, work: Callable[[], T]) -> T:
    """work() by the first process, then by all others at once; if it fails there, everywhere.

    Args:
      name: of the work, once a run.

    Raises: PeerError with the first process's error.
    """
    done: list[T] = []
    first_tells(name, lambda heard: done.append(work()))
    return done[0] if done else work()


def first_tells(name: str, work: Work, caught: Sequence[int] = ()) -> int:
    """work(heard) by the first process, while the others wait, however long; its number, or 0, on all of them.

    Args:
      name: of the work, once a run.
      work: ``heard`` gives it the number of a signal that some process has caught, 0 as long as there is none.
      caught: by this process, see ``signals.caught_signals``; it may grow meanwhile.

    Raises: PeerError with the first process's error.
    """
    if not several():
        return work(lambda: caught[0] if caught else 0) or 0
    from jax._src import distributed  # JAX shows the processes' common dictionary nowhere else

    client: Any = distributed.global_state.client
    index, signals = jax.process_index(), f"{name}/signals/"

    def pass_on() -> None:
        if caught:
            client.key_value_set(f"{signals}{index}", str(caught[0]), allow_overwrite=True)

    def heard() -> int:
        pass_on()
        return max((int(number) for _, number in client.key_value_dir_get(signals)), default=0)

    if index:
        outcome = json.loads(interruptible(lambda: client.blocking_key_value_get(name, DAYS), pass_on))
        if outcome["error"]:
            error = PeerError(f"process 0: {outcome['error']}")
            error.exit_code = outcome["exit_code"]  # type: ignore[misc]
            raise error
        return outcome["told"]
    try:
        told = work(heard) or 0
    except Exception as error:
        wanted = exhausted(error)
        code = getattr(error, "exit_code", 2 if wanted else 1)
        failure = {"error": wanted or str(error) or repr(error), "exit_code": code}
        client.key_value_set(name, json.dumps(failure))
        raise
    client.key_value_set(name, json.dumps({"error": "", "told": told}))
    return told


def all_agree(ok: bool) -> bool:
    """Whether it is so on every process; each of them has to ask."""
    if not several():
        return ok
    every = make_placement(MeshConfig(), jax.device_count())
    return bool(on_host(jax.numpy.min, every.flag(ok)))


def lost_peer(error: Exception) -> PeerError:
    """What a failed collective most often means."""
    reason = str(error).strip().partition("\n")[0][:200]
    advice = "start again to go on from the newest checkpoint"
    return PeerError(
        f"process {jax.process_index()}: another process of the run is gone ({reason}); {advice}"
    )


def leave(code: int) -> int:
    """The exit code; with other processes it ends this one, as an orderly end would wait for them without end.

    The first process waits a few seconds for those that end with an error of the run, as it does.
    """
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        if code != TRY_AGAIN:
            leaving = threading.Thread(target=_leave_together, daemon=True)
            leaving.start()
            leaving.join(FAREWELL)
        os._exit(code)
    return code


def _leave_together() -> None:
    """Tells process 0 that this one leaves; returns in process 0 once all have: they would not outlive it."""
    from jax._src import distributed

    client: Any = distributed.global_state.client
    index, left = jax.process_index(), "left/"
    with suppress(Exception):  # it is over anyway
        if index:
            client.key_value_set(f"{left}{index}", "gone")
        while not index and len(client.key_value_dir_get(left)) < jax.process_count() - 1:
            time.sleep(0.05)


class Watchdog:
    """Ends the process where nothing has happened for a while: a device or a peer hangs, and a restart is due.

    Args:
      patience: seconds without a ``beat``; 0 for never.
    """

    def __init__(self, patience: float, say: Callable[[str], None]):
        self.patience, self.say, self.last, self.what = patience, say, time.monotonic(), "start"
        self.over, self.asleep = threading.Event(), False
        if patience:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, what: str) -> None:
        """Something has happened."""
        self.last, self.what = time.monotonic(), what

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Meanwhile a long time without a ``beat`` is as it should be."""
        self.asleep = True
        try:
            yield
        finally:
            self.beat(self.what)
            self.asleep = False

    def stop(self) -> None:
        """Nothing more is expected."""
        self.over.set()

    def _watch(self) -> None:
        while not self.over.wait(min(self.patience / 4, 10)):
            if not self.asleep and time.monotonic() - self.last > self.patience:
                self.say(
                    f"error: nothing has happened for {self.patience:g} s (config.distributed.patience) since "
                    f"{self.what}: a device or another process hangs; start again to go on from the newest checkpoint"
                )
                os._exit(TRY_AGAIN)
