"""launch/evaluate.py on small label maps: known scores, other orientations, clear refusals."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
SHAPE = (24, 20, 16)
LABELS = {"background": 0, "liver": 1, "tumour": 2}


@pytest.fixture(scope="module")
def main():
    source = importlib.util.spec_from_file_location("launch_evaluate", ROOT / "launch" / "evaluate.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module.main


def save(path: Path, voxels: np.ndarray, affine=AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.uint8), affine), path)
    return path


def boxes(liver: int, tumour: int | None) -> np.ndarray:
    """A liver of 10 x 10 x 10 voxels and a tumour of 4 x 4 x 4, so far along the first axis."""
    voxels = np.zeros(SHAPE)
    voxels[liver : liver + 10, 3:13, 3:13] = 1
    if tumour is not None:
        voxels[tumour : tumour + 4, 14:18, 4:8] = 2
    return voxels


@pytest.fixture
def data(tmp_path):
    """Labels of three cases, the predictions of two of them, those of another run, and scans."""
    root = tmp_path / "set"
    for case in ("a", "b", "c"):
        save(root / "labelsTr" / f"{case}.nii.gz", boxes(4, 6))
        scan = np.where(boxes(4, 6) > 0, 60, -1000).astype(np.int16)
        (root / "imagesTr").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(scan, AFFINE), root / "imagesTr" / f"{case}_0000.nii.gz")
    (root / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    save(tmp_path / "run" / "a.nii.gz", boxes(6, 6))
    save(tmp_path / "run" / "b.nii.gz", boxes(4, None))
    save(tmp_path / "other" / "a.nii.gz", boxes(7, 6))
    save(tmp_path / "other" / "b.nii.gz", boxes(4, 8))
    return tmp_path


def arguments(data: Path, **changes) -> list[str]:
    given = {
        "predictions": data / "run",
        "labels": data / "set" / "labelsTr",
        "output": data / "out",
        "workers": 1,
    }
    return [f"--{key.replace('_', '-')}={value}" for key, value in (given | changes).items()]


def scores(folder: Path) -> dict[tuple[str, str, str], dict]:
    with (folder / "scores.csv").open() as file:
        return {(row["run"], row["case"], row["class"]): row for row in csv.DictReader(file)}


def test_known_scores_table_and_page(main, data, capsys):
    assert main(arguments(data, compare=data / "other")) == 0
    assert sorted(path.name for path in (data / "out").iterdir()) == [
        "report.png",
        "scores.csv",
        "summary.json",
    ]
    found = scores(data / "out")
    liver = found["predictions", "a", "liver"]  # moved by 2 of 10 voxels, 4 mm
    assert (float(liver["dice"]), float(liver["hd95"])) == (0.8, 4.0)
    assert float(liver["iou"]) == pytest.approx(8 / 12, rel=1e-5)
    assert float(liver["labelled_ml"]) == 12.0
    missed = found["predictions", "b", "tumour"]
    assert (missed["status"], missed["dice"], missed["predicted_ml"]) == ("missed", "0", "0")
    assert float(missed["hd95"]) == pytest.approx(np.linalg.norm([46, 38, 45]), rel=1e-4)
    assert float(found["compared", "b", "tumour"]["dice"]) == 0.5
    summary = json.loads((data / "out" / "summary.json").read_text())
    assert summary["labelled_but_not_predicted"] == ["c"]
    assert summary["scores"]["liver"]["dice"]["mean"] == pytest.approx(0.9)
    assert summary["scores"]["tumour"]["missed"] == 1
    assert summary["scores"]["mean over classes"]["dice"]["mean"] == pytest.approx(0.7)
    assert summary["differences"]["liver"]["dice"]["difference"] == pytest.approx(0.05)
    printed = capsys.readouterr().out
    assert "| liver | 0.900 ± 0.141 [0.800, 1.000] |" in printed
    assert "1 labelled cases have no prediction" in printed
    page = np.asarray(Image.open(data / "out" / "report.png"))
    assert page.shape == (1753, 1240, 3)
    assert (page[1100:] < 40).all(-1).mean() > 0.1  # the slices' air


def test_predictions_stored_in_another_orientation_score_the_same(main, data):
    assert main(arguments(data)) == 0
    expected = scores(data / "out")
    for name in ("a", "b"):
        image = nibabel.load(data / "run" / f"{name}.nii.gz")
        turned = image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
        save(data / "turned" / f"{name}.nii.gz", np.asarray(turned.dataobj), turned.affine)
    assert main(arguments(data, predictions=data / "turned", output=data / "out2", workers=2)) == 0
    assert scores(data / "out2") == expected


def test_regions_and_ignored_voxels(main, data):
    table = {"labels": {"background": 0, "whole": [1, 2], "tumour": 2, "ignore": 3, "unused": -1}}
    (data / "set" / "dataset.json").write_text(json.dumps(table))
    voxels = boxes(4, 6)
    voxels[4:6] = 3
    save(data / "set" / "labelsTr" / "a.nii.gz", voxels)
    assert main(arguments(data)) == 0
    found = scores(data / "out")
    assert float(found["predictions", "a", "whole"]["dice"]) == pytest.approx(
        2 * 864 / (864 + 1064), rel=1e-5
    )
    assert float(found["predictions", "b", "whole"]["dice"]) == pytest.approx(
        2 * 1000 / (1000 + 1064), rel=1e-5
    )


def test_without_a_table_every_value_is_a_class(main, data):
    (data / "set" / "dataset.json").unlink()
    assert main(arguments(data)) == 0
    assert {key[2] for key in scores(data / "out")} == {"label 1", "label 2"}


def test_predictions_of_several_settings_are_said_to_be_that(main, data, capsys):
    record = {"overlap": 0.5, "unfinished": ["gone"], "earlier": [{"overlap": 0.0, "cases": ["b"]}]}
    (data / "run" / "predictions.json").write_text(json.dumps(record))
    assert main(arguments(data)) == 0
    assert json.loads((data / "out" / "summary.json").read_text())["made_otherwise"] == ["b"]
    assert (
        "1 of these predictions may have been made with other settings than the rest"
        in capsys.readouterr().out
    )


def test_file_names_may_be_any_bytes(main, data):
    for folder in ("run", "set/labelsTr"):
        (data / folder / "a.nii.gz").rename(data / folder / os.fsdecode(b"a\xff.nii.gz"))
    assert main(arguments(data)) == 0
    assert {key[1] for key in scores(data / "out")} == {"a\\xff", "b"}


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from mambamim_jax.evaluate import scoring, tables
from mambamim_jax.program import run

def main(arguments):
    predictions, labels = map(Path, arguments)
    to_all = lambda *_: os.killpg(0, signal.SIGINT)  # as a terminal does on Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    scoring.score_all(scoring.find_pairs(predictions, labels)[0], tables.table_of_values({1, 2}), 2.0, 2, to_all)

if __name__ == "__main__":
    run(main)
"""


