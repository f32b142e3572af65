"""Augmentations: what each does, that image and label stay together, and that nothing but the arguments counts."""

import numpy as np
import pytest

from mambamim_jax.data import augment
from mambamim_jax.data.augment import Augmentation, Placement, change_intensities, draw_placement, place, zoom

ALWAYS = Augmentation((0.5, 0.5, 0.5), 1.0, 1.0, 1.0, zoom=1.0, noise=1.0, blur=1.0, low_resolution=1.0)
SIZE = (16, 12, 8)


def sample(shape, channels=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*shape, channels)).astype(np.float32), rng.integers(0, 5, shape).astype(np.uint8)


@pytest.mark.parametrize("seed", range(12))
def test_a_crop_has_its_size_and_its_label_stays_with_it(seed):
    rng = np.random.default_rng(seed)
    how = Augmentation((0.5, 0.5, 0.5), rotate=0.8, zoom=0.0)
    where = draw_placement(rng, how, SIZE)
    _, label = sample(where.extent)
    placed = place(label, where, label=True)
    assert placed.shape == SIZE
    image = place(label[..., None].astype(np.float32), where)
    np.testing.assert_array_equal(image[..., 0], placed)
    np.testing.assert_array_equal(np.sort(placed, axis=None), np.sort(label, axis=None))


@pytest.mark.parametrize("seed", range(6))
def test_zoomed_crops_have_their_size(seed):
    where = draw_placement(np.random.default_rng(seed), ALWAYS, SIZE)
    image, label = sample(where.extent)
    assert place(image, where).shape == (*SIZE, 2)
    assert set(np.unique(place(label, where, label=True))) <= set(np.unique(label))


def test_turning_is_the_quarter_turn_it_says():
    _, label = sample((4, 6, 5))
    where = Placement((4, 6, 5), (4, 6, 5), 1, (0, 1), (False, False, True))
    expected = np.empty((6, 4, 5), np.uint8)
    for i in range(6):
        for j in range(4):
            expected[i, j] = label[j, 5 - i, ::-1]
    np.testing.assert_array_equal(place(label, where, label=True), expected)


def test_zoom_keeps_a_ramp_and_its_place():
    ramp = np.arange(10, dtype=np.float32)[:, None, None] * np.ones((1, 3, 2), np.float32)
    twice = zoom(ramp, (20, 3, 2))
    np.testing.assert_allclose(twice[1:-1, 0, 0], (np.arange(1, 19) + 0.5) / 2 - 0.5, atol=1e-6)
    np.testing.assert_array_equal(zoom(ramp, (10, 3, 2)), ramp)
    half = zoom(ramp, (5, 3, 2))
    np.testing.assert_allclose(half[:, 0, 0], 2 * np.arange(5) + 0.5, atol=1e-6)
    nearest = zoom(ramp.astype(np.uint8), (20, 3, 2), label=True)
    np.testing.assert_array_equal(nearest[:, 0, 0], np.repeat(np.arange(10), 2))


@pytest.mark.parametrize("size", [48, 72, 80, 112, 120, 128])
def test_the_nearest_voxels_lie_about_the_places_they_stand_for(size):
    """Where these lie halfway between two, as many are taken below as above."""
    places = (np.arange(size) + 0.5) * (96 / size) - 0.5
    taken = zoom(np.arange(96)[:, None, None], (size, 1, 1), label=True)[:, 0, 0]
    assert np.abs(taken - places).max() <= 0.5 + 1e-9
    assert abs((taken - places).mean()) < 0.02


def test_intensities_change_by_what_they_say():
    image, _ = sample((12, 12, 12), 1)
    only = lambda **how: change_intensities(  # noqa: E731
        np.random.default_rng(3), image, Augmentation((0, 0, 0), 0.0, **{**OFF, **how})
    )
    assert only() is image
    ratio = only(intensity_scale=1.0) / image
    assert 0.9 <= ratio.min() <= ratio.max() <= 1.1
    assert np.ptp(ratio) < 1e-5
    step = only(intensity_shift=1.0) - image
    assert abs(step.mean()) <= 0.1
    assert np.ptp(step) < 1e-5
    noise = only(noise=1.0, noise_std=0.2) - image
    assert 0 < noise.std() <= 0.21
    for name in ("blur", "low_resolution"):
        changed = only(**{name: 1.0})
        assert changed.std() < image.std()
        assert abs(changed.mean() - image.mean()) < 0.2
        assert changed.dtype == np.float32


OFF = {"intensity_scale": 0.0, "intensity_shift": 0.0}


def test_the_same_generator_gives_the_same_crop():
    def make(how, seed=7):
        rng = np.random.default_rng(seed)
        where = draw_placement(rng, how, SIZE)
        return where, change_intensities(rng, place(sample(where.extent)[0], where), how)

    (a, first), (b, second) = make(ALWAYS), make(ALWAYS)
    assert a == b
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, make(ALWAYS, seed=8)[1])


def test_what_is_drawn_later_does_not_depend_on_the_probabilities():
    generators = [np.random.default_rng(1) for _ in range(2)]
    for rng, how in zip(generators, (augment.NONE, ALWAYS)):
        draw_placement(rng, how, SIZE)
    assert generators[0].random() == generators[1].random()
    where = draw_placement(np.random.default_rng(0), augment.NONE, SIZE)
    assert where == Placement(SIZE, SIZE, 0, where.axes, (False, False, False))
