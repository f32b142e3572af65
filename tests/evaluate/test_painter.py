"""Labels on the scan's grid against plain interpolation of every voxel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import ndimage

from mambamim_jax.data.volume import Volume, resample
from mambamim_jax.evaluate.labels import decide
from mambamim_jax.evaluate.painter import SCALE, Painter, place

SHAPE, CLASSES = (22, 18, 14), 4


def axes(codes: str, spacing=(2.0, 2.5, 3.0), turn: float = 0.0, shear: float = 0.0) -> np.ndarray:
    """Affine of a scan stored along codes such as LPS, turned by degrees about the first axis, or sheared."""
    affine = np.eye(4)
    for stored, code in enumerate(codes):
        world = next(n for n, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        affine[:3, stored] = 0
        affine[world, stored] = spacing[stored] * (1 if code in "RAS" else -1)
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    about_x, about_z = (
        np.array([[1, 0, 0], [0, c, -s], [0, s, c]]),
        np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]),
    )
    sheared = np.eye(3)
    sheared[1, 2] = shear
    affine[:3, :3] = (about_x @ about_z if turn > 15 else about_x) @ sheared @ affine[:3, :3]
    affine[:3, 3] = (-30.0, 12.0, 100.0)
    return affine


SCANS = {
    "RAS": axes("RAS"),
    "LPS": axes("LPS"),
    "permuted": axes("PIR"),
    "sagittal": axes("SRA", (3.0, 2.0, 2.0)),
    "tilted": axes("LPS", turn=10.0),
    "oblique": axes("LAS", turn=25.0),
    "sheared": axes("RAS", shear=0.3),
}


def grid_of(affine, shape=SHAPE, spacing=(3.0, 2.0, 4.0)):
    """The network's grid of a scan, as resampling makes it, with random smooth probabilities on it."""
    grid = resample(Volume(np.zeros(shape, np.float32), affine), spacing)
    noise = np.random.default_rng(0).standard_normal((*grid.voxels.shape, CLASSES))
    logits = 30 * ndimage.gaussian_filter(noise, (2, 2, 2, 0))
    return grid.affine, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def paint(probability, affine, grid_affine, box, axis, regions=None, kept=None, shape=SHAPE):
    """Slabs of one to five slices."""
    placement = place(affine, shape, grid_affine, probability.shape[:3], box)
    painter = Painter(shape, placement, axis, CLASSES, regions, kept)
    inside = probability[tuple(slice(*ends) for ends in box.T)].astype(np.float32)
    start = 0
    for thickness in itertools.cycle((1, 5, 3, 2)):
        if start >= inside.shape[axis]:
            return painter.labels.transpose(2, 1, 0)
        stop = min(start + thickness, inside.shape[axis])
        painter.add(start, np.take(inside, range(start, stop), axis))
        start = stop
    raise AssertionError


def plain(probability, affine, grid_affine, shape=SHAPE):
    """Every voxel's interpolated probabilities (i, j, k, classes)."""
    index = np.indices(shape).reshape(3, -1)
    where = np.linalg.inv(grid_affine) @ affine @ np.concatenate([index, np.ones((1, index.shape[1]))])
    channels = [
        ndimage.map_coordinates(p, where[:3], order=1, mode="nearest")
        for p in np.moveaxis(probability, -1, 0)
    ]
    return np.stack(channels, -1).reshape(*shape, -1)


def whole(probability):
    return np.array([(0, 0, 0), probability.shape[:3]])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("scan", SCANS)
def test_equals_interpolating_every_voxel(scan, axis):
    grid_affine, probability = grid_of(SCANS[scan])
    expected = plain(probability, SCANS[scan], grid_affine)
    found = paint(probability, SCANS[scan], grid_affine, whole(probability), axis)
    highest = np.sort(expected, axis=-1)
    clear = highest[..., -1] - highest[..., -2] > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], decide(expected)[clear])
    assert len(np.unique(found)) == CLASSES


