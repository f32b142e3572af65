"""The command line of the conversion: both ways, and one line for whatever cannot be converted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from mambamim_jax.convert import flatten, from_official, to_official
from mambamim_jax.official_sizes import sizes_of_official
from mambamim_jax.weight_files import WeightFileError, read_arrays, write_arrays
from tests.test_convert import GOLDENS, assert_equal, golden, random_trees


def launcher():
    spec = importlib.util.spec_from_file_location(
        "launch_convert", GOLDENS.parents[1] / "launch" / "convert.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_launch_script_both_ways(tmp_path, suffix, capsys):
    pytest.importorskip({".safetensors": "safetensors", ".pth": "torch"}.get(suffix, "numpy"))
    official, _ = golden("segment")
    start, ours, end = (tmp_path / f"{name}{suffix}" for name in ("start", "ours", "end"))
    write_arrays(start, official)
    assert launcher()(["--to=ours", str(start), str(ours)]) == 0
    assert "matched" in capsys.readouterr().out
    assert launcher()(["--to=official", "--size=48", str(ours), str(end)]) == 0
    read = {n: np.asarray(a) for n, a in read_arrays(end).items()}
    used = from_official(official).report.matched
    assert_equal({n: read[n] for n in used}, {n: official[n] for n in used})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in (start, ours, end))


def test_a_run_of_ours_becomes_official(tmp_path, capsys):
    ocp = pytest.importorskip("orbax.checkpoint")
    params, stats = random_trees(sizes_of_official(golden("pretrain_paper")[0]))
    for step, factor in ((9, 0.0), (10, 1.0)):
        state = {
            "params": jax.tree.map(lambda a, f=factor: f * a, params),
            "batch_stats": stats,
            "step": step,
        }
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "run" / "checkpoints" / str(step) / "state", state)
    out = tmp_path / "official.npz"
    assert launcher()(["--to=official", "--size=48", str(tmp_path / "run"), str(out)]) == 0
    assert_equal(read_arrays(out), to_official(params, stats, {"size": 48}))
    assert launcher()(["--to=official", str(tmp_path), str(out)]) == 2
    assert "found no checkpoints" in capsys.readouterr().err


def test_launch_script_fails_with_one_line(tmp_path, capsys):
    official, _ = golden("segment")
    del official["embeddings.stem.bias"]
    write_arrays(tmp_path / "in.npz", official)
    arguments = ["--to=ours", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    assert launcher()(arguments) == 2
    assert "1 missing (first embeddings.stem.bias)" in capsys.readouterr().err
    assert launcher()([*arguments, "--partial"]) == 0
    assert launcher()(["--to=ours", str(tmp_path / "none.npz"), str(tmp_path / "out.npz")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(WeightFileError, match=r"damaged.npz: not a readable .npz file"):
        read_arrays(tmp_path / "damaged.npz")
    with pytest.raises(WeightFileError, match=r"expected one of .npz"):
        read_arrays(tmp_path / "weights.h5")


def test_what_is_ours_already_is_told_in_one_line(tmp_path, capsys):
    write_arrays(tmp_path / "in.npz", golden("segment")[0])
    assert launcher()(["--to=ours", str(tmp_path / "in.npz"), str(tmp_path / "ours.npz")]) == 0
    capsys.readouterr()
    assert launcher()(["--to=ours", str(tmp_path / "ours.npz"), str(tmp_path / "again.npz")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "arrays of ours (first params/" in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "again.npz").exists()


@pytest.mark.parametrize("size", ["-5", "0", "17", "8", "1040"])
def test_sizes_that_the_official_network_cannot_have(size, tmp_path, capsys):
    weights = from_official(golden("segment")[0])
    write_arrays(tmp_path / "ours.npz", flatten({"params": weights.params}))
    arguments = ["--to=official", f"--size={size}", str(tmp_path / "ours.npz"), str(tmp_path / "out.npz")]
    assert launcher()(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: size: found {size}, expected voxels a side, divisible by 16, from 16 to 1024"
    )
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (
            "params/encoder/stem/kernel",
            (3,),
            "our weights: found arrays that no HyMamba network has the shapes of",
        ),
        (
            "params/classify/bias",
            (99,),
            "our segment weights: 1 of a wrong shape (first classify/bias: found (99,)",
        ),
        ("params/classify/bias/x", (1,), "params/classify/bias/x: found an array of the name before x, too"),
    ],
)
def test_our_arrays_of_a_wrong_shape_are_refused(name, shape, said, tmp_path, capsys):
    weights = from_official(golden("segment")[0])
    arrays = flatten({"params": weights.params}) | {name: np.zeros(shape, np.float32)}
    write_arrays(tmp_path / "ours.npz", arrays)
    assert launcher()(["--to=official", str(tmp_path / "ours.npz"), str(tmp_path / "out.npz")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out.npz").exists()


def test_torch_files_cannot_run_code(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"module": {"x": Path("harm")}}, tmp_path / "evil.pth")
    with pytest.raises(WeightFileError, match=r"evil.pth: not a readable .pth"):
        read_arrays(tmp_path / "evil.pth")
