"""The whole chain through the launch scripts, on four phantoms: every link takes what the one before wrote."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest

from mambamim_jax.data.phantom import write_phantoms
from mambamim_jax.model_files import load_model

ROOT = Path(__file__).parents[1]
NETWORK = {"channels": "(4,4,4,6,6)", "mamba_depth": "4", "feature_depths": "(1,2,3,4)", "state": "2"}
DATA = {"crop": "(16,16,16)", "spacing": "(12,12,12)", "workers": "1"}


def launch(name: str, *arguments: object) -> int:
    source = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def settings(**given: object) -> list[str]:
    keys = {"model.encoder": "vision_mamba"} | {
        f"model.vision_mamba.{n}": value for n, value in NETWORK.items()
    }
    keys |= {f"data.{name}": value for name, value in DATA.items()}
    keys |= {"epochs": 0, "steps": 2, "log.panel_every": 9, "checkpoint.every": 2}
    return [f"--config.{name.replace('__', '.')}={value}" for name, value in (keys | given).items()]


def labels_of(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


@pytest.fixture
def compiled_quickly():
    """Without XLA's optimisations, which take minutes here."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_quickly")
def test_pretrain_finetune_predict_evaluate_export_predict(tmp_path):
    source = write_phantoms(tmp_path / "Dataset900_Phantoms", count=4)
    ct, organs, labels = tmp_path / "ct", tmp_path / "organs", source / "labelsTr"
    common = settings(data__source=source)
    pretraining = ["--config=configs/pretrain.py:demo", f"--workdir={ct}", *common]
    masking = [
        "--config.data.crop=(32,16,16)",
        "--config.model.mask_ratio=0.5",
        "--config.model.decoder_width=16",
    ]
    assert launch("pretrain", *pretraining, *masking) == 0
    assert launch("export", "--part=encoder", ct, tmp_path / "encoder") == 0

    tuning = [f"--workdir={organs}", f"--config.init={tmp_path / 'encoder'}", "--config.data.held_out=0.25"]
    tuning += ["--config.validation.every=2", "--config.validation.overlap=0"]
    assert launch("finetune", "--config=configs/finetune.py:demo", *tuning, *common) == 0

    images = f"--input={source / 'imagesTr'}"
    assert (
        launch("predict", f"--model={organs}", images, f"--output={tmp_path / 'first'}", "--overlap=0.25")
        == 0
    )
    first = labels_of(tmp_path / "first")
    assert len(first) == 4
    scores = [
        f"--predictions={tmp_path / 'first'}",
        f"--labels={labels}",
        f"--output={tmp_path / 'scores'}",
        "--workers=1",
    ]
    assert launch("evaluate", *scores) == 0
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["cases"] == 4
    known = set(load_model(organs).description["labels"].values()) - {"background"}
    assert set(summary["scores"]) == known | {"mean over classes"}

    assert launch("export", organs, tmp_path / "model") == 0
    again = [f"--model={tmp_path / 'model'}", images, f"--output={tmp_path / 'second'}", "--overlap=0.25"]
    assert launch("predict", *again) == 0
    second = labels_of(tmp_path / "second")
    assert first.keys() == second.keys()
    for name, voxels in first.items():
        np.testing.assert_array_equal(second[name], voxels)
