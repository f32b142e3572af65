"""Several real processes: found by their environment, equal to one, stopped and continued in other numbers, killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mambamim_jax.checks import ConfigError
from mambamim_jax.data.phantom import write_phantoms
from mambamim_jax.model_files import load_model
from mambamim_jax.settings import DistributedConfig
from mambamim_jax.train.optim import paths
from mambamim_jax.train.processes import Processes, Watchdog, find, first_host
from mambamim_jax.train.signals import PREEMPTIONS, TRY_AGAIN, interruptible
from tests import cluster
from tests.kill_cluster import campaign
from tests.train import test_finetune
from tests.train.test_loop import damage

KILLS = int(os.environ.get("MAMBAMIM_CLUSTER_KILLS", "2"))
SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[003-004,9],login",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "77",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
JOBSET = {"JOBSET_COORDINATOR": "run-workers-0-0.run", "JOBSET_PROCESSES": "8", "JOB_COMPLETION_INDEX": "5"}


def test_schedulers_are_recognised():
    alone = DistributedConfig()
    assert find(alone, {}) is None
    slurm = find(alone, SLURM)
    assert slurm is not None
    assert slurm.coordinator.startswith("gpu003:6")
    assert (slurm.count, slurm.index, slurm.local) == (4, 3, 1)
    assert find(alone, SLURM | {"CUDA_VISIBLE_DEVICES": "1"}).local is None
    assert find(alone, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    head = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    assert find(alone, OPEN_MPI | head).coordinator.startswith("10.96.0.1:6")
    with pytest.raises(ConfigError, match=r"config.distributed.coordinator: found none.*pass HOST:PORT"):
        find(alone, OPEN_MPI)
    assert find(alone, JOBSET) == Processes("run-workers-0-0.run:61440", 8, 5)
    assert find(DistributedConfig("h:1", 2, 1), SLURM) == Processes("h:1", 2, 1)
    with pytest.raises(ConfigError, match="all of coordinator=HOST:PORT"):
        find(DistributedConfig("h:1", 2, 2), {})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a1,b2", "a1"), ("r[1-2]n[04,6]", "r1n04"), ("gpu[003-007,9]", "gpu003")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def stopped_at(workdir, config, processes, devices, step, number):
    """Runs until a step, then signals one of the processes; exit codes of all."""
    started = cluster.start(workdir, config, processes, devices)
    while len(cluster.read_rows(workdir / "metrics.jsonl")) < step and started[0].poll() is None:
        time.sleep(0.02)
    started[-1].send_signal(number)
    return cluster.end(started)


@pytest.mark.slow
def test_other_numbers_of_processes_and_devices_go_on_with_the_same_losses(tmp_path):
    """Four processes, two, one, eight devices, two processes: as one process that never stopped."""
    config = {"steps": 40, "every": 7}
    assert cluster.end(cluster.start(tmp_path / "one", config)) == [0]
    expected = cluster.losses(tmp_path / "one", 40)
    workdir, slow = tmp_path / "many", {**config, "pause": 0.05}
    assert stopped_at(workdir, slow, 4, 1, 5, signal.SIGTERM) == [75] * 4, cluster.printed(workdir)[-3000:]
    fsdp = {**slow, "mesh.fsdp": 2}
    assert stopped_at(workdir, fsdp, 2, 1, 13, signal.SIGUSR1) == [75] * 2, cluster.printed(workdir)[-3000:]
    assert stopped_at(workdir, slow, 1, 1, 20, signal.SIGTERM) == [75], cluster.printed(workdir)[-3000:]
    assert stopped_at(workdir, fsdp, 1, 8, 28, signal.SIGTERM) == [75], cluster.printed(workdir)[-3000:]
    halves = {**slow, "mesh.space": 2}  # each process has one half of every crop
    assert stopped_at(workdir, halves, 2, 1, 34, signal.SIGTERM) == [75] * 2, cluster.printed(workdir)[-3000:]
    assert cluster.end(cluster.start(workdir, fsdp, 2)) == [0, 0], cluster.printed(workdir)[-3000:]
    np.testing.assert_allclose(cluster.losses(workdir, 40), expected, rtol=1e-5)


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_devices_save_and_go_on(tmp_path):
    config = {"steps": 16, "every": 3}
    assert cluster.end(cluster.start(tmp_path / "one", config)) == [0]
    expected, workdir = cluster.losses(tmp_path / "one", 16), tmp_path / "many"
    codes = stopped_at(workdir, {**config, "pause": 0.1}, 2, (1, 3), 4, signal.SIGTERM)
    assert codes == [75, 75], cluster.printed(workdir)[-3000:]
    fsdp = {**config, "mesh.fsdp": 2, "panel_every": 8}
    assert cluster.end(cluster.start(workdir, fsdp, 2, (3, 1))) == [0, 0], cluster.printed(workdir)[-3000:]
    assert "continuing at step " in cluster.printed(workdir)
    np.testing.assert_allclose(cluster.losses(workdir, 16), expected, rtol=1e-5)


@pytest.mark.slow
def test_a_signal_is_learnt_of_at_a_step_that_is_drawn_and_no_checkpoint_is_due(tmp_path):
    config = {"steps": 400, "every": 500, "panel_every": 1, "pause": 0.1}
    codes = stopped_at(tmp_path, config, 2, 1, 5, signal.SIGTERM)
    assert codes == [75, 75], cluster.printed(tmp_path)[-3000:]
    done = len(cluster.read_rows(tmp_path / "metrics.jsonl"))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(done)]
    assert not (tmp_path / "panels" / f"step_{done:07d}.png").exists()
    assert (tmp_path / "panels" / f"step_{done - 1:07d}.png").exists()
    assert f"stopped by signal 15: step {done} of 400" in cluster.printed(tmp_path)


@pytest.mark.slow
def test_a_signal_to_a_process_that_waits_for_a_validation_ends_it(tmp_path):
    """Saved before, and validated when the run goes on."""
    config = {"steps": 8, "every": 4, "validate": 4}
    (tmp_path / "hold").touch()
    started = cluster.start(tmp_path, config, 2)
    while not (tmp_path / "validating").exists() and started[0].poll() is None:
        time.sleep(0.02)
    started[1].send_signal(signal.SIGUSR1)
    assert cluster.end(started, 60) == [75, 75], cluster.printed(tmp_path)[-3000:]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert cluster.read_rows(tmp_path / "validation.jsonl") == []
    (tmp_path / "hold").unlink()
    assert cluster.end(cluster.start(tmp_path, config, 2)) == [0, 0], cluster.printed(tmp_path)[-3000:]
    assert [row["earlier"] for row in cluster.read_rows(tmp_path / "validation.jsonl")] == [[], [4]]
    assert (tmp_path / "finished").exists()
    cluster.losses(tmp_path, 8)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "flipped bit"])
def test_two_processes_leave_a_damaged_newest_checkpoint_aside(tmp_path, how):
    config = {"steps": 12, "every": 4}
    assert cluster.end(cluster.start(tmp_path, config, 2)) == [0, 0], cluster.printed(tmp_path)[-3000:]
    expected = cluster.losses(tmp_path, 12)
    for folder in (tmp_path / "checkpoints" / "12").rglob("d"):
        damage(folder, how)
    assert cluster.end(cluster.start(tmp_path, config, 2)) == [0, 0], cluster.printed(tmp_path)[-3000:]
    printed = cluster.printed(tmp_path)
    assert "checkpoints/12 is damaged and not used" in printed
    assert "continuing at step 8 of 12" in printed
    assert cluster.losses(tmp_path, 12) == expected


@pytest.mark.parametrize("number", PREEMPTIONS)
def test_a_signal_ends_a_process_that_waits_for_another_at_once(number):
    """The wait is in a library, which does not return for a signal."""
    script = """
