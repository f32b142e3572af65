"""Launch scripts: one clear line and the right exit code for whatever is wrong, before any work."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mambamim_jax.data import datasets, store
from mambamim_jax.data.phantom import write_phantoms

ROOT = Path(__file__).parents[1]


def launcher(name):
    source = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def pretrain():
    return launcher("pretrain")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--config: missing"),
        (["--config=configs/pretrain.py:demos"], "did you mean demo?"),
        (["--config=configs/pretrain.py:demo"], "--workdir: missing"),
        (["--config=configs/pretrain.py:demo", "--config.data.crops=1"], "did you mean config.data.crop?"),
        (["--config=configs/pretrain.py:openkbp", "--config.data.source=nowhere"], "an existing folder"),
        (
            ["--config=configs/pretrain.py:demo", "--config.model.scan=pallas_triton"],
            "expected an NVIDIA GPU",
        ),
    ],
)
def test_wrong_settings_end_with_2_before_any_work(pretrain, capsys, tmp_path, arguments, says):
    workdir = [] if says.startswith("--workdir") else [f"--workdir={tmp_path / 'run'}"]
    assert pretrain([*arguments, *workdir]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert not (tmp_path / "run").exists()


def test_help(pretrain, capsys):
    assert pretrain(["--help"]) == 0
    assert "launch/pretrain.py --config=" in capsys.readouterr().out


def test_a_folder_without_volumes_ends_with_2(pretrain, capsys, tmp_path):
    (tmp_path / "data").mkdir()
    arguments = ["--config=configs/pretrain.py:openkbp", f"--workdir={tmp_path / 'run'}"]
    assert pretrain([*arguments, f"--config.data.source={tmp_path / 'data'}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_the_script_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config=nothing.py", "--workdir=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --config: no file nothing.py")
    assert done.stderr.count("\n") == 1


def test_a_store_of_another_spacing_ends_with_one_line(tmp_path):
    """As a process: what a library's threads print while it ends counts too."""
    write_phantoms(tmp_path / "ct", count=2)
    store.prepare(datasets.discover(tmp_path / "ct"), tmp_path / "store", spacing=(6.0, 6.0, 6.0), workers=0)
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config=configs/pretrain.py:demo"]
    command += [f"--config.data.source={tmp_path / 'store'}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert (
        "made with spacing [6.0, 6.0, 6.0] mm, asked for [4.0, 4.0, 4.0]; set --config.data.spacing"
        in done.stderr
    )
    assert done.stderr.count("\n") == 1


def test_the_names_of_options_may_be_part_of_a_path(tmp_path, capsys):
    written, read = tmp_path / "b--source" / "st", tmp_path / "a--store" / "x"
    write_phantoms(read, count=1)
    arguments = ["--config=configs/data.py", "--config.workers=1", "--config.spacing=(6,6,6)"]
    assert launcher("preprocess")([*arguments, f"--source={read}", "--store", str(written)]) == 0
    assert (written / "manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a--store", "b--source"]
    assert str(written / "report") in capsys.readouterr().out.replace("\n", "")
