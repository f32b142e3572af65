"""Model folders: what was saved comes back, and what does not fit is one line."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mambamim_jax.model_files import CONFIG, WEIGHTS, ModelFileError, find_model, flat, load_model, save_model
from mambamim_jax.weight_files import WeightFileError, write_arrays

from .full_disk import full_disk
from .tiny_model import describe, random_params


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "best"
    description = describe()
    params = random_params(description)
    return save_model(folder, description, params), description, params


def test_what_was_saved_comes_back(saved):
    folder, description, params = saved
    model = load_model(folder)
    assert model.path == folder
    expected, found = flat(params), flat(model.params)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert {key: model.description[key] for key in ("task", "labels", "classes")} == {
        "task": "segment", "labels": description["labels"], "classes": 3,
    }  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    shapes = jax.eval_shape(model.apply, model.params, np.zeros((2, 16, 32, 16, 1), np.float32))
    assert (shapes.shape, shapes.dtype.name) == ((2, 16, 32, 16, 3), "float32")


def test_the_card_says_what_goes_in_and_out(saved):
    card = (saved[0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mambamim_jax\n")
    for text in ("-175 to 250", "| 2 | lungs |", "3 × 3 × 3 mm", "launch/predict.py --model=FOLDER"):
        assert text in card


def test_a_second_save_replaces_the_first_and_leaves_nothing_beside(saved, tmp_path):
    _, description, params = saved
    folder = tmp_path / "best"
    save_model(folder, description, params)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    save_model(folder, {**description, "results": {"Dice": 0.5}}, doubled)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert load_model(tmp_path).description["results"] == {"Dice": 0.5}
    name, array = next(iter(load_file(folder / WEIGHTS).items()))
    np.testing.assert_array_equal(array, flat({"params": doubled})[name])


def test_a_save_killed_between_its_renames_leaves_the_one_before(saved, tmp_path):
    _, description, params = saved
    save_model(tmp_path / "best", description, params)
    (tmp_path / "best").rename(tmp_path / ".best.before")
    assert find_model(tmp_path) == tmp_path / ".best.before"


def test_a_full_disk_is_one_line_and_leaves_the_model_before_alone(saved, tmp_path):
    _, description, params = saved
    folder = save_model(tmp_path / "best", description, params)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with full_disk(1000), pytest.raises(ModelFileError, match="best: the model cannot be written") as error:
        save_model(folder, description, params)
    assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_of_weights_on_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, suffix):
    arrays, path = {"a": np.zeros(1000, np.float32)}, tmp_path / f"weights{suffix}"
    with (
        full_disk(1000),
        pytest.raises(WeightFileError, match=r"cannot be written .*File too large") as error,
    ):
        write_arrays(path, arrays)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["encoder", "pretrain"])
def test_other_networks(task, tmp_path):
    description = {**describe(task=task), "filler": "toki", "decoder_width": 16}
    params, stats = random_params(description), random_params(description, stats=True)
    model = load_model(save_model(tmp_path / "model", description, params, stats))
    assert flat(model.batch_stats).keys() == flat(stats).keys()
    if task == "encoder":
        maps = jax.eval_shape(model.apply, model.params, np.zeros((1, 16, 16, 16, 1), np.float32))
        assert [m.shape[1] for m in maps] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": 4}, "classes: found 4, expected 3, one per label"),
        ({"in_channels": 2}, "normalisation: found"),
        ({"encoder": "resnet"}, "encoder: found 'resnet', expected one of"),
        ({"task": "classify"}, "task: found 'classify'"),
        ({"head_width": 8}, "of a wrong shape (first params/classify/kernel: found (4, 3), expected (8, 3))"),
        ({"encoder_config": {"depth": 1}}, "no network can be built from it"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(saved, tmp_path, change, says):
    _, description, params = saved
    with pytest.raises(ModelFileError) as error:
        save_model(tmp_path / "model", {**description, **change}, params)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_damage_and_absence_are_one_line(saved, tmp_path):
    def refuses(path, says):
        with pytest.raises(ModelFileError) as error:
            load_model(path)
        assert says in str(error.value)
        assert "\n" not in str(error.value)

    refuses(tmp_path / "nowhere", "no such folder; expected a model folder")
    (tmp_path / "checkpoints").mkdir()
    refuses(tmp_path, "launch/export.py")
    copy = tmp_path / "copy"
    shutil.copytree(saved[0], copy)
    weights = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    refuses(copy, "not a readable .safetensors file")
    config = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps(config | {"format_version": 99}))
    refuses(copy, "format_version 99")
    (copy / CONFIG).write_text("{")
    refuses(copy, "not readable as JSON")
