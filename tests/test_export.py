"""launch/export.py: what comes out is the same network, for us and for PyTorch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mambamim_jax.convert import flatten, from_official
from mambamim_jax.model_files import load_model, save_model
from mambamim_jax.weight_files import read_arrays
from tests.tiny_model import describe, random_params

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def main():
    source = importlib.util.spec_from_file_location("launch_export", ROOT / "launch" / "export.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fine-tuning workdir."""
    workdir, description = tmp_path_factory.mktemp("runs") / "organs", describe()
    save_model(workdir / "best", description, random_params(description))
    return workdir


def assert_same(a, b) -> None:
    left, right = flatten(a), flatten(b)
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def test_whole_and_encoder_as_model_folders(main, run, tmp_path, capsys):
    best = load_model(run)
    assert main([str(run), str(tmp_path / "whole")]) == 0
    whole = load_model(tmp_path / "whole")
    assert_same(whole.params, best.params)
    assert whole.description == best.description
    assert main(["--part=encoder", str(run), str(tmp_path / "encoder")]) == 0
    encoder = load_model(tmp_path / "encoder")
    assert_same(encoder.params, best.params["encoder"])
    assert encoder.description["task"] == "encoder"
    assert "part of a segment network" in (tmp_path / "encoder" / "README.md").read_text()
    assert main([str(run), str(tmp_path / "whole")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["whole", "encoder"])
def test_the_authors_names_and_back(main, run, tmp_path, part):
    best = load_model(run)
    assert main([f"--part={part}", str(run), str(tmp_path / "out.safetensors")]) == 0
    arrays = read_arrays(tmp_path / "out.safetensors")
    assert any(name.startswith("decoder.") for name in arrays) == (part == "whole")
    position = next(array for name, array in arrays.items() if name.endswith("mae.pos_embed"))
    assert position.shape[1] == 2**3  # of 32³ crops
    back = from_official(arrays)
    assert back.report.ok
    expected = flatten(best.params if part == "whole" else best.params["encoder"])
    found = flatten(back.params)
    for name, array in expected.items():
        if not (part == "whole" and name.endswith("mask_token")):  # which a segmenter never reads
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_what_cannot_be_exported_is_one_line(main, run, tmp_path, capsys):
    def refused(given, says):
        assert main([str(part) for part in given]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert says in err

    refused([tmp_path / "gone", tmp_path / "out"], "no such folder")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    refused([tmp_path / "empty", tmp_path / "out"], "found no checkpoints in it")
    own = {"channels": (4, 4, 4, 6, 6), "mamba_depth": 4, "feature_depths": (1, 2, 3, 4), "state": 2}
    description = describe(encoder="vision_mamba", encoder_config=own)
    save_model(tmp_path / "other", description, random_params(description))
    refused([tmp_path / "other", tmp_path / "out.pth"], "only hymamba has an official form")
    wide = describe(head_width=8)
    save_model(tmp_path / "wide", wide, random_params(wide))
    refused(
        [tmp_path / "wide", tmp_path / "out.pth"],
        "head_width 8; the authors' network has that of the stem, 4",
    )
    assert not (tmp_path / "out.pth").exists()
