"""Geometry: every orientation, oblique and sheared affines, against nibabel's affine arithmetic and SciPy."""

import itertools

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from mambamim_jax.data import nifti, organ_volumes, volume
from tests.data import ct_files

ORIENTATIONS = [
    "".join(codes[n] for n in order)
    for codes in itertools.product("RL", "AP", "SI")
    for order in itertools.permutations(range(3))
]
SPACING = (1.5, 1.5, 1.5)


def world_grid(affine, shape):
    return np.einsum("ij,jhwd->ihwd", affine[:3, :3], np.indices(shape)) + affine[:3, 3, None, None, None]


def independent(voxels, affine, out: volume.Volume, order=1):
    """Values of a stored array at the voxels of ``out``, through the inverse affine and SciPy; and where
    inside.
    """
    world = world_grid(out.affine, out.voxels.shape).reshape(3, -1)
    index = np.linalg.inv(affine)[:3, :3] @ world + np.linalg.inv(affine)[:3, 3:]
    last = np.array(voxels.shape)[:, None] - 1
    inside = ((index > -1e-4) & (index < last + 1e-4)).all(axis=0)
    values = ndimage.map_coordinates(voxels.astype(np.float64), index, order=order, mode="nearest")
    return values.reshape(out.voxels.shape), inside.reshape(out.voxels.shape)


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_lands_on_the_same_places(codes):
    affine = ct_files.affine_of(codes, spacing=(2.0, 1.2, 3.1))
    voxels = ct_files.ramp((9, 8, 7), affine)
    out = volume.resample(volume.Volume(voxels, affine), SPACING)
    assert nibabel.aff2axcodes(out.affine) == ("R", "A", "S")
    assert np.array_equal(np.diag(out.affine)[:3], SPACING)
    expected, inside = independent(voxels, affine, out)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(out.voxels[inside], expected[inside], atol=1e-3)
    # the edge is repeated beyond the last centre
    np.testing.assert_allclose(out.voxels, expected, atol=1e-3)


def test_size_and_origin_follow_the_usual_grid():
    affine = ct_files.affine_of("LPS", spacing=(0.75, 1.366, 2.5))
    shape = (10, 115, 129)  # 0.75 mm: (n - 1) s / 1.5 is exactly halfway, and rounds to even after adding one
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.zeros(shape, np.int16), affine))
    out = volume.resample(volume.Volume(np.zeros(shape, np.int16), affine), SPACING)
    steps = (np.array(shape) - 1) * [0.75, 1.366, 2.5] / 1.5
    assert out.voxels.shape == tuple(int(n) for n in np.round(steps + 1))
    np.testing.assert_allclose(out.affine[:3, 3], canonical.affine[:3, 3])


def sheared(angle):
    affine = ct_files.affine_of("LPS", spacing=(1.0, 1.0, 2.5))
    affine[:3, 1] = ct_files.rotation(angle) @ affine[:3, 1]
    return affine


def oblique(angle, axis=0, codes="LPS"):
    affine = ct_files.affine_of(codes, spacing=(1.1, 1.1, 2.5))
    affine[:3, :3] = ct_files.rotation(angle, axis) @ affine[:3, :3]
    return affine


@pytest.mark.parametrize(
    "affine",
    [sheared(16.5), sheared(-20), oblique(16.5), oblique(40, 2, "RAS"), oblique(-3, 1, "PLI")],
    ids=["tilt", "tilt back", "oblique", "far oblique", "PLI"],
)
def test_tilted_volumes_are_put_straight(affine):
    voxels = ct_files.ramp((18, 17, 12), affine)
    out = volume.resample(volume.Volume(voxels, affine), SPACING)
    assert nibabel.aff2axcodes(out.affine) == ("R", "A", "S")
    expected, inside = independent(voxels, affine, out)
    assert inside.mean() > 0.2
    np.testing.assert_allclose(out.voxels[inside], expected[inside], atol=0.02)
    outside = ndimage.binary_erosion(~inside, iterations=1)
    assert (out.voxels[outside] == volume.AIR).all()
    corners = (affine @ volume._corners(voxels.shape))[:3]
    box = (out.affine @ volume._corners(out.voxels.shape))[:3]
    np.testing.assert_allclose(box.min(axis=1), corners.min(axis=1), atol=1e-6)
    np.testing.assert_allclose(box.max(axis=1), corners.max(axis=1), atol=0.76)


