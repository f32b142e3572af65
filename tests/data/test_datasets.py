"""Every layout is found, and what is no data set is one clear line."""

import json
import os
from pathlib import Path

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
    (tmp_path / "dataset.json").write_text(json.dumps({"file_ending": ".nii"}))
    said = refused(tmp_path)
    assert "no images named CASE_0000.nii; file_ending in" in said
    assert "dataset.json is '.nii'" in said


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
    touch(tmp_path / "a_seg.nii.gz")
    assert "both a_label.nii.gz and a_seg.nii.gz are labels of a.nii.gz; keep one" in refused(tmp_path)


def test_a_file_system_own_folder_is_passed_over(tmp_path, monkeypatch):
    touch(tmp_path / "a.nii")
    (tmp_path / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name in ("lost+found", "mine"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [case.id for case in datasets.discover(tmp_path)] == ["a"]
    (tmp_path / "mine").mkdir()
    assert "mine: can't be read (Permission denied)" in refused(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path / "scans/x/a.nii.gz", tmp_path / "set/own/b.nii.gz")
    for name, target in (("linked", "scans"), ("set/linked", "scans"), ("set/again", "set/own")):
        (tmp_path / name).symlink_to(tmp_path / target)
    (tmp_path / "scans/x/back").symlink_to(tmp_path / "set")
    cases = datasets.discover(tmp_path / "set")
    assert [case.id for case in cases] == ["linked_x_a", "own_b"]
    assert cases[0].images == (tmp_path / "set/linked/x/a.nii.gz",)
    assert [case.id for case in datasets.discover(tmp_path / "linked")] == ["x_a", "x_back_own_b"]


def test_a_file_name_may_be_any_bytes(tmp_path):
    touch(tmp_path / os.fsdecode(b"a\xff.nii.gz"), tmp_path / "\u00e9.nii.gz")
    odd, plain = datasets.discover(tmp_path)
    assert (odd.id, plain.id) == ("a\\xff", "\u00e9")
    assert odd.images[0].is_file()


def test_several_sources_hold_each_image_once(tmp_path):
    touch(tmp_path / "a/x.nii", tmp_path / "a/deep/y.nii", tmp_path / "b/z.nii")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    found = datasets.discover_all([tmp_path / "b", tmp_path / "a"])
    assert [case.id for case in found] == ["z", "deep_y", "x"]
    for other in ("a", "a/deep", "c"):
        with pytest.raises(
            datasets.DatasetError, match=r"y\.nii: in two sources, .*; name each data set once"
        ):
            datasets.discover_all([tmp_path / "a", tmp_path / "b", tmp_path / other])


def test_what_is_no_data_set(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nothing")
    assert "no .nii or .nii.gz" in refused(tmp_path)
    touch(tmp_path / "store/store.json")
    assert "is a store, expected a data set; name a store alone" in refused(tmp_path / "store")
    touch(tmp_path / "twice/a/b.nii", tmp_path / "twice/a_b.nii")
    assert "case 'a_b' appears 2 times" in refused(tmp_path / "twice")
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
