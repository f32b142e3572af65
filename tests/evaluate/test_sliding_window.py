"""Sliding window against a direct, unoptimised one; against MONAI's where that is installed."""

from __future__ import annotations

import itertools
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from mambamim_jax.evaluate.labels import decide, probabilities
from mambamim_jax.evaluate.sliding_window import SlidingWindow, gaussian, window_starts

WINDOW = (8, 6, 10)
SHAPES = [(8, 6, 10), (5, 3, 7), (9, 6, 10), (17, 4, 23), (13, 21, 11), (5, 40, 8)]
OVERLAPS = [0.0, 0.25, 0.5, 0.7, 0.9]


def network(params, x):
    """Something of at most 1 that depends on where in its window a voxel is, and on its neighbours."""
    place = jnp.linspace(0.0, 1.0, x.shape[1])[None, :, None, None, None]
    near = jnp.roll(x, 1, axis=3) * params["a"] + x**2
    return jnp.tanh(jnp.concatenate([near + place, x[..., :1] * place - 0.3, near * x], axis=-1))


PARAMS = {"a": np.float32(0.7)}


def draw(shape, channels=2):
    return np.random.default_rng(sum(shape)).standard_normal((*shape, channels), np.float32)


def direct(image, window, overlap, flips=(), members=(PARAMS,)):
    """One window after the other, a sum over the whole volume, in float64."""
    lacking = [max(w - n, 0) for n, w in zip(image.shape, window)]
    volume = np.pad(image, [*((n // 2, n - n // 2) for n in lacking), (0, 0)])
    starts = []
    for n, w in zip(volume.shape, window):
        step, along = max(int(w * (1 - overlap)), 1), [0]
        while along[-1] + w < n:
            along.append(min(along[-1] + step, n - w))
        starts.append(along)
    weight = gaussian(window).astype(np.float64)[..., None]
    total = weights = 0.0
    turns = [t for r in range(len(flips) + 1) for t in itertools.combinations([f + 1 for f in flips], r)]
    for place in itertools.product(*starts):
        region = tuple(slice(p, p + w) for p, w in zip(place, window))
        for params, turn in itertools.product(members, turns):
            x = np.flip(volume[region][None], turn)
            y = np.flip(np.asarray(network(params, jnp.asarray(x)), np.float64), turn)[0]
            placed, placed_weight = (
                np.zeros((*volume.shape[:3], y.shape[-1])),
                np.zeros((*volume.shape[:3], 1)),
            )
            placed[region], placed_weight[region] = y * weight, weight
            total, weights = total + placed, weights + placed_weight
    inside = tuple(slice(n // 2, n // 2 + size) for n, size in zip(lacking, image.shape))
    return (total / weights)[inside]


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_direct_one(shape, overlap):
    image = draw(shape)
    found = SlidingWindow(network, WINDOW, overlap=overlap, batch=3)(image, [PARAMS])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, direct(image, WINDOW, overlap), atol=1e-5)


@pytest.mark.parametrize("flips", [(0,), (1, 2), (0, 1, 2)])
def test_flips_and_members_are_averaged(flips):
    image, members = draw((9, 8, 11)), [PARAMS, {"a": np.float32(-0.2)}]
    found = SlidingWindow(network, WINDOW, flips=flips, batch=2)(image, members)
    np.testing.assert_allclose(found, direct(image, WINDOW, 0.5, flips, members), atol=1e-5)


def test_slabs_come_in_order_and_are_no_thicker_than_a_window():
    image = draw((7, 9, 64))
    sliding = SlidingWindow(network, WINDOW, overlap=0.5)
    slabs = list(sliding.stream(image, [PARAMS]))
    assert sliding.stream_axis(image.shape) == 2
    thickness = [values.shape[2] for _, values in slabs]
    assert max(thickness) <= WINDOW[2]
    assert [start for start, _ in slabs] == [0, *np.cumsum(thickness)[:-1]]
    assert sum(thickness) == 64


def test_memory_does_not_grow_with_the_length():
    """Beside the volume itself, a few windows' thicknesses of the output are held."""
    classes = 64
    sliding = SlidingWindow(lambda params, x: x * jnp.ones(classes), WINDOW, overlap=0.0)
    for _ in sliding.stream(draw((24, 24, 40), 1), [PARAMS]):  # compiles
        pass
    peaks = []
    for length in (100, 400):
        image = draw((24, 24, length), 1)
        tracemalloc.start()
        for _ in sliding.stream(image, [PARAMS]):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    thickness = 24 * 24 * WINDOW[2] * classes * 4
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 4 * thickness < 24 * 24 * 400 * classes * 4 / 5


def test_a_second_window_on_the_same_network_is_not_compiled_again():
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return network(params, x)

    first, second = (SlidingWindow(counted, WINDOW, overlap=overlap) for overlap in (0.0, 0.5))
    for sliding in (first, second, first):
        sliding(draw((9, 8, 11)), [PARAMS])
    assert len(traced) == 1


def test_every_voxel_is_covered_and_no_window_is_superfluous():
    for size, overlap in itertools.product(range(1, 40), OVERLAPS):
        starts = window_starts(size, 10, overlap)
        covered = {v for s in starts for v in range(s, s + 10)}
        assert covered >= set(range(size))
        assert starts == sorted(set(starts))
        assert all(s + 10 < size for s in starts[:-1])


@pytest.mark.filterwarnings("default")  # other packages' own
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("shape", [(5, 3, 7), (13, 21, 11)])
def test_agrees_with_monai(shape, overlap):
    torch, inferers = pytest.importorskip("torch"), pytest.importorskip("monai.inferers")
    image = draw(shape)

    def theirs(x):
        y = network(PARAMS, jnp.asarray(np.moveaxis(x.numpy(), 1, -1)))
        return torch.from_numpy(np.moveaxis(np.array(y), -1, 1))

    x = torch.from_numpy(np.moveaxis(image, -1, 0)[None].copy())
    expected = inferers.sliding_window_inference(x, WINDOW, 3, theirs, overlap, mode="gaussian")
    found = SlidingWindow(network, WINDOW, overlap=overlap, batch=2)(image, [PARAMS])
    np.testing.assert_allclose(found, np.moveaxis(expected[0].numpy(), 0, -1), atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"overlap": 1.0},
        {"overlap": -0.1},
        {"batch": 0},
        {"flips": (3,)},
        {"window": 8},
        {"window": (8, 6)},
        {"window": (8, 6, 0)},
        {"window": (8, 6, 8.5)},
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        SlidingWindow(network, **{"window": WINDOW, **wrong})


@pytest.mark.parametrize("shape", [(8, 6), (9, 9, 10), (1, 8, 6, 10, 1), (0, 6, 10, 1)])
def test_an_image_of_another_shape_is_refused(shape):
    """Without its channels, an image as long as the window would be read as one of so many channels."""
    with pytest.raises(ValueError, match=r"image: found .*, expected \(h, w, d, c\)"):
        SlidingWindow(network, WINDOW)(np.zeros(shape, np.float32), [PARAMS])


@pytest.mark.parametrize("members", [[], PARAMS])
def test_members_are_a_list(members):
    with pytest.raises(ValueError, match=r"members: found .*, expected a list"):
        SlidingWindow(network, WINDOW)(draw(WINDOW), members)


@pytest.mark.parametrize("flips", [(), (0,)])
def test_an_output_of_another_size_is_refused(flips):
    """Also one that NumPy would broadcast."""
    sliding = SlidingWindow(lambda params, x: x.mean((1, 2, 3), keepdims=True), WINDOW, flips=flips)
    with pytest.raises(ValueError, match=r"network: found \(1, 1, 1, 1, 2\) of \(1, 8, 6, 10, 2\), expected"):
        sliding(draw(WINDOW), [PARAMS])


def test_labels_of_regions_are_written_in_their_order():
    regions = [
        {"name": "whole tumour", "labels": [1, 2, 3], "writes": 2},
        {"name": "core", "labels": [1, 3], "writes": 1},
        {"name": "enhancing", "labels": [3], "writes": 3},
    ]
    logits = jnp.array([[-1.0, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, 1], [-1, -1, 1]])
    assert decide(np.asarray(probabilities(logits, regions)), regions).tolist() == [0, 2, 1, 3, 3]
    np.testing.assert_allclose(probabilities(logits).sum(-1), 1, rtol=1e-6)
    assert decide(np.eye(300, dtype=np.float32)).dtype == np.uint16
    assert decide(np.eye(3, dtype=np.float32)).tolist() == [0, 1, 2]
