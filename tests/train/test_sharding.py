"""Devices: the mesh from the settings, the rules, and training that does not depend on how many devices there are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mambamim_jax.checks import ConfigError
from mambamim_jax.settings import MeshConfig, PretrainConfig
from mambamim_jax.train import pretrain
from mambamim_jax.train.optim import paths
from mambamim_jax.train.pretrain import mim_task
from mambamim_jax.train.sharding import divide, make_placement
from tests import compiled

ROOT = Path(__file__).parents[2]
FEW = ("4,1,1", "1,1,8", "2,2,2", "2,1,1,4", "1,2,1,2")
ALL = tuple(
    f"{2**a},{2**b},{2**c}"
    for n in (1, 2, 3)
    for a in range(n + 1)
    for b in range(n + 1 - a)
    for c in [n - a - b]
)


def rows_divide(batch: int, mesh: str) -> bool:
    data, fsdp, *_ = map(int, mesh.split(","))
    return batch % (data * fsdp) == 0


def on_fake_devices(*arguments: str, **variables: str) -> list[dict]:
    """Reports of ``tests.train.sharded`` on eight devices."""
    environment = (
        os.environ
        | variables
        | {
            "XLA_FLAGS": compiled.devices(8),
            "JAX_PLATFORMS": "cpu",
        }
    )
    command = [sys.executable, "-W", "error", "-m", "tests.train.sharded", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_twenty_steps_are_those_of_one_device(accumulate):
    """On every mesh with MAMBAMIM_MESHES=all, another network with MAMBAMIM_NETWORK=demo.

    Also: one compilation, no hidden transfer, nothing left whole.
    """
    meshes, network = (
        FEW if accumulate == "1" else ("2,2,2", "1,2,1,2"),
        os.environ.get("MAMBAMIM_NETWORK", "mini"),
    )
    if os.environ.get("MAMBAMIM_MESHES") == "all":
        meshes = tuple(mesh for mesh in (*ALL, *FEW[3:]) if rows_divide(8 // int(accumulate), mesh))
    for report in on_fake_devices(network, accumulate, *meshes):
        assert report["fell"] > 0.005, report
        assert report["loss"] < 1e-5, report
        assert report["state"] < 1e-5, report
        assert report["late"] == 0, report
        assert report["not_divided"] == [], report
        if report["mesh"].split(",")[1:3] != ["1", "1"]:
            assert report["share"] > 0.95, report


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("MAMBAMIM_MESHES") != "all", reason="minutes: asked for by MAMBAMIM_MESHES=all"
)
def test_twenty_steps_of_a_hymamba_in_float64_are_those_of_one_device():
    """In float32 rounding grows too far to tell."""
    meshes = ("2,1,1", "1,2,1", "1,1,2", "1,1,1,2", "2,2,2")
    for report in on_fake_devices("narrow", "1", *meshes, JAX_ENABLE_X64="1"):
        assert report["fell"] > 5e-5, report
        assert report["loss"] < 1e-9, report
        assert report["state"] < 1e-9, report


@pytest.mark.slow
def test_the_step_gathers_parameters_alone():
    """Where the batch is divided no activation goes to another device as a whole, and with ``data`` no parameter."""
    for report in on_fake_devices("mini", "0", "4,1,1", "1,4,1", "2,2,1"):
        assert report["gathered"] == [], report


def sizes(data=1, fsdp=1, model=1):
    return {"data": data, "fsdp": fsdp, "model": model}


@pytest.mark.parametrize(
    ("path", "shape", "mesh", "expected"),
    [
        (
            "decoder/refine/0/conv1/kernel",
            (3, 3, 3, 64, 32),
            sizes(2, 2, 2),
            P(None, None, None, "fsdp", "model"),
        ),
        ("opt_state/mu/encoder/mamba/layers/0/fc2/kernel", (96, 48), sizes(1, 4, 2), P("model", "fsdp")),
        ("encoder/mamba/layers/0/mamba/A_log", (96, 16), sizes(model=8), P("model", None)),
        ("encoder/mamba/layers/0/mamba/D", (96,), sizes(model=8), P("model")),
        (
            "encoder/stem/kernel",
            (3, 3, 3, 1, 32),
            sizes(1, 4, 2),
            P(None, None, None, None, ("model", "fsdp")),
        ),
        ("encoder/stem/kernel", (3, 3, 3, 1, 6), sizes(1, 4, 1), P(None, None, None, None, None)),
        ("decoder/norm/scale", (64,), sizes(2, 2, 2), P(None)),
        ("opt_state/count", (), sizes(2, 2, 2), P()),
    ],
)
def test_rules(path, shape, mesh, expected):
    assert divide(path, shape, mesh) == expected


def test_the_rules_divide_nearly_all_of_the_published_network():
    task = mim_task(PretrainConfig())
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    for mesh in (sizes(fsdp=8), sizes(model=8), sizes(2, 4, 4)):
        whole = sum(
            leaf.size for path, leaf in paths(params).items() if not any(divide(path, leaf.shape, mesh))
        )
        assert whole < 0.01 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_sizes_that_do_not_fit_are_one_clear_line():
    devices = [jax.devices()[0]] * 8
    with pytest.raises(
        ConfigError, match=r"config.mesh: found data 3 × fsdp 1 × model 1; expected .* the 8 devices"
    ):
        make_placement(MeshConfig(data=3), 12, devices)
    with pytest.raises(ConfigError, match=r"config.mesh: found data -1 × fsdp 3 × model 1") as refused:
        make_placement(MeshConfig(fsdp=3), 12, devices)
    (names,) = re.findall(r"set one of config.mesh.{(.*)} to -1", str(refused.value))
    for name in names.split(","):  # the advice can be taken
        MeshConfig(**{"data": 1, name: -1}).check("mesh")
    with pytest.raises(ConfigError, match=r"data × fsdp = 8 devices for 12 crops at once"):
        make_placement(MeshConfig(), 12, devices)
    with pytest.raises(
        ConfigError, match=r"config.mesh.model: 8 devices for a/kernel \(4, 12\); .*choose a divisor of 4"
    ):
        divide("a/kernel", (4, 12), sizes(model=8))


def test_a_width_that_does_not_divide_is_refused_by_its_path_before_anything_is_done(tmp_path, monkeypatch):
    def shardings(tree):
        return {path: divide(path, leaf.shape, sizes(model=7)) for path, leaf in paths(tree).items()}

    placement = SimpleNamespace(shardings=shardings)
    monkeypatch.setattr(pretrain, "make_placement", lambda *_: placement)
    with pytest.raises(ConfigError, match=r"config.mesh.model: 7 devices for (decoder|encoder)/"):
        pretrain.pretrain(PretrainConfig(), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_one_device_holds_it_all():
    placement = make_placement(MeshConfig(), 3)
    assert placement.rows(6) == range(6)
    batch = placement.put({"image": np.arange(6.0)})
    assert batch["image"].sharding == placement.by_rows
    assert placement.bytes_per_device({"a": jax.ShapeDtypeStruct((3, 5), np.float32)}) == 60