def test_labels_take_the_nearest_voxel_and_keep_their_volume():
    affine = ct_files.affine_of("LPI", spacing=(3.0, 3.0, 3.0))
    label = np.zeros((20, 22, 24), np.uint8)
    label[4:12, 5:15, 6:20] = 3
    label[13:19, 5:15, 6:20] = 200
    out = volume.resample(volume.Volume(label, affine), SPACING, label=True, dtype=np.uint16)
    assert set(np.unique(out.voxels)) == {0, 3, 200}
    for value in (3, 200):
        before, after = (label == value).sum() * 27.0, (out.voxels == value).sum() * 1.5**3
        assert abs(after / before - 1) < 0.01


@pytest.mark.parametrize("spacing", [3.0, 2.0, 1.0, 5.0, 0.6, np.float32(0.6), np.float32(3.0) * 1.0000001])
@pytest.mark.parametrize("backwards", [False, True])
def test_labels_are_not_moved_against_the_image(spacing, backwards):
    """Where samples lie halfway between stored voxels, as many take the lower one as the upper one."""
    places = np.arange(121, dtype=np.uint16)[:, None, None] * np.ones((1, 2, 2), np.uint16)
    affine = np.diag([-spacing if backwards else spacing, 1.5, 1.5, 1.0])
    stored = volume.Volume(places, affine)
    label = volume.resample(stored, SPACING, label=True).voxels[:, 0, 0]
    image = volume.resample(stored, SPACING).voxels[:, 0, 0]
    assert np.abs(label - image).max() == pytest.approx(0.5, abs=1e-3)
    assert abs((label - image).mean()) < 0.01


def test_labels_of_a_tilted_scan_are_not_moved_either():
    """The axis about which the gantry is tilted is as straight as ever."""
    places = np.arange(121, dtype=np.uint16)[:, None, None] * np.ones((1, 12, 8), np.uint16)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[1, 2] = 0.7
    label = volume.resample(volume.Volume(places, affine), SPACING, label=True).voxels.max((1, 2))
    moved = label - np.arange(len(label)) * 1.5
    assert np.abs(moved).max() <= 0.5
    for half in (moved[:40], moved[40:]):
        assert abs(half.mean()) < 0.02


@pytest.mark.parametrize("affine", [oblique(16.5), oblique(40, 2, "RAS"), oblique(-3, 1, "PLI")])
def test_labels_of_tilted_scans_take_the_nearest_voxel(affine):
    stored = np.random.default_rng(0).integers(1, 9, (18, 17, 12)).astype(np.uint8)
    out = volume.resample(volume.Volume(stored, affine, 2.0), SPACING, label=True, dtype=np.uint16)
    expected, inside = independent(2 * stored, affine, out, order=0)
    assert (out.voxels[inside] == expected[inside]).mean() > 0.99
    assert (out.voxels[ndimage.binary_erosion(~inside)] == 0).all()


@pytest.mark.parametrize("codes", ["LPS", "RAI", "SLA", "AIR"])
@pytest.mark.parametrize("angle", [0, 10])
def test_labels_do_not_depend_on_the_order_that_they_are_stored_in(angle, codes):
    """Nor where samples lie halfway between two voxels, as along x here."""
    affine = ct_files.rotation(angle) @ np.diag([3.0, 0.8, 0.8])
    affine = nibabel.affines.from_matvec(affine, [-20.0, 10.0, 300.0])
    label = np.random.default_rng(0).integers(1, 9, (10, 24, 22)).astype(np.uint8)
    stored = nibabel.Nifti1Image(label, affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes)
    )
    turned = stored.as_reoriented(turn)
    first, other = (
        volume.resample(volume.Volume(np.asarray(v.dataobj), v.affine), SPACING, label=True, dtype=np.uint16)
        for v in (stored, turned)
    )
    np.testing.assert_array_equal(other.voxels, first.voxels)
    np.testing.assert_allclose(other.affine, first.affine, atol=1e-9)


