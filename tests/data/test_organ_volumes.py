"""Labels keep the volume that they have within the resampled grid, cut by the scan's end or inside an organ."""

import numpy as np
import pytest
from scipy import ndimage

from mambamim_jax.data import organ_volumes, volume
from mambamim_jax.data.volume import Volume
from tests.data import ct_files

SPACING = (1.5, 1.5, 1.5)


def kept(stored, spacing=SPACING):
    resampled = volume.resample(stored, spacing, label=True, dtype=np.uint16)
    organ_volumes.keep_volumes(resampled, stored)
    return resampled


def within(stored, resampled, points=1_000_000):
    """Voxels of the resampled grid that the organ fills, by asking at random points of it."""
    size = np.array(resampled.voxels.shape)
    at = np.random.default_rng(0).uniform(-0.5, size - 0.5, (points, 3)).T
    to_stored = np.linalg.inv(stored.affine) @ resampled.affine
    index, last = to_stored[:3, :3] @ at + to_stored[:3, 3:], np.array(stored.voxels.shape)[:, None] - 1
    tilted = volume.straight_axes(stored.affine, stored.voxels.shape) is None
    scanned = ((index >= 0) & (index <= last)).all(0) if tilted else True
    nearest = np.clip(np.rint(index), 0, last).astype(int)
    return ((stored.voxels[tuple(nearest)] == 1) & scanned).mean() * size.prod()