import ctypes
from mambamim_jax.train.signals import end_at_once, interruptible
end_at_once()
print("waiting", flush=True)
interruptible(lambda: ctypes.CDLL(None).sleep(60) and ctypes.CDLL(None).sleep(60))
"""
    waits = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=cluster.ROOT)
    with waits:
        assert waits.stdout.readline() == b"waiting\n"
        waits.send_signal(number)
        assert cluster.end([waits], 30) == [TRY_AGAIN]


def test_interruptible_returns_and_raises():
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)


def test_the_watchdog_ends_a_process_that_hangs_and_lets_one_rest():
    script = """
import sys, time
from mambamim_jax.train.processes import Watchdog
dog = Watchdog(0.4, lambda line: print(line, file=sys.stderr, flush=True))
dog.beat("step 3")
with dog.resting():
    time.sleep(1.5)
print("rested", flush=True)
time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=cluster.ROOT, check=False
    )
    assert (done.returncode, done.stdout) == (TRY_AGAIN, "rested\n"), done.stderr
    assert "nothing has happened for 0.4 s (config.distributed.patience) since step 3" in done.stderr


def test_the_watchdog_counts_from_the_end_of_a_rest_before_it_watches_again():
    class Seen(Watchdog):
        def beat(self, what):
            self.resting_still = self.asleep

    dog = Seen(0, print)
    with dog.resting():
        pass
    assert (dog.resting_still, dog.asleep) == (True, False)


