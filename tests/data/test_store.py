"""The store: prepared once, resumable, the same bytes whatever happened on the way."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from mambamim_jax.data import datasets, nifti, preprocess, store, volume
from tests.data import ct_files


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = ct_files.dataset(tmp_path_factory.mktemp("source"))
    label = (ct_files.body((22, 22, 15), seed=1) > 0).astype(np.uint8) * 7
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(label, ct_files.affine_of("LPS")))
    ct_files.write(folder / "case_1_label.nii.gz", np.asarray(turned.dataobj), turned.affine)
    ct_files.write(folder / "case_2_label.nii.gz", label)  # case_2 has another size
    shutil.copy(folder / "case_3.nii.gz", folder / "twin.nii.gz")
    ct_files.write(folder / "uncompressed.nii", ct_files.body((28, 22, 18), seed=4))
    (folder / "broken.nii.gz").write_bytes((folder / "case_0.nii.gz").read_bytes()[:-20])
    return folder


def test_prepare(source, tmp_path):
    cases = datasets.discover(source)
    seen = []
    report = tmp_path / "work" / "data_report.jsonl"
    options = {"report_path": report, "max_lost": 0.2, "workers": 1}
    prepared = store.prepare(cases, tmp_path / "store", progress=lambda *a: seen.append(a), **options)
    lines = {line["id"]: line for line in map(json.loads, report.read_text().splitlines())}
    assert list(lines) == [case.id for case in cases]
    assert [n for n, line in lines.items() if line["status"] == "used"] == [f"case_{n}" for n in range(5)]
    assert lines["broken"]["code"] == "truncated"
    assert "broken.nii.gz" in lines["broken"]["message"]
    assert lines["twin"]["code"] == lines["uncompressed"]["code"] == "duplicate"
    assert lines["case_1"]["label_status"] == "ok"
    assert "label_grid" in lines["case_2"]["label_status"]
    assert seen[-1][:2] == (len(cases), len(cases))
    assert "5 of 8 volumes usable, 1 with labels" in prepared.summary
    assert "1 skipped: truncated" in prepared.summary

    read = nifti.read(source / "case_1.nii.gz")
    expected = volume.resample(read, (1.5, 1.5, 1.5))
    np.testing.assert_allclose(prepared.image(1), expected.voxels, atol=0.51)
    assert prepared.image(1).dtype == np.int16
    meta = prepared.meta(1)
    np.testing.assert_allclose(meta["affine"], expected.affine)
    assert meta["source_orientation"] == "LPS"
    # the label was stored in another orientation: soft tissue must still be where it says
    label = prepared.label(1)
    assert label.shape == prepared.image(1).shape
    assert set(np.unique(label)) == {0, 7}
    inside = prepared.image(1)[label == 7]
    assert (inside > -550).mean() > 0.95
    box, counts = prepared.foreground(1, -175.0)
    assert np.array_equal(box, volume.foreground_box(prepared.image(1), -175.0))
    other_box, other = prepared.foreground(1, -900.0)
    assert other.sum() > counts.sum()
    assert np.array_equal(other_box, volume.foreground_box(prepared.image(1), -900.0))


def test_same_bytes_whatever_the_way(source, tmp_path):
    cases = datasets.discover(source)
    whole = store.prepare(cases, tmp_path / "a", max_lost=0.2, workers=1)
    before = contents(tmp_path / "a")
    stamps = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file() and p.name != ".lock"
    }
    again = store.prepare(cases, tmp_path / "a", max_lost=0.2, workers=1)
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert again.fingerprint == whole.fingerprint == store.open_store(tmp_path / "a").fingerprint
    # in two worker processes, data added later, and what a killed run leaves lying about
    store.prepare(cases[1:3], tmp_path / "b", workers=1)
    (tmp_path / "b/volumes/.partial-1-x").mkdir()
    (tmp_path / "b/cases/.partial-1-y").touch()
    shutil.rmtree(next((tmp_path / "b/volumes").glob("case_1*")))
    store.prepare(cases, tmp_path / "b", max_lost=0.2, workers=2)
    assert contents(tmp_path / "b") == before
    part = store.prepare(cases[1:3], tmp_path / "b", workers=1)
    assert [entry.id for entry in part.entries] == ["case_0", "case_1"]
    assert contents(tmp_path / "b") == before


def test_changed_source_is_done_again(tmp_path):
    folder = ct_files.dataset(tmp_path / "source", 2)
    cases = datasets.discover(folder)
    old = store.prepare(cases, tmp_path / "store", workers=1)
    ct_files.write(folder / "case_0.nii.gz", ct_files.body((20, 22, 14), seed=99))
    new = store.prepare(cases, tmp_path / "store", workers=1)
    assert old.fingerprint != new.fingerprint
    assert not np.array_equal(old.image(0), new.image(0))
    assert len(store.open_store(tmp_path / "store")) == 2


KILLED = """
import sys
from mambamim_jax.data import datasets, store
store.prepare(datasets.discover(sys.argv[1]), sys.argv[2], max_lost=0.2, workers=int(sys.argv[3]))
"""


def test_killed_at_random_moments(source, tmp_path):
    """MAMBAMIM_KILLS sets how often (4 by default), MAMBAMIM_SOURCE on which data, MAMBAMIM_KILL_SEED when."""
    kills = int(os.environ.get("MAMBAMIM_KILLS", "4"))
    source = Path(os.environ.get("MAMBAMIM_SOURCE", source))
    rng = np.random.default_rng(int(os.environ.get("MAMBAMIM_KILL_SEED", "0")))
    command = [sys.executable, "-c", KILLED, str(source)]
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), "1"], cwd=ct_files.REPO, check=True)
    usual = time.monotonic() - began
    expected, done = contents(tmp_path / "whole"), 0
    while done < kills:
        folder = tmp_path / f"killed{done}"
        while not (folder / "manifest.json").exists() and done < kills:
            process = subprocess.Popen([*command, str(folder), str(1 + done % 2)], cwd=ct_files.REPO)
            try:
                process.wait(rng.uniform(0, usual))
            except subprocess.TimeoutExpired:
                process.kill()
                done += 1
            process.wait()
        store.prepare(datasets.discover(source), folder, max_lost=0.2, workers=1)
        assert contents(folder) == expected
        shutil.rmtree(folder)


def test_losses_stop_the_run(source, tmp_path):
    cases = datasets.discover(source)
    with pytest.raises(store.DataLossError, match="1 of 8 volumes refused, more than max_lost") as caught:
        store.prepare(cases, tmp_path / "a", workers=1, report_path=tmp_path / "r.jsonl")
    assert "truncated" in str(caught.value)
    assert (tmp_path / "r.jsonl").exists()
    broken = [case for case in cases if case.id == "broken"]
    with pytest.raises(store.DataLossError, match="none of 1 volumes"):
        store.prepare(broken, tmp_path / "b", workers=1, max_lost=1.0)


def test_channels_that_do_not_fit_have_a_reason(tmp_path):
    images = [
        ct_files.write(tmp_path / f"x_000{n}.nii.gz", ct_files.body((20 + n, 20, 16))) for n in range(2)
    ]
    case = datasets.Case("x", tuple(images), None, "made up")
    for code, options in (("several_channels", {}), ("channel_grid", {"intensity": "zscore"})):
        with pytest.raises(store.DataLossError, match=rf"none of 1 volumes .* \[{code}\]"):
            store.prepare([case], tmp_path / code, workers=1, **options)


def test_wrong_folders_are_one_line(source, tmp_path):
    cases = datasets.discover(source)[1:2]
    store.prepare(cases, tmp_path / "a", workers=1)
    with pytest.raises(store.StoreError, match=r"made with spacing .* use another store folder"):
        store.prepare(cases, tmp_path / "a", workers=1, spacing=(2.0, 2.0, 2.0))
    before = contents(source)
    with pytest.raises(store.StoreError, match="not a store, and not empty"):
        store.prepare(cases, source, workers=1)
    assert contents(source) == before
    with pytest.raises(store.StoreError, match="not a finished store"):
        store.open_store(source)
    assert store.is_store(tmp_path / "a")
    assert not store.is_store(source)
    assert len(store.open_or_prepare(tmp_path / "a", tmp_path / "unused")) == 1
    assert len(store.open_or_prepare(source, tmp_path / "c", max_lost=0.2, workers=1)) == 5


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk full"), (errno.EROFS, "can't be written"), (errno.EACCES, "can't be")],
)
@pytest.mark.parametrize("call", [1, 2, 5])
def test_a_store_that_can_not_be_written(source, tmp_path, monkeypatch, code, words, call):
    cases = datasets.discover(source)[1:3]
    real, count = os.fsync, 0

    def failing(descriptor):
        nonlocal count
        count += 1
        if count >= call:
            raise OSError(code, os.strerror(code))
        return real(descriptor)

    monkeypatch.setattr(preprocess.os, "fsync", failing)
    with pytest.raises(store.StoreError, match=words):
        store.prepare(cases, tmp_path / "store", workers=1)
    assert not list((tmp_path / "store").rglob(f"{preprocess.TEMPORARY}*"))
    monkeypatch.setattr(preprocess.os, "fsync", real)
    store.prepare(cases, tmp_path / "store", workers=1)
    store.prepare(cases, tmp_path / "fresh", workers=1)
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


FULL = """
import resource, sys
from mambamim_jax.data import datasets, store
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # no file may grow beyond: what a full disk is like
try:
    store.prepare(datasets.discover(sys.argv[1]), sys.argv[2], workers=int(sys.argv[3]))
