"""Metrics against cases done by hand, a distance transform, and MONAI's (stored, and live where installed)."""

from __future__ import annotations

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mambamim_jax.evaluate.metrics import METRICS, diagonal, score, surface, surface_distances, union_box

SHAPE = (30, 20, 24)


def cube(first, last, shape=SHAPE):
    """Voxels from first to last, both included."""
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b + 1) for a, b in zip(first, last))] = True
    return mask


def values(scores):
    return tuple(getattr(scores, name) for name in METRICS)


def test_equal_masks():
    found = score(cube((3, 3, 3), (9, 9, 9)), cube((3, 3, 3), (9, 9, 9)), np.diag([1.5, 1.5, 3.0]), 0.0)
    assert values(found) == (1.0, 1.0, 0.0, 1.0)
    assert found.status == "ok"
    assert found.predicted == found.labelled == pytest.approx(343 * 6.75 / 1000)


@pytest.mark.parametrize(
    ("axis", "spacing"), [(0, (2.0, 1.0, 1.0)), (1, (1.0, 0.5, 4.0)), (2, (1.0, 1.0, 2.5))]
)
def test_a_cube_moved_along_one_axis(axis, spacing):
    """10³ voxels moved by 2: the overlap is 8/10. Points of a face are 2 voxels off, or as near as the sides are.

    Of the 488 surface voxels, the 100 of the leading face and the 36 of the ring behind it lie outside the other cube:
    their nearest surface voxels are 2 and 1 steps back along the axis. The two layers at the other end that are inside
    it are nearest to its end face or its sides, whichever is nearer in mm; at the 95th percentile only the face counts.
    """
    a, first, last = cube((5, 5, 5), (14, 14, 14)), [5, 5, 5], [14, 14, 14]
    first[axis], last[axis] = first[axis] + 2, last[axis] + 2
    found = score(a, cube(first, last), np.diag(spacing), 1.01 * spacing[axis])
    assert found.dice == pytest.approx(0.8)
    assert found.iou == pytest.approx(8 / 12)
    assert found.hd95 == pytest.approx(2 * spacing[axis])
    exact = surface_distances(a, cube(first, last), np.diag(spacing))[0]
    outside = np.sort(exact)[-100:]
    assert np.allclose(outside[-64:], 2 * spacing[axis])


def test_cubes_of_different_size_by_hand():
    """A 5³ cube in the middle of a 9³ one, spacing 1 x 1 x 2: 98 and 386 surface voxels.

    From the small cube every surface voxel is 2 voxels from the large one's nearest face: 2 mm along h or w, and at
    most 2 mm for all since each of them (but those of the faces' insides along d, at 4 mm or nearer sideways) has one
    such face; the 9 middle voxels of a d face have the large side 2 + 1 or 2 + 2 voxels away sideways, or 4 mm up.
    """
    small, large = cube((7, 7, 7), (11, 11, 11)), cube((5, 5, 5), (13, 13, 13))
    assert surface(small).sum() == 98
    assert surface(large).sum() == 386
    found = score(small, large, np.diag([1.0, 1.0, 2.0]), 2.0)
    assert found.dice == pytest.approx(2 * 125 / (125 + 729))
    assert found.iou == pytest.approx(125 / 729)
    inward, outward = surface_distances(small, large, np.diag([1.0, 1.0, 2.0]))
    # each d face: 16 voxels at its rim 2 mm from a side, 8 around the middle 3 mm, the middle one 4 mm
    assert sorted(inward) == [2.0] * 80 + [3.0] * 16 + [4.0] * 2
    # the corners: 2 voxels off along each axis
    assert outward.max() == pytest.approx(math.sqrt(4 + 4 + 16))
    near = (inward <= 2).sum() + (outward <= 2).sum()
    # of the large one the h and w faces' 5 x 5 middles, which face the small one squarely, are 2 mm away
    assert near == 80 + 4 * 25
    assert found.nsd == pytest.approx(180 / 484)
    assert found.hd95 == pytest.approx(np.percentile(outward, 95))