def test_slope_and_integer_storage():
    affine = ct_files.affine_of("RAS", spacing=SPACING)
    stored = np.arange(6 * 7 * 8, dtype=np.uint16).reshape(6, 7, 8)
    out = volume.resample(volume.Volume(stored, affine, 2.5, -1024.0), SPACING, dtype=np.int16)
    assert np.array_equal(out.voxels, np.rint(stored * 2.5 - 1024).astype(np.int16))
    extreme = volume.Volume(np.full((3, 3, 3), 1e6, np.float32), affine)
    assert (volume.resample(extreme, SPACING, dtype=np.int16).voxels == 32767).all()


def test_same_grid_in_another_orientation_or_not():
    image = volume.Volume(np.zeros((9, 8, 7), np.int16), ct_files.affine_of("LPS"))
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(image.voxels, image.affine))
    assert volume.same_grid(image, volume.Volume(turned.get_fdata(), turned.affine))
    moved = image.affine.copy()
    moved[2, 3] += 1.0
    assert not volume.same_grid(image, volume.Volume(image.voxels, moved))
    assert not volume.same_grid(image, volume.Volume(image.voxels[:-1], image.affine))
    mirrored = image.affine.copy()
    mirrored[0, 0] *= -1
    assert not volume.same_grid(image, volume.Volume(image.voxels, mirrored))
    tilted = oblique(10)
    turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(image.voxels, tilted))
    assert volume.same_grid(
        volume.Volume(image.voxels, tilted), volume.Volume(turned.get_fdata(), turned.affine)
    )


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SLA", "AIR"])
def test_what_is_nearly_on_a_grid_is_put_on_just_that(codes):
    image = volume.Volume(np.zeros((9, 8, 7), np.int16), ct_files.affine_of("LPS"))
    image.affine[2, 2] += 0.01
    stored = nibabel.Nifti1Image(image.voxels, image.affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(codes)
    )
    turned = stored.as_reoriented(turn)
    moved = turned.affine.copy()
    moved[:3, 3] += 0.3
    near = volume.on_grid_of(volume.Volume(np.asarray(turned.dataobj), moved, 2.0, 1.0), image)
    np.testing.assert_allclose(near.affine, turned.affine, atol=1e-9)
    assert (near.slope, near.intercept) == (2.0, 1.0)


def test_window_and_foreground():
    hu = np.full((5, 6, 7), -1000, np.int16)
    assert volume.foreground_box(hu, -175.0) is None
    hu[1:3, 2:6, 4] = (-174, 250)[0]
    hu[2, 3, 4] = 3000
    assert volume.foreground_box(hu, -175.0).tolist() == [[1, 2, 4], [3, 6, 5]]
    scaled = volume.window_intensity(hu, (-175.0, 250.0))
    assert scaled.dtype == np.float32
    assert scaled[2, 3, 4] == 1.0
    assert scaled[0, 0, 0] == 0.0
    np.testing.assert_allclose(scaled[1, 2, 4], 1 / 425, rtol=1e-6)


@ct_files.needs_shared
@pytest.mark.parametrize(
    "name",
    [
        "elastix_lung_2p5mm",
        "phantom_head_1mm_32sl",
        "phantom_head_5mm_sclinter",
        "ts_abdomen_sm_3mm",
        "ts_aorta_1p5mm",
        "ts_body_512x512x20",
        "ts_heart_1p5mm",
        "ts_trunk_3mm",
        "../Dataset501_OpenKBP/imagesTr/kbp_001_0000",
        "../hard/phantom_head_tilt16p5_18sl",
        "../hard/ct_gantrytilt_uint8_slope7p1",
    ],
)
def test_real_volumes_land_where_nibabel_says(name):
    path = ct_files.SHARED / "ct" / f"{name}.nii.gz"
    out = volume.resample(nifti.read(path), SPACING)
    image = nibabel.load(path)
    voxels = np.asarray(image.dataobj, np.float32)
    rng = np.random.default_rng(0)
    picks = np.stack([rng.integers(0, n, 4000) for n in out.voxels.shape])
    world = out.affine[:3, :3] @ picks + out.affine[:3, 3:]
    inverse = np.linalg.inv(image.affine)
    index = inverse[:3, :3] @ world + inverse[:3, 3:]
    inside = ((index > 0) & (index < np.array(voxels.shape)[:, None] - 1)).all(axis=0)
    assert inside.mean() > 0.4
    expected = ndimage.map_coordinates(voxels, index[:, inside], order=1, mode="nearest", output=np.float64)
    np.testing.assert_allclose(out.voxels[tuple(picks[:, inside])], expected, atol=0.05)


