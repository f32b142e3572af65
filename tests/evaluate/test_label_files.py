"""Files of predictions: whole or not at all, and on a full disk an error in place of a process that dies."""

from __future__ import annotations

import errno
import os

import nibabel
import numpy as np
import pytest

from mambamim_jax.evaluate import label_files
from mambamim_jax.evaluate.label_files import probability_file
from mambamim_jax.evaluate.painter import SCALE

SHAPE = (7, 5, 6)


@pytest.fixture
def like(tmp_path):
    path = tmp_path / "scans" / "a.nii.gz"
    path.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.diag([2.0, 2, 3, 1])), path)
    return path


def lacking(number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("answer", [None, errno.EOPNOTSUPP, errno.EINVAL, "missing"])
def test_probabilities_are_written_on_any_file_system(like, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(label_files, "PIECE", 100)
    if answer == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    elif answer:
        monkeypatch.setattr(os, "posix_fallocate", lacking(answer))
    sizes, real = [], np.memmap

    def mapped(path, *rest, **options):
        sizes.append(path.stat().st_size)
        return real(path, *rest, **options)

    monkeypatch.setattr(np, "memmap", mapped)
    with probability_file(like, tmp_path / "p.nii", 3) as kept:
        assert kept.shape == (3, 6, 5, 7)
        assert sizes == [352 + kept.nbytes]  # written before it is mapped
        kept[1, 2, 3, 4] = SCALE
    image = nibabel.load(tmp_path / "p.nii")
    assert image.shape == (*SHAPE, 3)
    assert np.argwhere(image.get_fdata()).tolist() == [[4, 3, 2, 1]]


def test_no_room_is_an_error_before_the_work(like, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lacking(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"), probability_file(like, tmp_path / "p.nii", 3):
        raise AssertionError("never handed out")
    assert [path.name for path in tmp_path.iterdir()] == ["scans"]
