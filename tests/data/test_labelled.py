"""Labelled crops: classes where they should be, the same whatever the threads and restarts."""

import nibabel
import numpy as np
import pytest

from mambamim_jax.data import augment, datasets, store
from mambamim_jax.data.labelled import LabelledLoader
from tests.data import ct_files

WINDOW = ({"kind": "window", "low": -175.0, "high": 250.0},)
CROP = (16, 16, 32)


def labelled(folder, count=4):
    """CTs with a large organ and, in the odd ones, a small one."""
    for n in range(count):
        voxels = ct_files.body((20 + 2 * n, 22, 14 + n), seed=n)
        label = (voxels > -500).astype(np.uint8)
        if n % 2:
            label[8:10, 9:11, 6] = 2
        ct_files.write(folder / f"case_{n}.nii.gz", voxels)
        ct_files.write(folder / f"case_{n}_label.nii.gz", label)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    return store.prepare(datasets.discover(labelled(folder / "source")), folder / "store", workers=1)


def loader(prepared, **options):
    sizes = {"crop": CROP, "crops_per_volume": 3, "volumes_per_batch": 2, "normalisation": WINDOW, "seed": 5}
    return LabelledLoader(prepared, **{**sizes, **options})


def test_batches_are_as_promised(prepared):
    batch = next(iter(loader(prepared)))
    assert batch["image"].shape == (6, *CROP, 1)
    assert batch["image"].dtype == np.float32
    assert batch["label"].shape == (6, *CROP)
    assert batch["label"].dtype == np.uint8
    assert 0 <= batch["image"].min() <= batch["image"].max() <= 1
    # soft tissue is bright, wherever its label is
    inside = batch["image"][..., 0][batch["label"] == 1]
    assert inside.mean() > 0.3 > 0.1 > batch["image"][..., 0][batch["label"] == 0].mean()


def test_positive_crops_hold_a_class_and_rare_ones_are_as_likely(prepared):
    odd = prepared.select(["case_1", "case_3"])
    batches = [loader(odd, positive=1.0).batch(n) for n in range(20)]
    labels = np.concatenate([batch["label"] for batch in batches]).reshape(120, -1)
    assert (labels > 0).any(axis=1).all()
    whole = store.Store.label
    share = np.mean([(whole(odd, n)[:] == 2).sum() / (whole(odd, n)[:] > 0).sum() for n in range(2)])
    assert share < 0.02
    assert (labels == 2).any(axis=1).mean() > 0.45


def test_a_class_in_the_air_beyond_the_body_is_in_its_crops(tmp_path):
    voxels = np.full((60, 24, 20), -1000, np.int16)
    voxels[:20] = ct_files.body((20, 24, 20))
    label = np.zeros(voxels.shape, np.uint8)
    label[52:55, 10:14, 8:12] = 1
    for name, array in (("a", voxels), ("a_label", label)):
        ct_files.write(tmp_path / f"{name}.nii.gz", array)
    alone = store.prepare(datasets.discover(tmp_path), tmp_path / "store", workers=0)
    labels = loader(alone, positive=1.0, volumes_per_batch=1, crops_per_volume=12).batch(0)["label"]
    assert (labels.reshape(12, -1) == 1).any(axis=1).all()


@pytest.mark.parametrize("how", [augment.NONE, augment.Augmentation(zoom=0.5, noise=0.5, blur=0.3)])
def test_the_same_whatever_the_threads_and_restarts(prepared, how):
    expected = [loader(prepared, how=how).batch(n) for n in range(5)]
    iterator = iter(loader(prepared, how=how, threads=2))
    for batch in expected[:3]:
        found = next(iterator)
        assert all(np.array_equal(found[name], batch[name]) for name in batch)
    resumed = iter(loader(prepared, how=how, threads=1))
    resumed.set_state(iterator.get_state())
    assert all(np.array_equal(next(resumed)["label"], batch["label"]) for batch in expected[3:])


def test_a_state_of_other_labels_is_refused(tmp_path):
    source = labelled(tmp_path / "source", 2)
    state = iter(loader(store.prepare(datasets.discover(source), tmp_path / "store", workers=1))).get_state()
    path = source / "case_0_label.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(2 * np.asarray(image.dataobj), image.affine), path)
    other = iter(loader(store.prepare(datasets.discover(source), tmp_path / "store", workers=1)))
    with pytest.raises(ValueError, match="saved with sampling"):
        other.set_state(state)