@pytest.mark.slow
def test_the_watchdog_ends_a_process_whose_peer_hangs(tmp_path):
    """A peer that is stopped, long before it counts as dead."""
    config = {"steps": 400, "every": 5, "pause": 0.1, "patience": 15, "heartbeat": 100}
    started = cluster.start(tmp_path, config, 2)
    while len(cluster.read_rows(tmp_path / "metrics.jsonl")) < 6:
        assert started[0].poll() is None, cluster.printed(tmp_path)[-3000:]
        time.sleep(0.05)
    started[1].send_signal(signal.SIGSTOP)
    assert cluster.end(started[:1], 90) == [TRY_AGAIN], cluster.printed(tmp_path)[-3000:]
    started[1].kill()
    started[1].wait()
    assert "nothing has happened for 15 s" in cluster.printed(tmp_path)


@pytest.mark.slow
def test_data_that_only_the_first_process_looks_at_end_all_of_them_with_2(tmp_path):
    """A job that ends so is not started again."""
    (empty := tmp_path / "empty").mkdir()
    started = cluster.start(tmp_path, {"data.source": empty}, 2, line=cluster.pretrain)
    assert cluster.end(started, 120) == [2, 2], cluster.printed(tmp_path)[-3000:]
    for index in (0, 1):
        said = (tmp_path / f"log.{index}.txt").read_text()
        assert said.count("error: ") == 1
        assert str(empty) in said


@pytest.mark.slow
def test_fine_tuning_by_two_processes_is_that_of_one_with_two_devices(tmp_path):
    source = write_phantoms(tmp_path / "Dataset900_Phantoms", count=3)

    def line(workdir, config):
        given = test_finetune.TINY | {"data.source": source, "validation.every": 4, "steps": 3, **config}
        overrides = [f"--config.{name}={value}" for name, value in given.items()]
        script = [sys.executable, str(cluster.ROOT / "launch" / "finetune.py"), f"--workdir={workdir}"]
        return [*script, "--config=configs/finetune.py:demo", *overrides]

    workdirs = {count: tmp_path / f"by_{count}" for count in (1, 2)}
    runs = [cluster.start(workdir, {}, count, 2 // count, line=line) for count, workdir in workdirs.items()]
    for codes, workdir in zip(map(cluster.end, runs), workdirs.values()):
        assert set(codes) == {0}, cluster.printed(workdir)[-3000:]
    one, two = (cluster.losses(workdir, 3) for workdir in workdirs.values())
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert one[-1] != one[0]
    rows = [cluster.read_rows(workdir / "validation.jsonl") for workdir in workdirs.values()]
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]] == [3]
    assert rows[1][0]["mean_dice"] == pytest.approx(rows[0][0]["mean_dice"], abs=1e-3)
    one, two = (paths(load_model(workdir / "last").params) for workdir in workdirs.values())
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_killed_processes_end_clearly_and_resume_exactly(tmp_path):
    """MAMBAMIM_CLUSTER_KILLS of them; see tests/kill_cluster.py."""
    campaign(tmp_path, KILLS, 0)


def test_the_batch_file_requeues():
    text = (Path(cluster.ROOT) / "launch" / "slurm" / "pretrain.sbatch").read_text()
    for line in (
        "#SBATCH --requeue",
        "#SBATCH --signal=USR1@",
        "#SBATCH --open-mode=append",
        "scontrol requeue",
    ):
        assert line in text


def test_the_jobset_agrees_with_itself_and_with_the_launcher():
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load((Path(cluster.ROOT) / "launch" / "k8s" / "pretrain.yaml").read_text())
    assert (spec["apiVersion"], spec["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = spec["spec"]["replicatedJobs"]
    assert spec["spec"]["coordinator"]["replicatedJob"] == workers["name"]
    job = workers["template"]["spec"]
    (pod,) = job["template"]["spec"]["containers"]
    values = {item["name"]: item.get("value") for item in pod["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(values["JOBSET_PROCESSES"])
    assert (
        find(DistributedConfig(), {**JOBSET, **{k: v for k, v in values.items() if v}}).count
        == job["completions"]
    )
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == pod["name"]
    assert TRY_AGAIN not in rule["onExitCodes"]["values"]
    assert (Path(cluster.ROOT) / pod["command"][1]).is_file()
