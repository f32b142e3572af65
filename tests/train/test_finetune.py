"""Fine-tuning: the whole run on phantoms, resumed bit for bit; what it starts from; bad input in one line."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest

from mambamim_jax.data import preprocess
from mambamim_jax.data.phantom import write_phantoms
from mambamim_jax.model_files import load_model
from mambamim_jax.settings_finetune import ValidationConfig
from mambamim_jax.train.logs import read_rows
from mambamim_jax.train.optim import paths
from mambamim_jax.train.signals import TRY_AGAIN
from mambamim_jax.train.validation import HeldOut
from mambamim_jax.train.weights import load_start
from mambamim_jax.weight_files import read_arrays
from tests.full_disk import full_disk
from tests.tiny_model import describe, random_params

ROOT = Path(__file__).parents[2]
TINY = {
    "model.encoder": "vision_mamba",
    "model.vision_mamba.channels": "(4,4,4,6,6)",
    "model.vision_mamba.mamba_depth": "4",
    "model.vision_mamba.feature_depths": "(1,2,3,4)",
    "model.vision_mamba.state": "4",
    "model.deep_supervision": "true",
    "data.crop": "(16,16,16)",
    "data.spacing": "(12,12,12)",
    "data.held_out": "0.3",
    "data.workers": "1",
    "steps": "4",
    "ema": "0.9",
    "layer_decay": "0.8",
    "checkpoint.every": "2",
    "validation.every": "2",
    "validation.overlap": "0",
    "log.panel_every": "10",
}


@pytest.fixture(scope="module")
def finetune():
    source = importlib.util.spec_from_file_location("launch_finetune", ROOT / "launch" / "finetune.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("data") / "Dataset900_Phantoms", count=3)


def arguments(workdir, source, **changes):
    keys = (
        TINY | {"data.source": source} | {name.replace("__", "."): value for name, value in changes.items()}
    )
    flags = [f"--config.{name}={value}" for name, value in keys.items()]
    return ["--config=configs/finetune.py:demo", f"--workdir={workdir}", *flags]


class Killed(Exception):
    """Stands for a death of the process."""


@pytest.fixture(scope="module")
def whole(finetune, phantoms, tmp_path_factory):
    """A run, and the same one killed or stopped by a signal within its first validation, and continued."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert finetune(arguments(workdir, phantoms)) == 0
    killed, stopped, measure = workdir.with_name("killed"), workdir.with_name("stopped"), HeldOut.measure

    def die(self, step, state, earlier, check):
        raise Killed

    def stop(self, step, state, earlier, check):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, step, state, earlier, check)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOut, "measure", die)
        with pytest.raises(Killed):
            finetune(arguments(killed, phantoms))
        patch.setattr(HeldOut, "measure", stop)
        assert finetune(arguments(stopped, phantoms)) == TRY_AGAIN
    for folder in (killed, stopped):
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
        assert read_rows(folder / "validation.jsonl") == []
        assert not (folder / "best").exists()
        assert finetune(arguments(folder, phantoms)) == 0
    return workdir, killed, stopped


def test_a_run_goes_on_with_the_label_maps_that_it_began_with(finetune, phantoms, tmp_path, capsys):
    run, again = ({"data__store": tmp_path / "store", "steps": steps} for steps in (2, 4))
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(preprocess, "RECIPE", 1)
        assert finetune(arguments(tmp_path / "run", phantoms, **run)) == 0
    assert "earlier recipe" not in capsys.readouterr().out
    volumes = sorted((tmp_path / "store" / "volumes").iterdir())
    assert finetune(arguments(tmp_path / "run", phantoms, **again)) == 0
    printed = capsys.readouterr().out
    assert "3 label maps of an earlier recipe are kept; the run goes on with them, a new --workdir" in printed
    assert sorted((tmp_path / "store" / "volumes").iterdir()) == volumes
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert finetune(arguments(tmp_path / "new", phantoms, **run)) == 0
    assert "3 label maps of an earlier recipe are made again\n" in capsys.readouterr().out


