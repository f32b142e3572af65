"""Every benchmark's own layout, in miniature → nnU-Net raw; whatever is not so in one line."""

import importlib.util
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from mambamim_jax.data import datasets
from mambamim_jax.data.benchmarks import BENCHMARKS
from mambamim_jax.data.labels import make_split, read_table
from tests.data import ct_files

SHAPE = (8, 8, 6)


def scan(path):
    ct_files.write(path, ct_files.body(SHAPE))


def segmentation(path, values):
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[2, 2, : len(values)] = values
    ct_files.write(path, voxels)


def btcv(folder):
    for number in (1, 22, 36):
        scan(folder / f"RawData/Training/img/img{number:04d}.nii.gz")
        segmentation(folder / f"RawData/Training/label/label{number:04d}.nii.gz", [1, 13])


def amos22(folder):
    lists = {"training": (1, 4, 507), "validation": (8,)}
    content = {}
    for key, numbers in lists.items():
        end = "Tr" if key == "training" else "Va"
        pairs = [
            (f"./images{end}/amos_{n:04d}.nii.gz", f"./labels{end}/amos_{n:04d}.nii.gz") for n in numbers
        ]
        content[key] = [{"image": image, "label": label} for image, label in pairs]
        for image, label in pairs:
            scan(folder / image)
            segmentation(folder / label, [1, 15])
    (folder / "dataset.json").write_text(json.dumps(content))


def ct_org(folder):
    for number in (3, 20, 21, 100):
        scan(folder / f"OrganSegmentations/volume-{number}.nii.gz")
        segmentation(folder / f"OrganSegmentations/labels-{number}.nii.gz", [1, 6])


def kits23(folder):
    for number in range(6):
        scan(folder / f"dataset/case_{number:05d}/imaging.nii.gz")
        segmentation(folder / f"dataset/case_{number:05d}/segmentation.nii.gz", [1, 2, 3])


def brats21(folder):
    for number in (0, 2, 3, 5, 6):
        case = folder / f"BraTS2021_{number:05d}" / f"BraTS2021_{number:05d}"
        for channel in ("t1", "t1ce", "t2", "flair"):
            scan(Path(f"{case}_{channel}.nii.gz"))
        segmentation(Path(f"{case}_seg.nii.gz"), [1, 2, 4])


def decathlon(*names):
    def make(folder):
        training = []
        for number in (1, 3, 4):
            image, label = (f"{part}Tr/case_{number:03d}.nii.gz" for part in ("images", "labels"))
            scan(folder / image)
            segmentation(folder / label, range(1, len(names) + 1))
            training.append({"image": f"./{image}", "label": f"./{label}"})
            (folder / f"imagesTr/._case_{number:03d}.nii.gz").write_bytes(b"made by a Mac")
        labels = {str(n): name for n, name in enumerate(("background", *names))}
        (folder / "dataset.json").write_text(json.dumps({"labels": labels, "training": training}))

    return make


LAYOUTS = {
    "btcv": btcv,
    "amos22": amos22,
    "ct_org": ct_org,
    "kits23": kits23,
    "brats21": brats21,
    "msd_lung": decathlon("cancer"),
    "msd_pancreas": decathlon("pancreas", "cancer"),
    "msd_hepatic_vessel": decathlon("Vessel", "Tumour"),
    "msd_spleen": decathlon("spleen"),
}
HELD_OUT = {"btcv": ("btcv_0036",), "amos22": ("amos_0008",), "ct_org": ("ct_org_003", "ct_org_020")}


@pytest.fixture(scope="module")
def main():
    path = ct_files.REPO / "launch" / "prepare.py"
    source = importlib.util.spec_from_file_location("launch_prepare", path)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module.main


def make(name, folder):
    folder.mkdir()
    LAYOUTS[name](folder)
    return folder


