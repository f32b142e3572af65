"""launch/predict.py on small NIfTI files: right places, right geometry, clear refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from scipy import ndimage

from mambamim_jax.evaluate import predict as prediction
from mambamim_jax.evaluate.predict import Options, Predictor
from mambamim_jax.model_files import LoadedModel, save_model
from tests.tiny_model import describe, random_params

SIZES = {"crop": (16, 16, 16), "spacing": (6.0, 6.0, 6.0)}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def main():
    source = importlib.util.spec_from_file_location("launch_predict", ROOT / "launch" / "predict.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module.main


def write(path: Path, voxels: np.ndarray, affine: np.ndarray, qform: bool = True) -> Path:
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=2)
    image.set_qform(affine if qform else None, code=1 if qform else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def turned(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


VALUES = np.array([-200.0, 0.0, 200.0, 400.0])
"""HU of air (as the window cuts it), body, organ and the organ's core."""


def hu_at(points: np.ndarray) -> np.ndarray:
    """A body in air, an organ in it, a core in that: HU at world points (3, …) in mm, borders 8 mm wide."""
    hu = np.full(points.shape[1:], VALUES[0])
    for centre, radii in (
        ((0, 0, 0), (52, 44, 58)),
        ((-6, 4, 8), (30, 27, 34)),
        ((-10, 6, 12), (15, 14, 17)),
    ):
        away = points - np.reshape(centre, (3, *[1] * (points.ndim - 1)))
        away = np.sqrt(sum((a / r) ** 2 for a, r in zip(away, radii)))
        hu += 200 * np.clip((1 - away) * min(radii) / 8 + 0.5, 0, 1)
    return hu


def label_at(points: np.ndarray) -> np.ndarray:
    """What a network that knows HU alone must say there."""
    return np.abs(hu_at(points)[None] - VALUES.reshape(-1, *[1] * (points.ndim - 1))).argmin(0)


def scan(path: Path, matrix: np.ndarray, shape: tuple[int, ...], qform: bool = True) -> Path:
    """The body as a scanner would store it on a grid of this matrix around its middle."""
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = -matrix @ ((np.array(shape) - 1) / 2)
    points = np.einsum("ab,b...->a...", matrix, np.indices(shape)) + affine[:3, 3].reshape(3, 1, 1, 1)
    return write(path, np.rint(hu_at(points)).astype(np.int16), affine, qform)


GRIDS = {
    "straight": (np.diag([2.0, 2, 2]), (70, 60, 76), True),
    "flipped": (np.diag([-2.0, -2, 2]), (70, 60, 76), True),
    "rotated": (np.array([[0, 0, 2.0], [-2, 0, 0], [0, 2, 0]]), (60, 76, 70), True),
    "respaced": (np.diag([1.3, -1.7, 2.6]), (107, 71, 58), True),
    "oblique": (turned(20) @ np.diag([2.0, 2, 2]), (86, 86, 90), True),
    "tilted": (np.diag([-2.0, -2, 2]) @ np.array([[1, 0, 0], [0, 1, 0.25], [0, 0, 1]]), (70, 80, 76), False),
}


