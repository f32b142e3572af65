"""Phantoms: deterministic, idempotent, labelled, and CTs like any other to the reader."""

import numpy as np
import pytest

from mambamim_jax.data import datasets, nifti, phantom, volume
from tests.full_disk import full_disk


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()
    }


def test_phantoms(tmp_path):
    folder = phantom.write_phantoms(tmp_path / "a", seed=1, count=2)
    before = contents(folder)
    stamps = [path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")]
    assert phantom.write_phantoms(folder, seed=1, count=2) == folder
    assert stamps == [path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")]
    assert contents(phantom.write_phantoms(tmp_path / "b", seed=1, count=2)) == before
    assert contents(phantom.write_phantoms(tmp_path / "b", seed=2, count=2)) != before
    assert [path.name for path in tmp_path.iterdir()] in (["a", "b"], ["b", "a"])

    cases = datasets.discover(folder)
    assert len(cases) == 2
    for case in cases:
        image, label = nifti.read(case.images[0]), nifti.read(case.label, label=True)
        assert volume.same_grid(image, label)
        hu, organ = image.values(), label.values()
        assert hu.min() >= -1024
        typical = {"lung": (-900, -700), "liver": (40, 125), "heart": (40, 280), "bone": (180, 700)}
        for name, (low, high) in typical.items():
            assert low < np.median(hu[organ == phantom.LABELS[name]]) < high, name
        box = volume.foreground_box(volume.resample(image, (1.5, 1.5, 1.5)).voxels, -175.0)
        assert (box[1] - box[0] >= 96).all()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    with full_disk(1000), pytest.raises(datasets.DatasetError, match="ct: disk full; nothing half-written"):
        phantom.write_phantoms(tmp_path / "ct", count=1)
    assert list(tmp_path.iterdir()) == []


def test_other_data_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(datasets.DatasetError, match="something other than phantoms"):
        phantom.write_phantoms(tmp_path)
