"""Several channels without a scale of their own (MRI): z-scores on one grid, and crops of them."""

import json

import nibabel
import numpy as np
import pytest

from mambamim_jax.data import augment, datasets, nifti, store, volume
from mambamim_jax.data.labelled import LabelledLoader
from mambamim_jax.evaluate.inputs import read_scan
from tests.data import ct_files

RULES = ({"kind": "zscore"}, {"kind": "zscore"})
SPACING = (2.0, 2.0, 2.0)


def dataset(folder, count=3):
    """An nnU-Net raw set of two channels, skull-stripped: the second one stored the other way round."""
    names = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "lesion": 1}}
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(names | {"file_ending": ".nii.gz"}))
    for n in range(count):
        body = ct_files.body((24, 22, 16 + n), seed=n)
        inside, rng = body > -500, np.random.default_rng(n)
        label = np.zeros(body.shape, np.uint8)
        label[10:13, 9:13, 7:10] = 1
        affine = ct_files.affine_of("LPS")
        for channel in range(2):
            values = np.where(inside, 300 + 200 * channel + 50 * rng.normal(size=body.shape), 0)
            values[label == 1] += 400.0
            image = nibabel.Nifti1Image(values.astype(np.float32), affine)
            if channel:
                image = nibabel.as_closest_canonical(image)
            voxels = np.asarray(image.dataobj)
            ct_files.write(folder / "imagesTr" / f"case_{n}_000{channel}.nii.gz", voxels, image.affine)
        ct_files.write(folder / "labelsTr" / f"case_{n}.nii.gz", label, affine)
    return folder


def prepare(source, folder, **options):
    options = {"spacing": SPACING, "workers": 1, "intensity": "zscore", **options}
    return store.prepare(datasets.discover(source), folder, **options)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channels")
    return prepare(dataset(folder / "source"), folder / "store")


def test_the_store_holds_z_scores_of_each_channel(prepared):
    source = prepared.entries[0].source
    image, label = prepared.image(0), prepared.label(0)[:]
    assert image.dtype == np.float16
    assert image.shape == (*label.shape, 2)
    for channel in range(2):
        raw = nifti.read(f"{source}/imagesTr/case_0_000{channel}.nii.gz", hu=False)
        values = volume.resample(raw, SPACING, outside=0.0).voxels
        known = values[values != 0]
        expected = np.where(values != 0, (values - known.mean()) / known.std(), 0)
        np.testing.assert_allclose(image[..., channel], expected, atol=4e-3)
        assert image[..., channel][label == 1].mean() > 1
    box, counts = prepared.foreground(0, -175.0)
    inside = (image != 0).any(-1)
    assert counts.sum() == inside.sum()
    assert [int(n) for n in box[1] - box[0]] == [int(np.ptp(np.nonzero(inside)[a])) + 1 for a in range(3)]
    assert store.open_store(prepared.folder).normalised


def test_crops_of_them(prepared):
    options = {"crop": (16, 16, 16), "crops_per_volume": 2, "volumes_per_batch": 2, "normalisation": RULES}
    how = augment.Augmentation(rotate=0.5, zoom=0.5, noise=0.0)
    batch = LabelledLoader(prepared, **options, positive=1.0, how=how).batch(0)
    assert batch["image"].shape == (4, 16, 16, 16, 2)
    assert batch["image"].dtype == np.float32
    lesion = batch["label"] == 1
    assert lesion.reshape(4, -1).any(axis=1).all()
    assert batch["image"][lesion].mean() > 1
    anywhere = LabelledLoader(prepared, **options, positive=0.0).batch(1)
    assert (anywhere["image"].reshape(4, -1) != 0).any(axis=1).all()


def test_channels_within_half_a_millimetre_come_out_on_the_grid_of_the_first(tmp_path):
    shape, affines = (20, 20, 197), [np.diag([1.0, 1.0, third, 1.0]) for third in (2.002, 2.0)]
    sizes = {volume.resample(volume.Volume(np.zeros(shape), a), (1.5,) * 3).voxels.shape for a in affines}
    assert len(sizes) == 2
    images = [
        ct_files.write(tmp_path / f"a_000{n}.nii.gz", np.maximum(ct_files.body(shape, seed=n), 0), affine)
        for n, affine in enumerate(affines)
    ]
    case = datasets.Case("a", tuple(images), None, "made up")
    prepared = store.prepare([case], tmp_path / "store", workers=0, intensity="zscore")
    scan = read_scan(images, {"spacing": (1.5,) * 3, "normalisation": RULES})
    np.testing.assert_allclose(prepared.image(0), scan.image, atol=2e-3)


def test_what_cannot_be(prepared, tmp_path):
    source = dataset(tmp_path / "source", 1)
    second = source / "imagesTr" / "case_0_0001.nii.gz"
    image = nibabel.load(second)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj)[1:], image.affine), second)
    with pytest.raises(store.DataLossError, match=r"case_0_0001\.nii\.gz: not on the grid of case_0_0000"):
        prepare(source, tmp_path / "a")
    with pytest.raises(store.DataLossError, match="2 channels, CT has one"):
        prepare(source, tmp_path / "b", intensity="hu")
    with pytest.raises(store.StoreError, match="made with intensity zscore, asked for hu"):
        prepare(source, prepared.folder, intensity="hu")