def test_everything_is_left_in_the_workdir(whole):
    workdir, *_ = whole
    rows = read_rows(workdir / "validation.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    assert len(rows[0]["cases"]) == 1
    assert set(rows[0]["dice"]) >= {"liver", "spleen", "aorta"}
    assert rows[0]["best"]
    best, last = load_model(workdir / "best"), load_model(workdir / "last")
    assert last.description["training"]["steps"] == 4
    assert best.description["training"]["steps"] == max(row["step"] for row in rows if row["best"])
    assert best.description["labels"]["2"] == "liver"
    assert best.description["normalisation"] == [{"kind": "window", "low": -175.0, "high": 250.0}]
    assert "aux" not in best.params
    assert len(list((workdir / "panels").iterdir())) == 1


def test_the_model_folder_holds_the_average(whole):
    workdir, *_ = whole
    saved = {n.removeprefix("params/"): a for n, a in read_arrays(workdir).items() if n.startswith("params/")}
    last = paths(load_model(workdir / "last").params)
    assert set(saved) - set(last) == {f"aux/{n}/{part}" for n in (0, 1) for part in ("kernel", "bias")}
    assert any((last[name] != saved[name]).any() for name in last)
    np.testing.assert_array_equal(last["encoder/mamba/mask_token"], saved["encoder/mamba/mask_token"])


def test_a_run_that_was_killed_or_stopped_ends_as_if_it_had_not_been(whole):
    losses = [[row["loss"] for row in read_rows(folder / "metrics.jsonl")] for folder in whole]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1] == losses[2]
    for name in ("validation.jsonl", "best/model.safetensors", "last/model.safetensors"):
        contents = [(folder / name).read_bytes() for folder in whole]
        assert contents[0] == contents[1] == contents[2], name


def test_another_run_can_start_from_its_model(whole):
    """All of it but the heads of deep supervision."""
    best = paths(load_model(whole[0] / "best").params)
    heads = {f"aux/0/{name}": (6, 13) for name in ("kernel", "bias")}
    loaded, report = load_start(whole[0], {name: leaf.shape for name, leaf in best.items()} | heads)
    assert report.new == list(heads)
    assert loaded.keys() == best.keys()
    assert all((loaded[name] == best[name]).all() for name in best)


def test_a_new_run_in_a_workdir_with_models_leaves_none_of_them_as_its_own(
    finetune, whole, phantoms, tmp_path
):
    """As many steps as the one before, whose checkpoints are gone."""
    workdir = tmp_path / "run"
    for name in ("best", "last"):
        shutil.copytree(whole[0] / name, workdir / name)
    shutil.copytree(whole[0] / "store", workdir / "store")
    assert finetune(arguments(workdir, phantoms, seed=7, model__head_width=3)) == 0
    for name in ("best", "last"):
        assert load_model(workdir / name).description["head_width"] == 3
        kept = workdir / "earlier" / "0" / name / "model.safetensors"
        assert kept.read_bytes() == (whole[0] / name / "model.safetensors").read_bytes()


def held_out(workdir, said):
    """A validation that only writes."""
    return HeldOut(None, None, (32, 32, 32), ValidationConfig(), 1, describe(), workdir, said.append)


def test_the_last_model_is_written_unless_it_is_there(tmp_path):
    params, said = random_params(describe()), []
    held = held_out(tmp_path, said)
    held.finish(3, {"params": params})
    (tmp_path / "last" / "note").touch()
    held.finish(3, {"params": params})
    assert (tmp_path / "last" / "note").exists()
    held.finish(3, {"params": random_params(describe(), seed=5)})  # of another run
    assert not (tmp_path / "last" / "note").exists()
    with full_disk(1000):
        held.finish(4, {"params": params})
    assert load_model(tmp_path / "last").description["training"]["steps"] == 3
    assert [line.partition(" (")[0] for line in said] == [
        f"WARNING: {tmp_path / 'last'}: the model cannot be written"
    ]