def test_every_benchmark_has_a_miniature():
    assert set(LAYOUTS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(main, tmp_path, capsys, name):
    source, output = make(name, tmp_path / "download"), tmp_path / "raw"
    assert main([name, f"--source={source}", f"--output={output}"]) == 0
    cases = datasets.discover(output)
    table = read_table(output)
    assert f"{len(cases)} cases of" in capsys.readouterr().out
    assert len(table.foreground) == len(BENCHMARKS[name].foreground)
    assert all(len(case.images) == len(table.channels) for case in cases)
    for case in cases:
        found = np.unique(np.asarray(nibabel.load(case.label).dataobj))
        assert found.max() == len(table.names) - 1
        assert all(path.is_symlink() for path in case.images)
    split = make_split([case.id for case in cases], output / "splits_final.json")
    assert sorted(split.train + split.held_out) == [case.id for case in cases]
    if name in HELD_OUT:
        assert split.held_out == HELD_OUT[name]
    else:
        folds = json.loads((output / "splits_final.json").read_text())
        assert sorted(name for fold in folds for name in fold["val"]) == [case.id for case in cases]


def test_brats_is_relabelled_and_regions_are_nested(main, tmp_path):
    source = make("brats21", tmp_path / "download")
    assert main(["brats21", f"--source={source}", f"--output={tmp_path / 'raw'}"]) == 0
    before = nibabel.load(source / "BraTS2021_00002/BraTS2021_00002_seg.nii.gz")
    after = nibabel.load(tmp_path / "raw/labelsTr/BraTS2021_00002.nii.gz")
    expected = np.asarray(before.dataobj)
    np.testing.assert_array_equal(after.dataobj, np.where(expected == 4, 3, expected))
    np.testing.assert_array_equal(after.affine, before.affine)
    table = read_table(tmp_path / "raw")
    assert table.channels == ("T1", "T1ce", "T2", "FLAIR")
    assert [(r.name, r.labels, r.writes) for r in table.regions] == [
        ("whole_tumor", (1, 2, 3), 2),
        ("tumor_core", (1, 3), 1),
        ("enhancing_tumor", (3,), 3),
    ]


def test_values_are_changed_as_the_file_means_them(main, tmp_path):
    source = make("brats21", tmp_path / "download")
    path = source / "BraTS2021_00002/BraTS2021_00002_seg.nii.gz"
    values = np.asarray(nibabel.load(path).dataobj)
    image = nibabel.Nifti1Image((2 * values).astype(np.uint8), nibabel.load(path).affine)
    image.header.set_slope_inter(0.5, 0)
    nibabel.save(image, path)
    np.testing.assert_array_equal(nibabel.load(path).get_fdata(), values)
    assert main(["brats21", f"--source={source}", f"--output={tmp_path / 'raw'}"]) == 0
    after = nibabel.load(tmp_path / "raw/labelsTr/BraTS2021_00002.nii.gz")
    np.testing.assert_array_equal(after.get_fdata(), np.where(values == 4, 3, values))


def test_copies_stand_alone(main, tmp_path):
    source = make("kits23", tmp_path / "download")
    assert main(["kits23", f"--source={source}", f"--output={tmp_path / 'raw'}", "--copy"]) == 0
    shutil.rmtree(source)
    assert nibabel.load(tmp_path / "raw/imagesTr/kits_00003_0000.nii.gz").shape == SHAPE


def remove(path):
    return lambda folder: (folder / path).unlink()


def rewrite(path, **changes):
    def change(folder):
        content = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(content | changes))

    return change


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("btcv", remove("RawData/Training/label/label0022.nii.gz"), "label0022.nii.gz: no such file"),
        ("btcv", lambda folder: shutil.rmtree(folder / "RawData"), "found no img/img*.nii.gz"),
        ("amos22", remove("imagesVa/amos_0008.nii.gz"), "amos_0008.nii.gz: no such file"),
        ("amos22", rewrite("dataset.json", validation=None), "no list 'validation'"),
        ("ct_org", remove("OrganSegmentations/labels-21.nii.gz"), "labels-21.nii.gz: no such file"),
        ("kits23", remove("dataset/case_00001/imaging.nii.gz"), "fetches images with kits23_download_data"),
        ("brats21", remove("BraTS2021_00003/BraTS2021_00003_t2.nii.gz"), "_00003_t2.nii.gz: no such file"),
        (
            "brats21",
            lambda folder: segmentation(folder / "BraTS2021_00003/BraTS2021_00003_seg.nii.gz", [1, 3]),
            "label value 3, expected 0, 1, 2, 4",
        ),
        (
            "msd_lung",
            rewrite("dataset.json", labels={"0": "background", "1": "liver"}),
            "those of Task06_Lung",
        ),
        ("msd_spleen", rewrite("dataset.json", training=[{"image": "a"}]), "training[0] is {'image': 'a'}"),
    ],
)
def test_other_layouts_are_refused_in_one_line(main, tmp_path, capsys, name, spoil, says):
    source = make(name, tmp_path / "download")
    spoil(source)
    assert main([name, f"--source={source}", f"--output={tmp_path / 'raw'}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert says in printed
    assert [path.name for path in tmp_path.iterdir()] == ["download"]


def test_an_output_that_is_there_is_left_alone(main, tmp_path, capsys):
    source = make("kits23", tmp_path / "download")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine").touch()
    assert main(["kits23", f"--source={source}", f"--output={tmp_path / 'raw'}"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["kits23", "--source=nowhere", f"--output={tmp_path / 'other'}"]) == 2
    assert "no such folder" in capsys.readouterr().err
