"""What the folder of predictions says of them is true, also where a run was killed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from mambamim_jax.evaluate import predict as prediction
from mambamim_jax.evaluate.inputs import InputError
from mambamim_jax.evaluate.label_files import partial_of, write_text
from mambamim_jax.evaluate.output import RECORD, Output, check_apart
from mambamim_jax.evaluate.predict import Options
from mambamim_jax.model_files import WEIGHTS
from tests.test_predict import scan, threshold_model

ONE, OTHER = {"models": ["one"], "overlap": 0.5}, {"models": ["other"], "overlap": 0.5}


class Killed(BaseException):
    pass


def run(folder: Path, settings: dict, cases: str, overwrite: bool = False, soft: bool = False) -> list[str]:
    """Predicts cases, a letter each: files that hold the name of the model."""
    folder.mkdir(exist_ok=True)
    output = Output(folder, settings, soft)
    todo = output.begin(cases, overwrite)
    for case in todo:
        for path in [output.probabilities_of(case)] * soft + [output.labels_of(case)]:
            write_text(path, settings["models"][0])
        output.finish(case)
    return todo


def said(folder: Path) -> dict[str, str | None]:
    """The model that the record names for each case there; None for one that is to be made again."""
    record = json.loads((folder / RECORD).read_text())
    there = {path.name.removesuffix(".nii.gz") for path in folder.glob("[!.]*.nii.gz")}
    named: dict[str, str | None] = dict.fromkeys(there, record["models"][0])
    for group in record.get("earlier", []):
        named |= dict.fromkeys(group["cases"], group.get("models", [None])[0])
    return named | dict.fromkeys(record.get("unfinished", []))


def is_true(folder: Path) -> bool:
    return all(
        model in (None, path.read_text())
        for case, model in said(folder).items()
        for path in folder.glob(f"[!.]*{case}[._]*")
    )


def test_a_part_predicted_by_another_model_does_not_count_for_all(tmp_path):
    assert run(tmp_path, ONE, "abc") == ["a", "b", "c"]
    with pytest.raises(
        InputError, match="were made with other models; choose another --output, or --overwrite"
    ):
        run(tmp_path, OTHER, "a")
    assert run(tmp_path, OTHER, "a", overwrite=True) == ["a"]
    assert said(tmp_path) == {"a": "other", "b": "one", "c": "one"}
    assert is_true(tmp_path)
    assert run(tmp_path, OTHER, "ad") == ["d"]
    with pytest.raises(InputError, match=r"2 of the cases there were made in another way \(b, c\)"):
        run(tmp_path, OTHER, "abcd")
    assert run(tmp_path, ONE, "ad", overwrite=True) == ["a", "d"]
    assert said(tmp_path) == dict.fromkeys("abcd", "one")
    assert run(tmp_path, ONE, "abcd") == []


def test_a_run_killed_at_any_moment_leaves_a_true_record_and_can_go_on(tmp_path, monkeypatch):
    """Every change of a file's name or existence is a moment."""
    left = [0]

    def mortal(change):
        def changed(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(*arguments, **options)

        return changed

    monkeypatch.setattr(os, "replace", mortal(os.replace))
    monkeypatch.setattr(Path, "unlink", mortal(Path.unlink))
    moment, ended = 0, False
    while not ended:
        folder, left[0] = tmp_path / str(moment), 1000
        run(folder, ONE, "abcd", soft=True)
        left[0] = moment
        try:
            run(folder, OTHER, "abc", overwrite=True)
            ended = True
        except Killed:
            pass
        left[0] = 1000
        assert is_true(folder), moment
        started = json.loads((folder / RECORD).read_text())["models"] == ["other"]
        if started:
            run(folder, OTHER, "abc")
            assert said(folder) == {"a": "other", "b": "other", "c": "other", "d": "one"}, moment
            assert is_true(folder), moment
            assert not [*folder.glob(".*.nii.gz.partial")]
        moment += 1
    assert moment > 10


def test_what_a_killed_run_left_unfinished_is_not_a_third_ones_to_replace(tmp_path):
    run(tmp_path, ONE, "ab")
    assert Output(tmp_path, OTHER, False).begin("ab", overwrite=True) == ["a", "b"]
    third = {**OTHER, "overlap": 0.25}
    assert run(tmp_path, third, "a", overwrite=True) == ["a"]
    assert said(tmp_path) == {"a": "other", "b": None}
    assert "unfinished" not in json.loads((tmp_path / RECORD).read_text())
    with pytest.raises(InputError, match=r"1 of the cases there were made in another way \(b\)"):
        run(tmp_path, third, "ab")


def test_a_case_without_its_probabilities_is_not_done_where_they_are_wanted(tmp_path):
    run(tmp_path, ONE, "ab")
    assert run(tmp_path, ONE, "a", soft=True) == ["a"]
    assert run(tmp_path, ONE, "ab", soft=True) == ["b"]
    assert run(tmp_path, ONE, "ab") == []
    assert (tmp_path / "a_probabilities.nii").exists()


def test_older_probabilities_do_not_stay_beside_a_new_label_map(tmp_path):
    run(tmp_path, ONE, "a", soft=True)
    run(tmp_path, OTHER, "a", overwrite=True)
    assert not (tmp_path / "a_probabilities.nii").exists()


def test_label_maps_without_a_record_are_nobodys(tmp_path):
    (tmp_path / "a.nii.gz").write_text("by hand")
    with pytest.raises(InputError, match=r"1 of the cases are there \(a\), and no predictions.json says"):
        run(tmp_path, ONE, "ab")
    assert not (tmp_path / RECORD).exists()
    assert run(tmp_path, ONE, "b") == ["b"]
    assert said(tmp_path) == {"a": None, "b": "one"}
    assert run(tmp_path, ONE, "ab", overwrite=True) == ["a", "b"]
    assert said(tmp_path) == {"a": "one", "b": "one"}


@pytest.mark.parametrize("content", ["{", "[]", '{"earlier": 3}', '{"earlier": [{}]}', '{"unfinished": 3}'])
def test_a_damaged_record_is_one_line(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(
        InputError, match=f"{RECORD}: no record of predictions in it .*--overwrite$"
    ) as refused:
        run(tmp_path, ONE, "a")
    assert "\n" not in str(refused.value)
    assert run(tmp_path, ONE, "a", overwrite=True) == ["a"]
    assert said(tmp_path) == {"a": "one"}


def test_what_a_killed_run_left_of_its_cases_is_removed(tmp_path):
    left = [partial_of(tmp_path / name) for name in ("a.nii.gz", "a_probabilities.nii", "x.nii.gz")]
    for path in left:
        path.write_text("half")
    run(tmp_path, ONE, "a")
    assert [path.exists() for path in left] == [False, False, True]


@pytest.mark.parametrize("how", ["folder", "link to it", "link from it", "link to the scan", "hard link"])
def test_predictions_do_not_take_the_place_of_scans(tmp_path, how):
    scans, output = tmp_path / "scans", tmp_path / "out"
    scan, target, says = scans / "a.nii.gz", output / "a.nii.gz", "the scans lie in"
    for path in (scans, output):
        path.mkdir()
    scan.write_text("CT")
    if how == "folder":
        output = scans
    elif how == "link to it":
        output.rmdir()
        output.symlink_to(scans)
    elif how == "link from it":
        scan.rename(output / "b.nii.gz")
        scan.symlink_to(output / "b.nii.gz")
    else:
        says = "is the scan .* itself"
        target.symlink_to(scan) if how == "link to the scan" else target.hardlink_to(scan)
    with pytest.raises(InputError, match=f"^--output: .*{says}.*; expected a folder without scans"):
        check_apart({"a": [scan]}, output)


def test_other_folders_are_apart(tmp_path):
    scan = tmp_path / "scans" / "a.nii.gz"
    scan.parent.mkdir()
    scan.write_text("CT")
    (tmp_path / "out").mkdir()
    for folder in (tmp_path / "out", tmp_path / "none", scan.parent / "predicted"):
        check_apart({"a": [scan]}, folder)


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """A folder of three scans, and one of a model that knows HU alone."""
    for case in "abc":
        scan(tmp_path / "scans" / f"{case}.nii.gz", np.diag([5.0, 5, 6]), (24, 20, 22))
    model = dataclasses.replace(threshold_model(), path=tmp_path / "model")
    model.path.mkdir()
    (model.path / WEIGHTS).touch()
    monkeypatch.setattr(prediction, "load_model", lambda path, dtype=None: model)
    return tmp_path / "scans"


def failing_at(number, call, error):
    """The function, but its call of this number, from 1, raises."""
    calls = []

    def called(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return call(*arguments, **options)

    return called


@pytest.mark.parametrize("soft", [False, True])
def test_a_full_disk_is_one_line_and_what_is_done_stays(scans, tmp_path, monkeypatch, soft):
    out, options = tmp_path / "out", Options(probabilities=soft)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        place, name = (os, "posix_fallocate") if soft else (prediction, "write_labels")
        patch.setattr(place, name, failing_at(2, getattr(place, name), full))
        with pytest.raises(InputError, match=f"^{out}: disk full; nothing half-written is left") as refused:
            prediction.predict(["model"], scans, out, options)
    assert "\n" not in str(refused.value)
    assert sorted(path.name[0] for path in out.iterdir()) == [".", "a", *"a" * soft, "p"]
    assert prediction.predict(["model"], scans, out, options) == []
    assert len([*out.glob("*.nii*")]) == 3 * (1 + soft)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 150. GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.50GiB."),
    ],
    ids=["host", "device"],
)
def test_a_scan_too_large_for_the_memory_does_not_stop_the_others(error, scans, tmp_path, monkeypatch):
    read = failing_at(2, prediction.read_scan, error)
    monkeypatch.setattr(prediction, "read_scan", read)
    failures = prediction.predict(["model"], scans, tmp_path / "out", Options())
    assert [path.name for path in sorted((tmp_path / "out").glob("*.gz"))] == ["a.nii.gz", "c.nii.gz"]
    assert len(failures) == 1
    assert failures[0].startswith(f"{scans / 'b.nii.gz'}: out of memory")


def test_another_error_of_a_device_is_not_taken_for_a_scan_s(scans, tmp_path, monkeypatch):
    read = failing_at(2, prediction.read_scan, jax.errors.JaxRuntimeError("INTERNAL: a kernel failed"))
    monkeypatch.setattr(prediction, "read_scan", read)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel failed"):
        prediction.predict(["model"], scans, tmp_path / "out", Options())