@ct_files.needs_shared
@pytest.mark.parametrize(
    "name", ["ts_abdomen_sm_3mm", "ts_body_512x512x20", "ts_trunk_3mm", "ts_aorta_1p5mm"]
)
def test_real_labels_keep_their_volumes_and_places(name):
    image = nifti.read(ct_files.SHARED / "ct" / f"{name}.nii.gz")
    path = ct_files.SHARED / "ct" / f"{name}_label.nii.gz"
    label = nifti.read(path, label=True)
    assert volume.same_grid(image, label)
    hu = volume.resample(image, SPACING, dtype=np.int16)
    out = volume.resample(label, SPACING, label=True, dtype=np.uint16)
    organ_volumes.keep_volumes(out, label)
    assert out.voxels.shape == hu.voxels.shape
    np.testing.assert_allclose(out.affine, hu.affine, atol=0.01)
    # where a scan's end cuts an organ, half of its last voxel lies beyond the last centre: look at whole
    # organs
    stored = np.asarray(nibabel.load(path).dataobj)
    cell = float(np.prod(image.spacing))
    edges = {int(v) for axis in range(3) for end in (0, -1) for v in np.unique(np.take(stored, end, axis))}
    whole = [v for v in np.unique(stored) if v not in edges and (stored == v).sum() * cell > 20_000]
    for value in whole:
        before, after = (stored == value).sum() * cell, (out.voxels == value).sum() * 1.5**3
        assert abs(after / before - 1) < 0.01, value


@ct_files.needs_shared
@pytest.mark.parametrize(
    "name",
    ["ct/ts_body_512x512x20_label", "ct/ts_trunk_3mm_label", "Dataset501_OpenKBP/labelsTr/kbp_024"],
)
def test_real_labels_take_the_nearest_voxel(name):
    path = ct_files.SHARED / f"{name}.nii.gz"
    out = volume.resample(nifti.read(path, label=True), SPACING, label=True, dtype=np.uint16)
    image = nibabel.load(path)
    stored = np.asarray(image.dataobj)
    picks = np.stack([np.random.default_rng(0).integers(0, n, 20_000) for n in out.voxels.shape])
    index = np.linalg.inv(image.affine)[:3] @ np.vstack(
        [out.affine[:3] @ np.vstack([picks, np.ones(20_000)]), np.ones(20_000)]
    )
    # halfway between two voxels either will do, and beyond the last centre the edge is repeated
    clear = (np.abs(index - np.floor(index) - 0.5) > 1e-3).all(axis=0)
    assert clear.mean() > 0.1
    nearest = np.clip(np.rint(index), 0, np.array(stored.shape)[:, None] - 1).astype(int)
    assert np.array_equal(out.voxels[tuple(picks)][clear], stored[tuple(nearest)][clear])


def test_a_volume_at_the_spacing_asked_for_is_only_turned():
    stored = np.random.default_rng(0).integers(-1024, 3000, (9, 8, 7)).astype(np.int16)
    image = nibabel.Nifti1Image(stored, ct_files.affine_of("LPI", spacing=SPACING))
    for dtype in (np.int16, np.float32):
        out = volume.resample(volume.Volume(stored, image.affine), SPACING, dtype=dtype)
        assert out.voxels.dtype == dtype
        assert np.array_equal(out.voxels, np.asarray(nibabel.as_closest_canonical(image).dataobj))