@pytest.mark.parametrize("scan", ["permuted", "oblique"])
def test_probabilities_are_kept(scan):
    grid_affine, probability = grid_of(SCANS[scan])
    kept = np.zeros((CLASSES, *SHAPE[::-1]), np.uint16)
    labels = paint(probability, SCANS[scan], grid_affine, whole(probability), 2, kept=kept)
    expected = plain(probability, SCANS[scan], grid_affine)
    np.testing.assert_allclose(kept.transpose(3, 2, 1, 0) / SCALE, expected, atol=2e-5)
    assert (labels == kept.transpose(3, 2, 1, 0).argmax(-1)).mean() > 0.999


@pytest.mark.parametrize("scan", ["LPS", "tilted", "oblique"])
def test_outside_the_box_is_background(scan):
    grid_affine, probability = grid_of(SCANS[scan])
    box = np.array([(2, 0, 3), np.array(probability.shape[:3]) - (4, 5, 0)])
    kept = np.zeros((CLASSES, *SHAPE[::-1]), np.uint16)
    found = paint(probability, SCANS[scan], grid_affine, box, 2, kept=kept)
    kept = kept.transpose(3, 2, 1, 0)
    index = np.indices(SHAPE).reshape(3, -1)
    where = np.linalg.inv(grid_affine) @ SCANS[scan] @ np.concatenate([index, np.ones((1, index.shape[1]))])
    ends = [
        (2.0, box[1, 0] - 1.0),
        (-9.0, box[1, 1] - 1.0),
        (3.0, 99.0),
    ]  # open where the box ends with the grid
    inside = np.all([(w >= low) & (w <= high) for w, (low, high) in zip(where, ends)], axis=0).reshape(SHAPE)
    near = np.any([np.abs(w - e) < 1e-4 for w, pair in zip(where, ends) for e in pair], axis=0).reshape(SHAPE)
    expected = np.where(inside, decide(plain(probability, SCANS[scan], grid_affine)), 0)
    assert 0.1 < inside.mean() < 0.9
    assert (found == expected)[~near].mean() > 0.999
    assert not found[~inside & ~near].any()
    assert (kept[~inside & ~near] == [SCALE, 0, 0, 0]).all()
    np.testing.assert_allclose(kept.sum(-1) / SCALE, 1, atol=CLASSES / 2 / SCALE + 1e-6)


def test_regions_are_decided_after_interpolation():
    grid_affine, probability = grid_of(SCANS["sheared"])
    regions = [{"name": str(n), "labels": [n], "writes": n} for n in (2, 1, 4, 3)]
    probability = np.clip(probability * 1.6, 0, 1)
    kept = np.zeros((CLASSES, *SHAPE[::-1]), np.uint16)
    found = paint(probability, SCANS["sheared"], grid_affine, whole(probability), 1, regions, kept)
    expected = plain(probability, SCANS["sheared"], grid_affine)
    clear = (np.abs(expected - 0.5) > 1e-5).all(-1)
    np.testing.assert_array_equal(found[clear], decide(expected, regions)[clear])
    np.testing.assert_allclose(kept.transpose(3, 2, 1, 0) / SCALE, expected, atol=2e-5)


@pytest.mark.parametrize(
    "regions", [None, [{"name": str(n), "labels": [n], "writes": n} for n in (1, 2, 3, 4)]]
)
def test_where_no_slab_comes_is_background(regions):
    kept = np.zeros((CLASSES, *SHAPE[::-1]), np.uint16)
    grid_affine, probability = grid_of(SCANS["oblique"])
    nothing = place(SCANS["oblique"], SHAPE, grid_affine, probability.shape[:3], np.zeros((2, 3), int))
    labels = Painter(SHAPE, nothing, 0, CLASSES, regions, kept).labels
    assert not labels.any()
    assert (kept[0] == (0 if regions else SCALE)).all()
    assert not kept[1:].any()