@pytest.mark.parametrize("slices", [3, 4, 20])
@pytest.mark.parametrize("thickness", [1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize(("along", "backwards"), [(0, False), (1, True), (2, False), (2, True)])
def test_a_cylinder_through_the_whole_scan_stays_as_wide_as_it_is(slices, thickness, along, backwards):
    x, y = np.ogrid[:20, :20]
    disk = ((x - 9.4) ** 2 + (y - 9.4) ** 2 <= 5.0**2).astype(np.uint8)
    voxels = np.moveaxis(np.repeat(disk[..., None], slices, 2), 2, along)
    affine = np.diag([*np.insert([3.0, 3.0], along, -thickness if backwards else thickness), 1.0])
    areas = kept(Volume(voxels, affine)).voxels.astype(bool)
    areas = areas.sum(tuple(axis for axis in range(3) if axis != along)) * 1.5**2
    assert areas.mean() == pytest.approx(disk.sum() * 9.0, rel=0.01)


def oblique():
    affine = ct_files.affine_of("LPS", spacing=(2.9, 3.1, 4.0))
    affine[:3, :3] = ct_files.rotation(20, 1) @ affine[:3, :3]
    return affine


@pytest.mark.parametrize("seed", range(4))
def test_no_organ_is_widened_into_what_a_tilted_scan_does_not_hold(seed):
    voxels, rng = np.zeros((11, 12, 9), np.uint8), np.random.default_rng(seed)
    first = rng.integers(0, 6, 3)
    stop = first + rng.integers(2, 6, 3)
    voxels[first[0] :, first[1] : stop[1], first[2] : stop[2]] = 1
    stored = Volume(voxels, oblique())
    nearest = volume.resample(stored, SPACING, label=True, dtype=np.uint16)
    changed = np.argwhere(kept(stored).voxels != nearest.voxels)
    assert len(changed)
    to_stored = np.linalg.inv(stored.affine) @ nearest.affine
    index = changed @ to_stored[:3, :3].T + to_stored[:3, 3]
    assert ((index >= 0) & (index <= np.array(voxels.shape) - 1)).all()


@pytest.mark.parametrize("where", [(0, 0, 0), (0, 1, 0), (1, 1, 1)])
@pytest.mark.parametrize(
    "affine",
    [ct_files.affine_of("RAS", (2.9, 3.1, 5.0)), ct_files.affine_of("SLP", (4.0, 2.9, 3.1)), oblique()],
    ids=["straight", "turned", "oblique"],
)
def test_an_organ_in_a_corner_has_what_the_grid_has_of_it(affine, where):
    voxels = np.zeros((11, 12, 9), np.uint8)
    voxels[tuple(slice(6, None) if end else slice(0, 5) for end in where)] = 1
    stored = Volume(voxels, affine)
    found = kept(stored)
    assert (found.voxels == 1).sum() == pytest.approx(within(stored, found), rel=0.012)


@pytest.mark.parametrize("orientation", ["LPI", "RAS", "oblique"])
@pytest.mark.parametrize("stored", [np.uint8, np.float32])
def test_organ_volumes_are_kept_at_the_border_with_the_background(orientation, stored):
    affine = ct_files.affine_of("RAS" if orientation == "oblique" else orientation, spacing=(4.1, 3.9, 2.5))
    if orientation == "oblique":
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
        affine = turn @ affine
    i, j, k = np.ogrid[:30, :30, :30]
    label = np.zeros((30, 30, 30), stored)
    for value, centre, radius in (
        (1, (8, 8, 8), 3),
        (2, (20, 9, 12), 5),
        (3, (12, 21, 20), 2),
        (900, (24, 24, 24), 4),
    ):
        value = value if stored == np.float32 else min(value, 200)
        inside = sum((x - c) ** 2 for x, c in zip((i, j, k), centre)) <= radius**2
        label[inside] = value
    before = Volume(label, affine)
    nearest = volume.resample(before, SPACING, label=True, dtype=np.uint16)
    kept = volume.resample(before, SPACING, label=True, dtype=np.uint16)
    organ_volumes.keep_volumes(kept, before)
    share = abs(np.linalg.det(affine[:3, :3])) / 1.5**3
    errors = []
    for value in np.unique(label)[1:]:
        expected = (label == value).sum() * share
        errors.append(abs((nearest.voxels == value).sum() / expected - 1))
        assert abs((kept.voxels == value).sum() / expected - 1) < 0.01
    assert max(errors) > 0.01  # there was something to do
    changed = nearest.voxels != kept.voxels
    assert ((nearest.voxels == 0) | (kept.voxels == 0))[changed].all()
    # no voxel moves farther than a stored one
    structure = np.ones([2 * int(np.ceil(4.1 / 1.5)) + 1] * 3)
    for value in np.unique(label)[1:]:
        inside = nearest.voxels == value
        assert ndimage.binary_dilation(inside, structure)[kept.voxels == value].all()
        assert (kept.voxels == value)[ndimage.binary_erosion(inside, structure)].all()


def ball(at, spacing, centre, radius):
    return sum(((x - c) * s) ** 2 for x, c, s in zip(at, centre, spacing)) <= radius**2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("radius", [3.2, 5.0])
@pytest.mark.parametrize("spacing", [(3.0, 3.0, 3.0), (2.0, 2.0, 2.0), (0.8, 0.8, 3.0)])
def test_a_lesion_and_the_organ_around_it_keep_their_volumes(spacing, radius, seed):
    """At 3 mm the nearest voxel makes three of a stored one or one, by whether it lies at an even place."""
    size = [int(60 / s) for s in spacing]
    centre = np.array(size) / 2 + np.random.default_rng(seed).uniform(-1, 1, 3)
    at, label = np.ogrid[tuple(map(slice, size))], np.zeros(size, np.uint8)
    label[ball(at, spacing, centre, 24)] = 1
    label[ball(at, spacing, centre, radius)] = 2
    out = kept(Volume(label, np.diag([*spacing, 1.0]))).voxels
    for value, most in ((1, 0.006), (2, 0.05)):
        expected = (label == value).sum() * np.prod(spacing) / 1.5**3
        assert (out == value).sum() == pytest.approx(expected, rel=most)
    places = [np.argwhere(a == 2).mean(0) * s for a, s in ((label, np.array(spacing)), (out, 1.5))]
    np.testing.assert_allclose(*places, atol=1.5)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_labels_within_labels_all_keep_their_volumes(order):
    """Whatever their values: a label that is right is not changed for the sake of the next."""
    at, label = np.ogrid[:24, :24, :24], np.zeros((24, 24, 24), np.int16)
    for value, centre, radius in zip(order, ((12, 12, 12), (10, 12, 13), (9, 12, 13)), (27, 13, 7)):
        label[ball(at, (3.0, 3.0, 3.0), centre, radius)] = value
    out = kept(Volume(label, ct_files.affine_of("LPS", (3.0, 3.0, 3.0)))).voxels
    for value in order:
        assert (out == value).sum() == pytest.approx((label == value).sum() * 8, rel=0.006)


def test_what_a_lesion_gives_up_is_of_the_organ_around_it():
    label = np.ones((9, 9, 9), np.uint8)
    label[:, :, :4], label[4, 4, 6] = 7, 2
    out = kept(Volume(label, np.diag([3.0, 3.0, 3.0, 1.0]))).voxels
    assert (out == 2).sum() == 8
    assert np.unique(out[6:11, 6:11, 10:15]).tolist() == [1, 2]
