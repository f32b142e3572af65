"""Crops and flips: properties for any volume, crop and seed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mambamim_jax.data import crop

sides = st.tuples(*[st.integers(1, 40)] * 3)
seeds = st.integers(0, 2**32)


def volume_of(shape, seed, share=0.05):
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1000, -200, shape).astype(np.int16)
    hu[rng.random(shape) < share] = 40
    hu[tuple(rng.integers(0, shape))] = 40
    return hu


@settings(max_examples=60, deadline=None)
@given(shape=sides, seed=seeds)
def test_block_counts_add_up_and_draws_hit_foreground(shape, seed):
    hu = volume_of(shape, seed)
    counts = crop.block_counts(hu, -175.0)
    assert counts.shape == tuple(-(-n // crop.BLOCK) for n in shape)
    assert counts.sum() == (hu > -175).sum()
    rng = np.random.default_rng(seed)
    for _ in range(5):
        assert hu[tuple(crop.draw_foreground(rng, hu, counts, -175.0))] == 40


def test_draws_are_uniform_over_foreground():
    hu = volume_of((20, 33, 18), 3, share=0.002)
    counts = crop.block_counts(hu, -175.0)
    rng = np.random.default_rng(0)
    hits = np.zeros(hu.shape)
    for _ in range(20_000):
        hits[tuple(crop.draw_foreground(rng, hu, counts, -175.0))] += 1
    expected = 20_000 / (hu > -175).sum()
    assert (hits[hu <= -175] == 0).all()
    assert np.abs(hits[hu > -175] / expected - 1).max() < 5 / np.sqrt(expected)


@settings(max_examples=100, deadline=None)
@given(shape=sides, size=sides, seed=seeds, center=st.tuples(*[st.floats(0, 1)] * 3))
def test_crops_hold_their_centre_and_keep_to_the_box(shape, size, seed, center):
    rng = np.random.default_rng(seed)
    first = np.array([rng.integers(0, n) for n in shape])
    box = np.stack([first, [rng.integers(f + 1, n + 1) for f, n in zip(first, shape)]])
    middle = np.floor(first + (box[1] - 1 - first) * np.array(center)).astype(int)
    start = crop.crop_start(middle, size, box)
    stop = start + size
    assert (start <= middle).all()
    assert (middle < stop).all()
    wide = box[1] - box[0] >= np.array(size)
    assert (start[wide] >= box[0][wide]).all()
    assert (stop[wide] <= box[1][wide]).all()
    # a smaller box lies in the middle, to a voxel
    before, after = box[0] - start, stop - box[1]
    assert (np.abs(before - after)[~wide] <= 1).all()


@settings(max_examples=100, deadline=None)
@given(shape=sides, size=sides, seed=seeds, start=st.tuples(*[st.integers(-50, 50)] * 3))
def test_take_pads_with_fill_and_nothing_else(shape, size, seed, start):
    hu = volume_of(shape, seed)
    padded = np.pad(hu, 100, constant_values=-555)
    expected = padded[tuple(slice(s + 100, s + 100 + n) for s, n in zip(start, size))]
    assert np.array_equal(crop.take(hu, np.array(start), size, -555), expected)


@given(seed=seeds, shape=sides)
def test_flips_are_mirrors_and_undo_themselves(seed, shape):
    flips = crop.draw_flips(np.random.default_rng(seed), (0.5, 0.5, 0.5))
    array = volume_of(shape, 0)
    assert np.array_equal(crop.flip(array, flips), np.flip(array, [n for n in range(3) if flips[n]]))
    assert np.array_equal(crop.flip(crop.flip(array, flips), flips), array)


def test_flip_probabilities():
    rng = np.random.default_rng(0)
    share = np.mean([crop.draw_flips(rng, (0.2, 1.0, 0.0)) for _ in range(4000)], axis=0)
    assert abs(share[0] - 0.2) < 0.03
    assert share[1:].tolist() == [1.0, 0.0]
