"""Which cases a store holds: each image once, whatever its name."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mambamim_jax.data import datasets, preprocess, store
from tests.data import ct_files


def test_the_same_image_is_one_volume_whatever_its_case_is_called(tmp_path):
    found = datasets.discover(ct_files.dataset(tmp_path / "ct"))[:2]
    again = [dataclasses.replace(case, id=f"again_{case.id}", label=None) for case in found]
    prepared = store.prepare(found + again, tmp_path / "store", workers=0)
    for opened in (prepared, store.open_store(tmp_path / "store")):
        assert len({entry.digest for entry in opened.entries}) == len(opened) == 2
        assert [line["status"] for line in opened.report].count("duplicate") == 2


def test_a_label_that_is_added_later_is_the_one_that_counts(tmp_path):
    ct_files.write(tmp_path / "ct" / "a.nii", ct_files.body())
    store.prepare(datasets.discover(tmp_path / "ct"), tmp_path / "store", workers=0)
    ct_files.write(tmp_path / "ct" / "a_seg.nii", (ct_files.body() > 0).astype(np.uint8))
    store.prepare(datasets.discover(tmp_path / "ct"), tmp_path / "store", workers=0)
    assert [entry.has_label for entry in store.open_store(tmp_path / "store").entries] == [True]


def test_label_maps_of_an_earlier_recipe_are_made_again_and_nothing_else(tmp_path, monkeypatch):
    ct_files.write(tmp_path / "ct" / "alone.nii", ct_files.body(seed=1))
    ct_files.write(tmp_path / "ct" / "labelled.nii", ct_files.body())
    ct_files.write(tmp_path / "ct" / "labelled_seg.nii", (ct_files.body() > 0).astype(np.uint8))
    cases, folder = datasets.discover(tmp_path / "ct"), tmp_path / "store"
    with monkeypatch.context() as earlier:
        earlier.setattr(preprocess, "RECIPE", 1)
        old = store.prepare(cases, folder, workers=0)
    voxels = np.array(old.image(1))
    np.save(old.path(1, "label"), np.zeros_like(old.label(1)))  # what was wrong with it
    for path in folder.glob("cases/*.json"):
        record = json.loads(path.read_bytes())
        assert record.pop("recipe") == 1
        path.write_bytes(preprocess.dump_json(record))  # as the first recipe left it
    assert len(store.open_store(folder)) == 2  # for what reads no labels
    again = store.prepare(cases, folder, workers=0, old_labels=True)
    assert [entry.folder for entry in again.entries] == [entry.folder for entry in old.entries]
    seen, said = [], []
    options = {"workers": 0, "say": said.append}
    store.prepare(cases, folder, old_labels=True, **options)
    new = store.prepare(cases, folder, progress=lambda *a: seen.append(a), **options)
    assert said == [f"1 label maps of an earlier recipe are {what}" for what in ("kept", "made again")]
    assert seen == [(1, 2, ""), (2, 2, "labelled")]
    assert new.entries[0].folder == old.entries[0].folder
    assert new.entries[1].folder != old.entries[1].folder  # so that a run with the old ones isn't taken up
    assert new.fingerprint == old.fingerprint
    assert [entry.folder for entry in store.open_store(folder).entries] == [e.folder for e in new.entries]
    store.prepare(cases, folder, progress=lambda *a: seen.append(a), **options)
    assert seen[2:] == [(2, 2, "")]
    assert len(said) == 2
    before, after = ({f.name: f for f in Path(s.path(1, "")).iterdir()} for s in (old, new))
    assert before.keys() == after.keys()
    assert all(
        after[name].samefile(file) == (name in ("image.npy", "index.npy")) for name, file in before.items()
    )
    after["image.npy"].write_bytes(b"")  # both are the same
    whole = store.prepare(cases, folder, **options)
    assert np.array_equal(whole.image(1), voxels)


def test_label_maps_of_an_earlier_recipe_in_a_store_that_is_read_only(tmp_path, monkeypatch):
    ct_files.write(tmp_path / "ct" / "a.nii", ct_files.body())
    ct_files.write(tmp_path / "ct" / "a_seg.nii", (ct_files.body() > 0).astype(np.uint8))
    cases, folder, said, real = datasets.discover(tmp_path / "ct"), tmp_path / "store", [], open
    with monkeypatch.context() as earlier:
        earlier.setattr(preprocess, "RECIPE", 1)
        old = store.prepare(cases, folder, workers=0)

    def failing(path, mode="r", *rest, **options):
        if "w" in mode and str(path).startswith(str(folder)):
            raise OSError(errno.EACCES, "Permission denied")
        return real(path, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", failing)
    monkeypatch.setattr(preprocess, "run", lambda job: pytest.fail("begun"))
    assert store.prepare(cases, folder, workers=0, old_labels=True).entries == old.entries
    what = "1 label maps are of an earlier recipe and must be made again"
    advice = r"can't be written \(Permission denied\); name another store \(--config.data.store\)"
    with pytest.raises(store.StoreError, match=f"^{folder}: {what}, but it {advice}"):
        store.prepare(cases, folder, workers=0, say=said.append)
    assert said == []


@pytest.mark.parametrize(
    ("slope", "voxel", "value"), [((1 / 255, 0.0), 255, 1), ((2.0, 0.0), 1, 2), ((1.0, 3.0), 2, 5)]
)
def test_label_values_are_those_that_the_file_means(tmp_path, slope, voxel, value):
    ct_files.write(tmp_path / "ct" / "a.nii", ct_files.body())
    stored = (ct_files.body() > 0).astype(np.uint8) * np.uint8(voxel)
    ct_files.write(tmp_path / "ct" / "a_seg.nii", stored, slope=slope)
    prepared = store.prepare(datasets.discover(tmp_path / "ct"), tmp_path / "store", workers=0)
    assert prepared.volumes[0]["label_values"] == [int(slope[1]), value]
    assert np.unique(prepared.label(0)).tolist() == [int(slope[1]), value]


@pytest.mark.parametrize("how", ["longer", "tilted"])
def test_a_label_comes_out_on_the_grid_of_its_image(tmp_path, how):
    """Its own affine would give it another plane, or count it as tilted, though it lies within half a millimetre."""
    affine, near = np.diag([1.0, 1.1, 2.0, 1.0]), np.diag([1.0, 1.1, 2.002, 1.0])
    if how == "tilted":
        near = affine.copy()
        near[:3, :3] = ct_files.rotation(0.03) @ affine[:3, :3]
    voxels = ct_files.body((40, 37, 197))
    ct_files.write(tmp_path / "ct" / "a.nii", voxels, near)
    ct_files.write(tmp_path / "ct" / "a_seg.nii", (voxels > 0).astype(np.uint8), affine)
    prepared = store.prepare(datasets.discover(tmp_path / "ct"), tmp_path / "store", workers=0)
    assert prepared.report[0]["label_status"] == "ok"
    assert prepared.label(0).shape == prepared.image(0).shape
    assert (prepared.image(0)[:][prepared.label(0)[:] == 1] > -550).mean() > 0.97


@pytest.mark.parametrize("workers", [0, 2])
def test_file_names_that_are_not_utf8(tmp_path, workers):
    for n, name in enumerate((b"a\xff.nii.gz", b"b\xe9.nii.gz")):
        ct_files.write(tmp_path / "x.nii.gz", ct_files.body(seed=n))
        (tmp_path / "ct").mkdir(exist_ok=True)
        (tmp_path / "x.nii.gz").rename(tmp_path / "ct" / os.fsdecode(name))
    cases, seen = datasets.discover(tmp_path / "ct"), []
    store.prepare(cases, tmp_path / "store", workers=workers, progress=lambda *a: seen.append(a[2]))
    assert sorted(seen) == ["a\\xff", "b\\xe9"]
    opened = store.open_store(tmp_path / "store")
    assert [entry.id for entry in opened.entries] == ["a\\xff", "b\\xe9"]
    assert [line["image"] for line in opened.report] == [str(case.images[0]) for case in cases]
    store.prepare(cases, tmp_path / "store", workers=0, progress=lambda *a: seen.append(a[2]))
    assert seen[2:] == [""]  # nothing was done again