def test_single_voxels_far_apart():
    a, b = cube((0, 0, 0), (0, 0, 0)), cube((3, 4, 6), (3, 4, 6))
    found = score(a, b, np.diag([1.0, 1.0, 2.0]), 13.0)
    assert values(found) == (0.0, 0.0, 13.0, 1.0)
    assert score(a, b, np.diag([1.0, 1.0, 2.0]), 12.9).nsd == 0.0


def test_sheared_grids_are_measured_in_space():
    matrix = np.array([[1.0, 0, 1], [0, 1, 0], [0, 0, 1]])
    found = score(cube((5, 5, 5), (5, 5, 5)), cube((5, 5, 7), (5, 5, 7)), matrix, 1.0)
    assert found.hd95 == pytest.approx(math.sqrt(8))


@pytest.mark.parametrize(
    ("spacing", "voxels"), [(1.0, 2), (0.5, 4), (2.0, 1), (0.4, 5), (0.8, 2), (2 / 3, 3)]
)
def test_a_distance_that_equals_the_tolerance_is_within_it_whatever_the_header_rounds(spacing, voxels):
    """The reference is counted in voxels, by whole numbers; affines are turned by degrees and rounded as headers do."""
    a = cube((5, 5, 5), (14, 14, 14))
    b = np.roll(a, voxels, 0)
    points = [np.argwhere(surface(mask)) for mask in (a, b)]
    squares = ((points[0][:, None] - points[1][None]) ** 2).sum(-1)
    nearest = np.concatenate([squares.min(1), squares.min(0)])
    below = (nearest < voxels**2).mean()
    assert below < (nearest <= voxels**2).mean() == 1.0
    for degrees in (0, 1, 2, 10, 17, 33, 58):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turned = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([spacing] * 3)
        affine = turned.astype(np.float32)
        tolerance = spacing * voxels
        assert score(a, b, affine, tolerance).nsd == 1.0
        assert score(a, b, affine, 0.9999 * tolerance).nsd == pytest.approx(below)
        assert score(a, b, affine, tolerance).hd95 == pytest.approx(tolerance, rel=1e-6)


def test_absent_missed_and_invented():
    none, some, spacing = np.zeros(SHAPE, bool), cube((2, 2, 2), (4, 4, 4)), np.diag([1.0, 2.0, 0.5])
    absent = score(none, none, spacing, 1.0)
    assert absent.status == "absent"
    assert all(math.isnan(value) for value in values(absent))
    longest = math.sqrt(29**2 + 38**2 + 11.5**2)
    for pair, status in (((none, some), "missed"), ((some, none), "invented")):
        found = score(*pair, spacing, 1.0)
        assert found.status == status
        assert values(found) == (0.0, 0.0, pytest.approx(longest), 0.0)


FULL, MILLIMETRE = np.ones((4, 5, 6), bool), np.eye(3)


@pytest.mark.parametrize(
    ("predicted", "labelled"),
    [(FULL, FULL[:1]), (FULL, FULL[0]), (FULL[0], FULL[0]), (FULL[None], FULL[None])],
)
def test_masks_that_are_not_of_one_shape_are_refused(predicted, labelled):
    """Also those that NumPy would broadcast."""
    found = rf"masks: found {re.escape(f'{predicted.shape} and {labelled.shape}')}, expected \(i, j, k\)"
    with pytest.raises(ValueError, match=found):
        score(predicted, labelled, MILLIMETRE, 1.0)
    with pytest.raises(ValueError, match=found):
        surface_distances(predicted, labelled, MILLIMETRE)
    with pytest.raises(ValueError, match=found):
        union_box(predicted, labelled)


@pytest.mark.parametrize("affine", [np.ones(3), np.eye(2), np.ones((3, 4)), np.diag([1.0, np.nan, 1.0])])
def test_another_affine_is_refused(affine):
    for measure in (
        lambda: score(FULL, FULL, affine, 1.0),
        lambda: surface_distances(FULL, FULL, affine),
        lambda: diagonal(FULL.shape, affine),
    ):
        with pytest.raises(ValueError, match=r"affine: found .*, expected \(3, 3\) or \(4, 4\)"):
            measure()
    with pytest.raises(ValueError, match=r"shape: found \(4, 5\), expected"):
        diagonal((4, 5), MILLIMETRE)