def test_a_best_model_that_could_not_be_written_leaves_the_place_to_the_next(tmp_path, monkeypatch):
    case = SimpleNamespace(id="a")
    store = type("Cases", (list,), {"entries": [case]})([case])
    data = SimpleNamespace(table=SimpleNamespace(foreground=["liver"]), held_out=store)
    held = dataclasses.replace(held_out(tmp_path, []), data=data)
    state, rows = {"params": random_params(describe())}, []
    for step, (dice, room) in enumerate([(0.5, True), (0.8, False), (0.7, True), (0.6, True)]):
        monkeypatch.setattr(HeldOut, "_dice", lambda *_, dice=dice: [dice])
        with contextlib.nullcontext() if room else full_disk(1000):
            rows.append(held.measure(step, state, rows))
    assert [row["best"] for row in rows] == [True, False, True, False]
    assert load_model(tmp_path / "best").description["training"]["steps"] == 2


def test_models_of_earlier_runs_are_kept_by_number(tmp_path):
    said = []
    for name in ("best", ".last.before", "best"):  # the second was left by a save killed between its renames
        (tmp_path / name).mkdir()
        held_out(tmp_path, said).begin()
    held_out(tmp_path, said).begin()
    found = {str(path.relative_to(tmp_path / "earlier")) for path in tmp_path.glob("earlier/*/*")}
    assert found == {"0/best", "1/.last.before", "2/best"}
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    assert [line.rpartition("/")[2] for line in said] == ["0", "1", "2"]


# --- what is wrong, in one line, before any training


def spoilt(phantoms, folder, how):
    shutil.copytree(phantoms, folder)
    label = sorted((folder / "labelsTr").iterdir())[0]
    image, path = nibabel.load(label), folder / "dataset.json"
    table, voxels = json.loads(path.read_text()), np.asarray(image.dataobj)
    if how == "label value":
        voxels[0, 0, 0] = 13
        nibabel.save(nibabel.Nifti1Image(voxels, image.affine, image.header), label)
    elif how == "label grid":
        nibabel.save(nibabel.Nifti1Image(voxels[1:], image.affine, image.header), label)
    elif how == "split":
        splits = [{"train": ["phantom_000", "phantom_007"], "val": ["phantom_001"]}]
        (folder / "splits_final.json").write_text(json.dumps(splits))
    elif how == "channels":
        path.write_text(json.dumps(table | {"channel_names": {"0": "T1", "1": "T2"}}))
    return folder


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("label value", "case 'phantom_000': label value 13, dataset.json knows 0 to 12"),
        ("label grid", "phantom_000.nii.gz: grid"),
        ("split", "fold 0 names 1 cases without an image and a label, first 'phantom_007'"),
        ("channels", "case 'phantom_000': 1 channels, expected 2 (T1, T2; dataset.json)"),
        ("names", "config.data.labels: found liver; expected the labels of the data set, lung,"),
        ("init", "does not fit: "),
        (
            "freeze",
            "config.freeze: no part 'encode'; expected a path that begins with one of aux, classify, ",
        ),
        ("freeze all", "which is all of it; expected a part of the network that is left to be trained"),
        ("scan", "config.model.scan: found 'pallas_triton', which does not run here (found platform cpu"),
        ("source", "config.data.source: found a store at"),
        ("several", "expected one data set"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(finetune, whole, phantoms, tmp_path, capsys, how, says):
    source, changes = spoilt(phantoms, tmp_path / "data", how), {}
    if how == "names":
        changes["data__labels"] = "('liver',)"
    elif how == "init":
        changes = {"init": whole[0] / "best", "model__vision_mamba__channels": "(4,4,6,6,6)"}
    elif how == "freeze":
        changes["freeze"] = "('encode',)"
    elif how == "freeze all":
        changes["freeze"] = "('encoder','head','ups','classify','aux')"
    elif how == "scan":
        changes["model__scan"] = "pallas_triton"
    elif how == "source":
        source = whole[0] / "store"
    elif how == "several":
        source = f"{source},{phantoms}"
    assert finetune(arguments(tmp_path / "run", source, **changes)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert says in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert (tmp_path / "run" / "store").exists() == (how == "label value")
