"""The comparison of starts: its folders, and the table that it draws from the scores of its runs."""

import csv
import json
import shutil

import numpy as np
import pytest

from mambamim_jax.bench import starts
from mambamim_jax.data.phantom import write_phantoms
from mambamim_jax.evaluate.metrics import METRICS

CLASSES, CASES, SEEDS = ("liver", "spleen"), [f"case_{n}" for n in range(8)], 2


def dice(start, share, seed, case, name):
    """What is written as the score of a case: pre-training helps the spleen, by 0.1."""
    better = 0.1 if start == "pretrained" and name == "spleen" else 0.0
    return 0.5 + better + 0.01 * seed + 0.02 * CASES.index(case) - (0.2 if share < 1 else 0.0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    for start in starts.STARTS:
        for share in (1.0, 0.2):
            for seed in range(SEEDS):
                run = folder / "runs" / starts.Run(start, share, seed).name / "evaluation"
                run.mkdir(parents=True)
                with open(run / "scores.csv", "w", newline="") as file:
                    writer = csv.DictWriter(file, ["run", "case", "class", *METRICS, "status"])
                    writer.writeheader()
                    for case in CASES:
                        for name in CLASSES:
                            value = f"{dice(start, share, seed, case, name):.6f}"
                            row = {"run": "predictions", "case": case, "class": name, "status": "scored"}
                            writer.writerow(row | dict.fromkeys(METRICS, value))
    return folder


def test_the_table_says_what_the_scores_say(workdir):
    lines = starts.table(workdir, [1.0, 0.2], SEEDS)
    liver, spleen = ([line for line in lines if line.startswith(f"| {name} |")] for name in CLASSES)
    mean = np.mean([dice("scratch", 1.0, seed, case, "liver") for seed in range(2) for case in CASES])
    spread = np.std([0.0, 0.01], ddof=1)
    assert liver[0].startswith(f"| liver | {mean:.3f} ± {spread:.3f} | {mean:.3f} ± {spread:.3f} | +0.000")
    assert f"{mean + 0.1:.3f} ± {spread:.3f} | +0.100 [+0.100, +0.100] | 0.0078" in spleen[0]
    assert f"| spleen | {mean - 0.2:.3f}" in spleen[1]
    assert any(
        "100% of the labels; Dice on 8 held-out cases, mean ± deviation over 2 seeds" in x for x in lines
    )
    assert any(line.startswith("| mean over classes |") and "+0.050" in line for line in lines)


def test_invented_organs_are_left_out_of_the_second_tables(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    for seed in range(SEEDS):
        file = starts.Run("scratch", 1.0, seed).evaluation(tmp_path / "copy") / "scores.csv"
        lines = file.read_text().splitlines()
        first = next(i for i, line in enumerate(lines) if ",case_0,liver," in line)
        made = [("0.0" if part.startswith("0.") else part) for part in lines[first].split(",")]
        lines[first] = ",".join(made).replace("scored", "invented")
        file.write_text("\n".join(lines) + "\n")
    before, after = starts.table(workdir, [1.0], SEEDS), starts.table(tmp_path / "copy", [1.0], SEEDS)
    liver = [[line for line in lines if line.startswith("| liver |")] for lines in (before, after)]
    others = np.mean(
        [dice("scratch", 1.0, seed, case, "liver") for seed in range(SEEDS) for case in CASES[1:]]
    )
    assert liver[0][0] == liver[0][1]
    assert liver[1][0] != liver[0][0]
    assert liver[1][1].startswith(f"| liver | {others:.3f}")


def test_the_other_metrics(workdir):
    mean = np.mean([dice("scratch", 0.2, 0, case, "liver") for case in CASES]) + 0.005
    expected = f"| 20%, scratch | {' | '.join([f'{mean:.3f} ± {np.std([0.0, 0.01], ddof=1):.3f}'] * 3)} |"
    assert expected in starts.table(workdir, [1.0, 0.2], SEEDS)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--jobs=0", "found 0, expected a whole number, at least 1"),
        ("--gpus=-1", "found -1, expected a whole number, at least 0"),
        ("--seeds=x", "found x, expected a whole number"),
        ("--shares=1.0,20", "found 1.0,20, expected numbers in (0, 1]"),
        ("--shares=", "found , expected numbers in (0, 1]"),
    ],
)
def test_bad_arguments_are_one_clear_line(argument, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        starts.main([f"--source={tmp_path}", f"--workdir={tmp_path / 'out'}", argument])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_absent_classes_stay_out(workdir):
    rows = starts.read_scores(workdir / "runs" / "scratch_100_0" / "evaluation")
    other = [dict(row) for row in rows]
    other[0]["dice"] = float("nan")
    merged = starts.mean_over_seeds([rows, other])
    assert np.isnan(merged[0]["dice"])
    assert merged[1]["dice"] == rows[1]["dice"]


def test_pretraining_sees_no_held_out_scan(tmp_path):
    source = write_phantoms(tmp_path / "data", count=3)
    splits = [{"train": ["phantom_000", "phantom_002"], "val": ["phantom_001"]}]
    (source / "splits_final.json").write_text(json.dumps(splits))
    starts.link_sides(source, tmp_path / "sides")
    names = {
        side: sorted(p.name for p in (tmp_path / "sides" / side).iterdir()) for side in ("train", "held_out")
    }
    assert names["train"] == ["phantom_000_0000.nii.gz", "phantom_002_0000.nii.gz"]
    assert names["held_out"] == ["phantom_001_0000.nii.gz"]
    labels = sorted(p.name for p in (tmp_path / "sides" / "held_out_labels").iterdir())
    assert labels == ["dataset.json", "phantom_001.nii.gz"]


def test_a_failed_stage_names_its_log(tmp_path, capsys):
    source = write_phantoms(tmp_path / "data", count=3)
    splits = [{"train": ["phantom_000", "phantom_002"], "val": ["phantom_001"]}]
    (source / "splits_final.json").write_text(json.dumps(splits))
    arguments = [f"--source={source}", f"--workdir={tmp_path / 'run'}", "--pretrain=nothing.py"]
    assert starts.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: pretrain of all ended with 2: error: --config: no file nothing.py")
    assert "logs/all_pretrain.txt" in printed
