"""Every layout is found, and what is no data set is one clear line."""

import json

import pytest

from mambamim_jax.data import datasets
from tests.data import ct_files


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def refused(source, **options):
    with pytest.raises(datasets.DatasetError) as caught:
        datasets.discover(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nnunet(tmp_path):
    (tmp_path / "dataset.json").write_text(
        json.dumps({"file_ending": ".nii.gz", "channel_names": {"0": "CT"}})
    )
    touch(
        tmp_path / "imagesTr/b_0000.nii.gz",
        tmp_path / "imagesTr/a_0000.nii.gz",
        tmp_path / "imagesTr/a_0001.nii.gz",
    )
    touch(
        tmp_path / "labelsTr/a.nii.gz",
        tmp_path / "imagesTr/.b_0000.nii.gz",
        tmp_path / "imagesTs/c_0000.nii.gz",
    )
    a, b = datasets.discover(tmp_path)
    assert (a.id, b.id) == ("a", "b")
    assert [image.name for image in a.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert a.label == tmp_path / "labelsTr/a.nii.gz"
    assert b.label is None
    (tmp_path / "dataset.json").write_text(json.dumps({"file_ending": ".png"}))
    assert "file_ending '.png'" in refused(tmp_path)


def test_decathlon(tmp_path):
    entries = [
        {"image": "./imagesTr/x.nii.gz", "label": "./labelsTr/x.nii.gz"},
        "other/y.nii",
        {"image": "z/x.nii.gz"},
    ]
    (tmp_path / "set.json").write_text(json.dumps({"training": entries}))
    cases = datasets.discover(tmp_path / "set.json")
    assert [case.id for case in cases] == ["imagesTr_x", "y", "z_x"]
    assert cases[0].label == tmp_path / "labelsTr/x.nii.gz"
    assert cases[1].images == (tmp_path / "other/y.nii",)
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    assert len(datasets.discover(tmp_path)) == 3
    (tmp_path / "set.json").write_text(json.dumps({"training": [{"label": "x"}]}))
    assert "training[0]" in refused(tmp_path / "set.json")


def test_folder(tmp_path):
    touch(
        tmp_path / "a.nii.gz", tmp_path / "a_label.nii.gz", tmp_path / "deep/er/b.nii", tmp_path / "notes.txt"
    )
    touch(tmp_path / "s1/ct.nii.gz", tmp_path / "s1/segmentations/liver.nii.gz", tmp_path / ".hidden/c.nii")
    cases = datasets.discover(tmp_path)
    assert [case.id for case in cases] == ["a", "deep_er_b", "s1_ct"]
    assert cases[0].label == tmp_path / "a_label.nii.gz"


def test_what_is_no_data_set(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nothing")
    assert "no .nii or .nii.gz" in refused(tmp_path)
    assert "format 'zip'" in refused(tmp_path, format="zip")
    touch(tmp_path / "one.nii", tmp_path / "one.nii.gz")
    assert "keep one of them" in refused(tmp_path)
    assert "expected a folder or a Decathlon" in refused(tmp_path / "one.nii")
    (tmp_path / "dataset.json").write_text("{")
    assert "not readable as JSON" in refused(tmp_path)
    (tmp_path / "dataset.json").write_text("{}")
    assert "neither an imagesTr" in refused(tmp_path)
    touch(tmp_path / "sets/D1/dataset.json", tmp_path / "sets/D2/dataset.json")
    assert "several data sets (D1, D2" in refused(tmp_path / "sets")


@ct_files.needs_shared
def test_shared_set():
    cases = datasets.discover(ct_files.SHARED / "Dataset501_OpenKBP")
    assert len(cases) == 120
    assert all(case.label for case in cases)
