"""Which cases a store holds: each image once, whatever its name."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest

from mambamim_jax.data import datasets, store
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