def test_ctrl_c_while_processes_score_is_one_line(data):
    (data / "interrupted.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, data / "interrupted.py", data / "run", data / "set" / "labelsTr"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    expected = "interrupted; run the same command again to start over\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", expected)


def refused(main, capsys, given: list[str], says: str) -> None:
    assert main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_nothing_is_scored_where_the_result_could_not_be_used(main, data, capsys, monkeypatch):
    from mambamim_jax.evaluate import report

    monkeypatch.setattr(report, "score_all", None)
    (data / "file").touch()
    refused(
        main, capsys, arguments(data, output=data / "file"), "file: is not a folder; name another --output"
    )
    refused(main, capsys, arguments(data, output=data / "file" / "out"), "file: is not a folder")
    refused(main, capsys, arguments(data, images=data / "gone"), "gone: no such folder (--images)")
    refused(main, capsys, arguments(data, images=data), "no scan of a or any other case (--images)")
    refused(main, capsys, arguments(data, compare=data / "set"), "no .nii or .nii.gz label maps in it")
    (data / "other" / "b.nii.gz").unlink()
    refused(main, capsys, arguments(data, compare=data / "other"), "no prediction of case b (1 missing)")
    for folder in ("run", "set/labelsTr"):
        save(data / folder / "a.nii", boxes(4, 6))
        refused(main, capsys, arguments(data), "a.nii.gz: a.nii is the same case; keep one of them")
        (data / folder / "a.nii").unlink()
    monkeypatch.setattr(report.os, "access", lambda path, mode: path != data)
    refused(main, capsys, arguments(data), f"{data}: cannot be written; name another --output")
    assert not (data / "out").exists()


def test_what_cannot_be_scored_is_one_line(main, data, capsys):
    refused(main, capsys, arguments(data, labels=data / "gone"), "no such folder")
    refused(main, capsys, arguments(data, tolerance=0), "--tolerance: found 0.0")
    refused(main, capsys, arguments(data, labels_json=data / "gone.json"), "gone.json: cannot be read")
    for labels, says in (
        ('{"a": []}', "value [], expected a whole number"),
        ('{"a": 1, "ignore": []}', "value [], expected a whole number"),
        ('{"a": 1, "ignore": [2, 3]}', "ignore [2, 3], expected one value"),
    ):
        (data / "table.json").write_text(f'{{"labels": {labels}}}')
        refused(main, capsys, arguments(data, labels_json=data / "table.json"), says)
    (data / "other" / "b.nii.gz").rename(data / "other" / "c.nii.gz")
    refused(main, capsys, arguments(data, compare=data / "other"), "no prediction of case b (1 missing)")
    save(data / "run" / "d.nii.gz", boxes(4, 6))
    refused(main, capsys, arguments(data), "d.nii.gz: no label d in")
    (data / "run" / "d.nii.gz").unlink()
    voxels = boxes(4, 6)
    voxels[0, 0, 0] = 7
    save(data / "run" / "a.nii.gz", voxels)
    refused(main, capsys, arguments(data), "a.nii.gz: label values [7] are not in the table of")
    save(data / "run" / "a.nii.gz", boxes(6, 6)[:-1])
    refused(main, capsys, arguments(data), "another grid than")
    moved = AFFINE.copy()
    moved[0, 3] = 2.0
    save(data / "run" / "a.nii.gz", boxes(6, 6), moved)
    refused(main, capsys, arguments(data), "or elsewhere in space")
    (data / "run" / "a.nii.gz").write_bytes(b"no")
    refused(main, capsys, arguments(data, workers=2), "not_nifti")
    (data / "set" / "dataset.json").write_text('{"labels": []}')
    refused(main, capsys, arguments(data), "no table of labels that can be used")
    assert not (data / "out").exists()