except store.StoreError as error:
    print(error)
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_is_really_full(source, tmp_path, workers):
    command = [sys.executable, "-c", FULL, str(source), str(tmp_path / "store"), workers]
    done = subprocess.run(command, cwd=ct_files.REPO, capture_output=True, text=True, timeout=60)
    assert "disk full; nothing half-written is left" in done.stdout, done.stderr
    left = [path.name for path in (tmp_path / "store/volumes").rglob("*")]
    assert not [name for name in left if name.startswith(preprocess.TEMPORARY)]


def test_a_complete_store_may_be_read_only(source, tmp_path, monkeypatch):
    cases = datasets.discover(source)[1:3]
    whole = store.prepare(cases, tmp_path / "store", workers=1)
    real = open

    def failing(path, mode="r", *rest, **options):
        if "w" in mode and str(path).startswith(str(tmp_path / "store")):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, mode, *rest, **options)

    monkeypatch.setattr("builtins.open", failing)
    again = store.prepare(cases, tmp_path / "store", workers=1, report_path=tmp_path / "report.jsonl")
    assert again.fingerprint == whole.fingerprint
    with pytest.raises(store.StoreError, match="can't be written"):
        store.prepare(datasets.discover(source)[1:4], tmp_path / "store", workers=1)


def test_a_dead_worker_is_a_reason(source, tmp_path, monkeypatch):
    from mambamim_jax.data import worker

    monkeypatch.setattr(worker, "_ask", lambda process, job: process.kill())
    cases = datasets.discover(source)[1:4]
    with pytest.raises(store.DataLossError, match="worker_died"):
        store.prepare(cases, tmp_path / "store", workers=2)
    monkeypatch.undo()
    assert len(store.prepare(cases, tmp_path / "store", workers=2)) == 3


