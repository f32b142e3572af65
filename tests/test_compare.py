"""The comparison of starts: its folders, and the table that it draws from the scores of its runs."""

import csv
import json
import shutil
from pathlib import Path

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


def test_the_second_tables_compare_an_organ_with_itself(workdir, tmp_path):
    """The first case's label has no liver; one start draws one there, the other does not."""
    shutil.copytree(workdir, tmp_path / "copy")
    for start in starts.STARTS:
        for seed in range(SEEDS):
            file = starts.Run(start, 1.0, seed).evaluation(tmp_path / "copy") / "scores.csv"
            with file.open(newline="") as text:
                rows = list(csv.DictReader(text))
            value, status = ("0", "invented") if start == "scratch" else ("", "absent")
            rows[0] |= {"status": status, **dict.fromkeys(METRICS, value)}
            assert (rows[0]["case"], rows[0]["class"]) == ("case_0", "liver")
            with file.open("w", newline="") as text:
                writer = csv.DictWriter(text, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    liver, spleen, mean = (
        [line for line in starts.table(tmp_path / "copy", [1.0], SEEDS) if line.startswith(f"| {name} |")][1]
        for name in (*CLASSES, "mean over classes")
    )
    assert "| +0.000 [+0.000, +0.000] | 1 |" in liver
    assert "| +0.100 [+0.100, +0.100] | 0.0078 |" in spleen
    assert "| +0.050 [+0.050, +0.050] |" in mean


def test_an_organ_that_no_label_has(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    for seed in range(SEEDS):
        file = starts.Run("pretrained", 1.0, seed).evaluation(tmp_path / "copy") / "scores.csv"
        lines = file.read_text().splitlines()
        lines = [x.replace("scored", "invented") if ",liver," in x else x for x in lines]
        file.write_text("\n".join(lines) + "\n")
    lines = starts.table(tmp_path / "copy", [1.0], SEEDS)
    second = [line for line in lines if line.startswith("| liver |")][1]
    assert second.endswith("| – | – | – |")


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
        ("--shares=1.0,0.99999999", "expected every share once"),
        ("--overlap=1", "found 1, expected a share from 0 to 0.9"),
        ("--overlap=nan", "found nan, expected a share from 0 to 0.9"),
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
    for seeds in ([rows, other], [rows, rows[1:]], [rows[1:], rows]):
        merged = {(row["case"], row["class"]): row for row in starts.mean_over_seeds(seeds)}
        assert np.isnan(merged[rows[0]["case"], rows[0]["class"]]["dice"])
        assert merged[rows[1]["case"], rows[1]["class"]]["dice"] == rows[1]["dice"]


def test_shares_have_folders_and_headings_of_their_own(workdir, tmp_path):
    names = [starts.Run("scratch", share, 3).name for share in (1.0, 0.998, 0.2, 0.07)]
    assert names == ["scratch_100_3", "scratch_99.8_3", "scratch_20_3", "scratch_7_3"]
    shutil.copytree(workdir, tmp_path / "copy")
    for start in starts.STARTS:
        run = starts.Run(start, 0.2, 0).evaluation(tmp_path / "copy").parent
        run.rename(run.with_name(starts.Run(start, 0.998, 0).name))
    assert any(
        line.startswith("99.8% of the labels;") for line in starts.table(tmp_path / "copy", [0.998], 1)
    )


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Three phantoms, of which the second is held out, and in another fold the others."""
    source = write_phantoms(tmp_path_factory.mktemp("phantoms") / "data", count=3)
    splits = [{"train": ["phantom_000", "phantom_002"], "val": ["phantom_001"]}]
    splits.append({"train": ["phantom_001"], "val": ["phantom_000", "phantom_002"]})
    (source / "splits_final.json").write_text(json.dumps(splits))
    return source


@pytest.fixture
def source(phantoms, tmp_path):
    return shutil.copytree(phantoms, tmp_path / "data")


class Done(Exception):
    """Everything was checked and the first stage would start."""


@pytest.fixture
def compare(source, tmp_path, capsys, monkeypatch):
    """Runs the command line up to the first stage; its one line on what is wrong, or nothing."""

    def stop(*_):
        raise Done

    monkeypatch.setattr(starts, "run_all", stop)

    def run(*flags):
        demo = [f"--{script}=configs/{script}.py:demo" for script in ("pretrain", "finetune")]
        try:
            assert starts.main([f"--source={source}", f"--workdir={tmp_path / 'run'}", *demo, *flags]) == 2
        except Done:
            return ""
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def tree(folder):
    """Every file and link below a folder with what it holds."""
    paths = sorted(folder.rglob("*"))
    return {
        path: path.readlink() if path.is_symlink() else path.read_bytes()
        for path in paths
        if not path.is_dir()
    }


@pytest.mark.parametrize(("fold", "held_out"), [(0, ["001"]), (1, ["000", "002"])])
def test_pretraining_sees_no_held_out_scan(compare, tmp_path, fold, held_out):
    assert compare(f"--finetune-flag=data.fold={fold}") == ""
    data = tmp_path / "run" / "data"
    names = {side: sorted(p.name for p in (data / side).iterdir()) for side in ("train", "held_out")}
    train = [name for name in ("000", "001", "002") if name not in held_out]
    assert names["train"] == [f"phantom_{name}_0000.nii.gz" for name in train]
    assert names["held_out"] == [f"phantom_{name}_0000.nii.gz" for name in held_out]
    labels = sorted(p.name for p in (data / "held_out_labels").iterdir())
    assert labels == ["dataset.json", *(f"phantom_{name}.nii.gz" for name in held_out)]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--finetune-flag=nosuch=2", "finetune: config.nosuch: no such key"),
        ("--pretrain-flag=steps=x", "pretrain: config.steps: found 'x'; expected an integer"),
        ("--pretrain=nothing.py", "pretrain: --config: no file nothing.py"),
        ("--finetune-flag=seed=2", "finetune: config.seed: set by --finetune-flag; expected a key that"),
        ("--finetune-flag=data.labels=('liver',)", "config.data.labels: found liver; expected the labels of"),
        (
            "--finetune-flag=model.hymamba.mamba_depth=3",
            "found 3 in fine-tuning; expected that of pre-training, 2",
        ),
        ("--finetune-flag=model.encoder=vision_mamba", "config.model.encoder: found 'vision_mamba'"),
        ("--finetune-flag=data.fold=2", "splits_final.json: no fold 2, it has 2"),
        ("--source=nowhere", "--source: found no folder"),
        ("--gpus=3", "--gpus: found 3; expected at most the 2 of CUDA_VISIBLE_DEVICES"),
        ("--workdir={file}", "--workdir: found a file at"),
        ("--workdir={file}/run", "can't be written (Not a directory); expected a folder you may write to"),
    ],
)
def test_what_no_stage_could_use_is_told_before_the_first(compare, tmp_path, source, monkeypatch, flag, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    line = compare(flag.format(file=source / "dataset.json"))
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_a_workdir_takes_no_other_settings(compare, tmp_path):
    first = ["--seeds=2", "--shares=1.0,0.5", "--finetune-flag=steps=2", "--overlap=0"]
    assert compare(*first) == ""
    before = tree(tmp_path / "run")
    line = compare(*first, "--finetune-flag=steps=400", "--overlap=0.5", "--pretrain-flag=seed=1")
    assert (
        "found overlap 0.5 (was 0.0), pretrain.seed 1 (was 0), finetune.steps 400 (was 2); expected" in line
    )
    assert "seeds 1 (was 2)" in compare(*first, "--seeds=1")
    assert "shares [1.0] (was [1.0, 0.5])" in compare(*first, "--shares=1.0")
    assert tree(tmp_path / "run") == before
    assert (
        compare(*first, "--seeds=3", "--shares=0.5,0.25,1", "--jobs=2", "--finetune-flag=log.every=1") == ""
    )
    assert "seeds 2 (was 3)" in compare(*first)


def test_a_workdir_of_a_version_that_kept_the_flags_alone(compare, tmp_path):
    flag = "--finetune-flag=steps=2"
    assert compare(flag) == ""
    path = tmp_path / "run" / "settings.json"
    kept = {key: value for key, value in json.loads(path.read_text()).items() if "_settings" not in key}
    path.write_text(json.dumps(kept))
    assert "finetune_flag ['steps=3'] (was ['steps=2'])" in compare("--finetune-flag=steps=3")
    kept["finetune"] = "configs/finetune.py:" + kept["finetune"].rpartition(":")[2]  # as it was given
    path.write_text(json.dumps(kept))
    assert compare(flag) == ""
    path.write_text("[")
    assert "settings.json is not readable" in compare(flag)


def test_a_key_that_a_version_did_not_have_is_at_its_default(compare, tmp_path):
    assert compare() == ""
    path = tmp_path / "run" / "settings.json"
    before = json.loads(path.read_text())
    assert before["finetune_settings"].pop("ema") == 0.0
    before["pretrain_settings"]["of_old"] = 1
    path.write_text(json.dumps(before))
    assert "finetune.ema 0.5 (was 0.0)" in compare("--finetune-flag=ema=0.5")
    assert compare() == ""


def test_a_changed_config_file_is_another_comparison(compare, tmp_path):
    config = tmp_path / "mine.py"
    text = Path("configs/finetune.py").read_text()
    config.write_text(text)
    assert compare(f"--finetune={config}:demo") == ""
    config.write_text(
        text.replace("config.epochs, config.steps = 0, 100", "config.epochs, config.steps = 0, 101")
    )
    assert "found finetune.steps 101 (was 100)" in compare(f"--finetune={config}:demo")


@pytest.mark.parametrize("settings", ["kept", "lost"])
def test_another_source_spoils_no_workdir(compare, tmp_path, source, settings):
    assert compare() == ""
    if settings == "lost":
        (tmp_path / "run" / "settings.json").unlink()
    before = tree(tmp_path / "run")
    line = compare(f"--source={shutil.copytree(source, tmp_path / 'other')}")
    assert ("found source" if settings == "kept" else "expected a link to") in line
    assert tree(tmp_path / "run") == before
    next(path for path in before if path.is_symlink()).unlink()  # as if it had been killed there
    assert compare() == ""
    assert {path: tree(tmp_path / "run")[path] for path in before} == before


def test_links_to_what_is_gone_are_told(compare, tmp_path, source):
    assert compare() == ""
    (tmp_path / "run" / "settings.json").unlink()
    source.rename(tmp_path / "moved")
    line = compare(f"--source={tmp_path / 'moved'}")
    assert "expected a link to" in line
    assert "or another --workdir" in line