def test_what_has_no_value_is_refused():
    for wrong, match in ((FULL * np.nan, "masks: found NaN"), (FULL[0], r"masks: found \(5, 6\), expected")):
        with pytest.raises(ValueError, match=match):
            surface(wrong)
    for dtype in (np.float32, jnp.bfloat16, object):
        nowhere = np.full(FULL.shape, np.nan, dtype)
        with pytest.raises(ValueError, match="masks: found NaN"):
            score(FULL, nowhere, MILLIMETRE, 1.0)
        assert score(FULL, np.ones_like(nowhere), MILLIMETRE, 1.0).dice == 1
    with pytest.raises(ValueError, match="one without a voxel"):
        surface_distances(FULL, ~FULL, MILLIMETRE)
    for tolerance in (-1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance: found"):
            score(FULL, FULL, MILLIMETRE, tolerance)


def test_any_number_but_zero_is_inside():
    a, b = blobs(1)
    expected = score(a, b, np.diag([1.0, 2.0, 3.0]), 2.0)
    numbers = np.where(a, 3, 0).astype(np.int16), np.where(b, 0.25, 0.0)
    assert score(*numbers, np.diag([1.0, 2.0, 3.0, 1.0]), 2.0) == expected
    assert np.array_equal(surface(numbers[0]), surface(a))


def blobs(seed):
    """Two ragged masks that touch the image's border."""
    noise = np.random.default_rng(seed).standard_normal((2, *SHAPE))
    smooth = [ndimage.gaussian_filter(n, 2, mode="constant") for n in noise]
    common = ndimage.gaussian_filter(np.random.default_rng(seed + 50).standard_normal(SHAPE), 3)
    return [s / s.std() + 2 * common / common.std() > 0.8 for s in smooth]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 5.0)])
def test_surface_distances_are_those_of_a_distance_transform(spacing):
    a, b = blobs(1)
    assert np.array_equal(surface(a), a & ~ndimage.binary_erosion(a))
    there, back = surface_distances(a, b, np.diag(spacing))
    far = ndimage.distance_transform_edt
    np.testing.assert_allclose(there, far(~surface(b), sampling=spacing)[surface(a)], rtol=1e-12)
    np.testing.assert_allclose(back, far(~surface(a), sampling=spacing)[surface(b)], rtol=1e-12)


CASES = [(seed, spacing) for seed in range(3) for spacing in ((1.0, 1.0, 1.0), (0.7, 1.3, 4.0))]


# MONAI 1.6.1 with PyTorch 2.13.0: Dice, IoU, HD95, NSD at 2 mm.
STORED = [
    (0.6865114, 0.5226626, 3.2085893, 0.8846002),
    (0.6865114, 0.5226626, 3.9000001, 0.8517419),
    (0.7647820, 0.6191474, 2.4494898, 0.9264775),
    (0.7647820, 0.6191474, 3.8209946, 0.8747452),
    (0.7102468, 0.5506843, 2.8284271, 0.9005651),
    (0.7102468, 0.5506843, 3.5, 0.8678784),
]


@pytest.mark.parametrize(("case", "stored"), list(zip(CASES, STORED)))
def test_agree_with_what_monai_said(case, stored):
    seed, spacing = case
    np.testing.assert_allclose(values(score(*blobs(seed), np.diag(spacing), 2.0)), stored, rtol=1e-5)


def monai_values(seed, spacing):
    torch, metrics = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    a, b = (torch.from_numpy(mask)[None, None].float() for mask in blobs(seed))
    return [
        float(metrics.compute_dice(a, b)),
        float(metrics.compute_iou(a, b)),
        float(
            metrics.compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing)
        ),
        float(metrics.compute_surface_dice(a, b, [2.0], include_background=True, spacing=spacing)),
    ]


@pytest.mark.filterwarnings("default")  # other packages' own
@pytest.mark.parametrize(("seed", "spacing"), CASES)
def test_agree_with_monai(seed, spacing):
    found = score(*blobs(seed), np.diag(spacing), 2.0)
    np.testing.assert_allclose(values(found), monai_values(seed, spacing), rtol=1e-5)