@pytest.mark.skipif(
    "MAMBAMIM_SOURCE" not in os.environ, reason="needs a labelled set: MAMBAMIM_SOURCE=FOLDER"
)
def test_organ_volumes_of_a_folder(tmp_path):
    """Every organ of a real set that lies whole in its scan comes out within 1% of its volume in the file."""
    cases = [case for case in datasets.discover(os.environ["MAMBAMIM_SOURCE"]) if case.label]
    prepared = store.prepare(cases, tmp_path / "store", max_lost=1.0)
    stored = {case.id: nifti.read(case.label, label=True) for case in cases}
    errors, nearest = {}, []
    for n, entry in enumerate(prepared.entries):
        label = stored[entry.id]
        voxel = abs(np.linalg.det(label.affine[:3, :3])) / 1.5**3
        alone = volume.resample(label, (1.5, 1.5, 1.5), label=True, dtype=np.uint16).voxels
        kept = np.asarray(prepared.label(n)[:])
        ends = [np.unique(np.take(label.voxels, end, axis)) for axis in range(3) for end in (0, -1)]
        for value in np.setdiff1d(label.voxels, [0, *np.concatenate(ends)]):
            expected = (label.voxels == value).sum() * voxel
            errors[entry.id, int(value)] = abs((kept == value).sum() / expected - 1)
            nearest.append(abs((alone == value).sum() / expected - 1))
    print(f"{len(errors)} organs of {len(prepared)} volumes, the worst {max(errors.values()):.2%} off")
    print(f"by the nearest voxel alone {max(nearest):.2%}")
    assert errors
    assert max(errors.values()) < 0.01, max(errors, key=errors.__getitem__)