def threshold_model() -> LoadedModel:
    """A network that knows HU alone, with probabilities about as soft as a trained one's."""
    low, high = VALUES[0], VALUES[-1]
    rule = {"kind": "window", "low": low, "high": high}
    labels = {str(n): str(n) for n in range(len(VALUES))}
    description = describe(normalisation=[rule], labels=labels, classes=len(VALUES), crop=[48, 32, 48])

    def apply(params, x):
        return -(((low + (high - low) * x - jnp.asarray(VALUES, jnp.float32)) / 140) ** 2)

    return LoadedModel(Path("thresholds"), description | {"spacing": [2.0, 2.0, 2.0]}, {}, {}, apply)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_copies_of_one_body_are_labelled_at_the_same_places(tmp_path, monkeypatch):
    """Flipped, rotated, re-spaced, oblique and sheared copies: right in the world, and like each other.

    Against the truth at every voxel; against the straight copy with both probabilities taken to common points, since
    label maps of different grids can only be compared to within a voxel.
    """
    monkeypatch.setattr(prediction, "load_model", lambda path, dtype=None: threshold_model())
    predictor = Predictor(["thresholds"], Options(batch=4, probabilities=True))
    points = np.stack(np.meshgrid(*[np.arange(-55, 56, 2.2)] * 3, indexing="ij")).reshape(3, -1)
    labels, common = {}, {}
    for name, (matrix, shape, qform) in GRIDS.items():
        path, target = scan(tmp_path / f"{name}.nii.gz", matrix, shape, qform), tmp_path / "labels.nii.gz"
        prediction.predict_case(predictor, [path], target)
        image = nibabel.load(target)
        labels[name] = np.asarray(image.dataobj)
        where = nibabel.affines.apply_affine(image.affine, np.moveaxis(np.indices(shape), 0, -1))
        truth = label_at(np.moveaxis(where, -1, 0))
        for value in (1, 2, 3):
            assert dice(labels[name] == value, truth == value) >= 0.99, (name, value)
        soft = nibabel.load(tmp_path / "labels_probabilities.nii")
        np.testing.assert_array_equal(soft.affine, image.affine)
        index = nibabel.affines.apply_affine(np.linalg.inv(soft.affine), points.T).T
        channels = np.moveaxis(soft.get_fdata(dtype=np.float32), -1, 0)
        common[name] = np.argmax([ndimage.map_coordinates(c, index, order=1) for c in channels], axis=0)
    for name, found in common.items():
        for value in (1, 2, 3):
            assert dice(found == value, common["straight"] == value) >= 0.99, (name, value)
    np.testing.assert_array_equal(labels["flipped"][::-1, ::-1], labels["straight"])
    np.testing.assert_array_equal(labels["rotated"].transpose(2, 0, 1)[:, ::-1], labels["straight"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    description = describe(**SIZES)
    run = tmp_path_factory.mktemp("runs") / "tiny"
    save_model(run / "best", description, random_params(description))
    return run


@pytest.fixture
def scans(tmp_path):
    matrix = np.diag([-5.0, -5, 6])
    for name, shape in (("a_0000", (24, 20, 22)), ("b_0000", (22, 23, 19))):
        scan(tmp_path / "scans" / f"{name}.nii.gz", matrix, shape)
    return tmp_path / "scans"


def refused(main, capsys, arguments: list[str], says: str, code: int = 2) -> None:
    capsys.readouterr()
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_folder_is_predicted_resumed_and_guarded(main, capsys, model, scans, tmp_path):
    out = tmp_path / "out"
    arguments = [f"--model={model}", f"--input={scans}", f"--output={out}"]
    assert main(arguments) == 0
    assert sorted(p.name for p in out.iterdir()) == [".lock", "a.nii.gz", "b.nii.gz", "predictions.json"]
    for name in ("a", "b"):
        image, labels = nibabel.load(scans / f"{name}_0000.nii.gz"), nibabel.load(out / f"{name}.nii.gz")
        for field in ("srow_x", "srow_y", "srow_z", "sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d",
                      "qoffset_x", "qoffset_y", "qoffset_z", "pixdim", "xyzt_units", "dim"):  # fmt: skip
            np.testing.assert_array_equal(labels.header[field], image.header[field], err_msg=field)
        assert labels.get_data_dtype() == np.uint8
        assert set(np.unique(labels.dataobj)) <= {0, 1, 2}
        assert len(np.unique(labels.dataobj)) > 1
    first = (out / "a.nii.gz").read_bytes()
    (out / "a.nii.gz").write_bytes(b"kept")
    (out / "b.nii.gz").unlink()
    assert main(arguments) == 0
    assert "1 of 2 cases are in" in capsys.readouterr().out
    assert (out / "a.nii.gz").read_bytes() == b"kept"
    assert (out / "b.nii.gz").exists()
    refused(main, capsys, [*arguments, "--overlap=0.25"], "were made with other overlap")
    assert main([*arguments, "--probabilities"]) == 0
    assert sorted(p.name for p in out.glob("*.nii")) == ["a_probabilities.nii", "b_probabilities.nii"]
    (out / "a.nii.gz").write_bytes(b"kept")
    assert main([*arguments, "--overwrite"]) == 0
    assert (out / "a.nii.gz").read_bytes() == first


def test_ensembles_average_probabilities(main, capsys, model, scans, tmp_path):
    other = tmp_path / "other"
    description = describe(**SIZES)
    save_model(other, description, random_params(description, seed=1))
    soft = {}
    for name, models in {"one": [model], "two": [other], "both": [model, other]}.items():
        out = tmp_path / name
        chosen = [f"--model={m}" for m in models]
        assert (
            main([*chosen, f"--input={scans / 'a_0000.nii.gz'}", f"--output={out}", "--probabilities"]) == 0
        )
        soft[name] = nibabel.load(out / "a_probabilities.nii").get_fdata()
        labels = np.asarray(nibabel.load(out / "a.nii.gz").dataobj)
        assert sorted(p.name for p in out.iterdir()) == [
            ".lock",
            "a.nii.gz",
            "a_probabilities.nii",
            "predictions.json",
        ]
        np.testing.assert_allclose(soft[name].sum(-1), 1, atol=1e-4)
        assert (labels == soft[name].argmax(-1)).mean() > 0.999  # but for ties at 16 bits
    assert np.abs(soft["one"] - soft["two"]).max() > 0.1
    np.testing.assert_allclose(soft["both"], (soft["one"] + soft["two"]) / 2, atol=3e-5)
    third = tmp_path / "third"
    save_model(third, {**description, "spacing": (7.0, 6.0, 6.0)}, random_params(description))
    arguments = [f"--model={model}", f"--model={third}", f"--input={scans}", f"--output={tmp_path / 'no'}"]
    refused(main, capsys, arguments, "an ensemble must agree")
    wide = {**description, "head_width": 6}
    save_model(third, wide, random_params(wide))
    refused(main, capsys, arguments, "another network than")
    assert not (tmp_path / "no").exists()


def test_several_channels_and_regions(main, capsys, tmp_path):
    regions = [{"name": "whole", "labels": [1, 2], "writes": 2}, {"name": "core", "labels": [1], "writes": 1}]
    description = describe(
        **SIZES, in_channels=2, channel_names=["T1", "T2"], normalisation=[{"kind": "zscore"}] * 2,
        regions=regions, classes=2, labels={"0": "background", "1": "core", "2": "oedema"},
    )  # fmt: skip
    params = random_params(description)
    params["classify"]["bias"][:] = (2.0, 0.0)  # so that something is found
    save_model(tmp_path / "model", description, params)
    draw = np.random.default_rng(0)
    affine = np.diag([6.0, 6.0, 6.0, 1.0])
    for channel in range(2):
        voxels = np.zeros((20, 18, 22), np.float32)
        voxels[4:16, 4:14, 5:17] = draw.uniform(50, 900, (12, 10, 12))
        write(tmp_path / "scans" / f"p_{channel:04d}.nii.gz", voxels, affine)
    arguments = [
        f"--model={tmp_path / 'model'}",
        f"--input={tmp_path / 'scans'}",
        f"--output={tmp_path / 'out'}",
    ]
    assert main([*arguments, "--flips=h"]) == 0
    labels = np.asarray(nibabel.load(tmp_path / "out" / "p.nii.gz").dataobj)
    assert labels.shape == (20, 18, 22)
    assert {1, 2} & set(np.unique(labels))
    (tmp_path / "scans" / "p_0001.nii.gz").unlink()
    refused(main, capsys, arguments, "case p has 1 channels (_0000), the model takes 2 (_0000 T1, _0001 T2)")
    write(tmp_path / "scans" / "p_0001.nii.gz", np.ones((9, 9, 9), np.float32), affine)
    refused(main, capsys, [*arguments, "--flips=h", "--overwrite"], "1 cases could not be predicted", code=1)


def test_wrong_arguments_are_refused_before_any_work(main, capsys, model, scans, tmp_path):
    out = f"--output={tmp_path / 'out'}"
    fine = [f"--model={model}", f"--input={scans}", out]
    refused(main, capsys, [f"--model={tmp_path}", *fine[1:]], "no config.json in it")
    refused(main, capsys, [fine[0], f"--input={tmp_path / 'gone.nii'}", out], "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(main, capsys, [fine[0], f"--input={tmp_path / 'empty'}", out], "no .nii or .nii.gz files in it")
    scanned = (scans / "a_0000.nii.gz").read_bytes()
    refused(main, capsys, [*fine[:2], f"--output={scans}", "--overwrite"], f"the scans lie in {scans}")
    assert (scans / "a_0000.nii.gz").read_bytes() == scanned
    refused(main, capsys, [*fine, "--overlap=0.9999"], "expected a share from 0 to 0.9")
    refused(main, capsys, [*fine, "--window=20,16,16"], "expected sides divisible by 16")
    encoder = describe(task="encoder")
    save_model(tmp_path / "encoder", encoder, random_params(encoder))
    refused(main, capsys, [f"--model={tmp_path / 'encoder'}", *fine[1:]], "expected a segmentation model")
    other = tmp_path / "other"
    shutil.copytree(model / "best", other)
    config = json.loads((other / "config.json").read_text())
    config["encoder_config"]["channels"][0] = 8
    (other / "config.json").write_text(json.dumps(config))
    refused(
        main,
        capsys,
        [f"--model={other}", *fine[1:]],
        "the weights are not those of the hymamba segment network",
    )
    assert not (tmp_path / "out").exists()
    scan(scans / "b_0001.nii.gz", np.eye(3) * 5, (22, 23, 19))
    refused(main, capsys, fine, "case b has 2 channels (_0000, _0001), the model takes 1 (_0000 CT)")


def test_a_bad_file_does_not_stop_the_others(main, capsys, model, scans, tmp_path):
    (scans / "a_0000.nii.gz").write_bytes((scans / "a_0000.nii.gz").read_bytes()[:500])
    out = tmp_path / "out"
    assert main([f"--model={model}", f"--input={scans}", f"--output={out}"]) == 1
    printed = capsys.readouterr()
    assert "a_0000.nii.gz: the gzip stream ends early" in printed.out
    assert printed.err == "error: 1 cases could not be predicted\n"
    assert sorted(p.name for p in out.iterdir()) == [".lock", "b.nii.gz", "predictions.json"]


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


def test_the_output_of_another_run_is_left_alone(main, capsys, model, scans, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", HOLDER, str(out / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        (out / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": process.pid}))
        arguments = [f"--model={model}", f"--input={scans}", f"--output={out}"]
        refused(main, capsys, arguments, f"--output: {out} is in use by process {process.pid} on ")
        process.stdin.close()
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert main(arguments) == 0
    (tmp_path / "file").touch()
    refused(main, capsys, [*arguments[:2], f"--output={tmp_path / 'file'}"], "--output: ")
