"""The report on a set: figures, outliers by name, a page; and the preprocessing command that writes it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mambamim_jax.data import datasets, fingerprint, store
from tests.data import ct_files


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = ct_files.dataset(tmp_path_factory.mktemp("source"), 9)
    metal = ct_files.body((26, 22, 15), seed=50)
    metal[10:12, 10:12, 5:8] = 20000
    ct_files.write(folder / "metal.nii.gz", metal)
    ct_files.write(
        folder / "thick.nii.gz", ct_files.body(seed=51), ct_files.affine_of("LPS", (2.0, 2.0, 8.0))
    )
    return folder


def test_outliers_are_named(source, tmp_path):
    (source / "cut.nii.gz").write_bytes((source / "metal.nii.gz").read_bytes()[:-20])
    prepared = store.prepare(datasets.discover(source), tmp_path / "store", workers=1)
    (source / "cut.nii.gz").unlink()
    figures = fingerprint.write(prepared, tmp_path / "report")
    assert json.loads((tmp_path / "report/fingerprint.json").read_text()) == figures
    assert (tmp_path / "report/fingerprint.png").read_bytes().startswith(b"\x89PNG")
    named = {(line["id"], line["measure"]) for line in figures["outliers"]}
    assert ("metal", "highest HU") in named
    assert ("thick", "source slice spacing, mm") in named
    assert {name for name, _ in named} <= {"metal", "thick"}
    assert figures["outliers"][0]["id"] == "metal"
    assert figures["skipped"] == {"truncated": ["cut"]}
    assert figures["volumes"] == 11
    assert figures["orientations"] == {"LPS": 11}
    assert figures["measures"]["source slice spacing, mm"]["median"] == 3.0
    assert np.isclose(sum(figures["histogram"]["share"]), 1.0, atol=1e-3)


def preprocess(*arguments):
    command = [sys.executable, "launch/preprocess.py", "--config=configs/data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ct_files.REPO, capture_output=True, text=True, timeout=120)


def test_command(source, tmp_path):
    done = preprocess(f"--source={source}", f"--store={tmp_path / 'store'}", "--config.workers=1")
    assert done.returncode == 0, done.stderr
    assert "11 of 11 volumes usable" in done.stdout
    assert len((tmp_path / "store/report/data_report.jsonl").read_text().splitlines()) == 11
    assert (tmp_path / "store/report/fingerprint.png").exists()
    for arguments, words in (
        ([f"--store={tmp_path / 'x'}"], "config.source"),
        ([f"--source={tmp_path / 'nothing'}", f"--store={tmp_path / 'x'}"], "no such file or folder"),
        (
            [f"--source={source}", f"--store={tmp_path / 'store'}", "--config.spacing=(2,2,2)"],
            "made with spacing",
        ),
    ):
        failed = preprocess(*arguments)
        assert failed.returncode == 2
        assert len(failed.stderr.strip().splitlines()) == 1
        assert words in failed.stderr