def test_preprocessing_of_a_large_volume_equals_scipy(tmp_path):
    """Geometry, values and labels at random voxels; MAMBAMIM_SHAPE=512x512x600 for one as large as they come."""
    shape = tuple(map(int, os.environ.get("MAMBAMIM_SHAPE", "96x96x80").split("x")))
    rng = np.random.default_rng(0)
    coarse = rng.normal(0, 400, [n // 8 + 2 for n in shape]).astype(np.float32)
    hu = ndimage.zoom(coarse, 8, order=1)[tuple(map(slice, shape))].clip(-1000, 2000).astype(np.int16)
    hu[: shape[0] // 10] = -1000
    label, grid = np.zeros(shape, np.uint8), np.ogrid[tuple(map(slice, shape))]
    for value, (place, radius) in enumerate(((0.3, 0.2), (0.6, 0.1), (0.8, 0.06)), 1):
        inside = sum((axis / n - place) ** 2 for axis, n in zip(grid, shape)) <= radius**2
        label[inside] = value
    affine = np.diag([-0.8, -0.8, 1.0, 1.0])
    affine[:3, 3] = 200, 180, -300
    for name, voxels in (("ct", hu), ("ct_label", label)):
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / f"{name}.nii.gz")
    prepared = store.prepare(datasets.discover(tmp_path), tmp_path / "store", workers=0)
    stored, kept = prepared.image(0), prepared.label(0)
    points = np.stack([rng.integers(0, n, 100_000) for n in stored.shape])
    to_source = np.linalg.inv(affine) @ np.array(prepared.meta(0)["affine"])
    where = to_source[:3, :3] @ points + to_source[:3, 3:]
    expected = ndimage.map_coordinates(hu.astype(np.float32), where, order=1, mode="nearest")
    assert np.abs(expected - stored[tuple(points)]).max() < 0.51  # stored as whole HU
    nearest = ndimage.map_coordinates(label, where, order=0, mode="nearest")
    clear = (np.abs(where - np.floor(where) - 0.5) > 1e-3).all(0)  # halfway between two voxels either will do
    assert np.mean((nearest != kept[tuple(points)])[clear]) < 1e-3
    for value in (1, 2, 3):
        assert (kept == value).sum() * 1.5**3 == pytest.approx((label == value).sum() * 0.64, rel=0.01)


def test_a_store_from_before_says_how_its_labels_were_made(source, tmp_path):
    """Its store.json had no entry for labels, which were then the nearest voxel's alone."""
    cases = datasets.discover(source)[:2]
    options = {"max_lost": 1.0, "workers": 0}
    store.prepare(cases, tmp_path, labels="nearest", **options)
    spec = json.loads((tmp_path / "store.json").read_bytes())
    assert spec.pop("labels") == "nearest"
    assert spec.pop("intensity") == "hu"
    (tmp_path / "store.json").write_text(json.dumps(spec))
    with pytest.raises(store.StoreError, match="made with labels nearest, asked for volume"):
        store.prepare(cases, tmp_path, **options)
    assert len(store.prepare(cases, tmp_path, labels="nearest", **options)) > 0
