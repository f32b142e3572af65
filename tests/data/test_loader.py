"""Batches: the same whatever the threads, processes and restarts; every volume once per epoch."""

import itertools
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from mambamim_jax.data import datasets, loader, store, volume
from mambamim_jax.settings import RunConfig
from tests.data import ct_files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    return store.prepare(
        datasets.discover(ct_files.dataset(folder / "source", 7)), folder / "store", workers=1
    )


OPTIONS = {"crop": (16, 16, 32), "crops_per_volume": 2, "volumes_per_batch": 4, "seed": 5}


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(a, b):
    return all(
        np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in ("image", "index")
    )


def test_batches_are_as_promised(prepared):
    data = loader.PretrainLoader(prepared, **OPTIONS)
    assert data.batches_per_epoch == Fraction(7, 4)
    batch = next(iter(data))
    assert batch["image"].shape == (8, 16, 16, 32, 1)
    assert batch["image"].dtype == np.float32
    assert batch["index"].shape == (4,)
    assert batch["image"].min() == 0.0
    assert batch["image"].max() <= 1.0
    # every crop is centred on foreground
    assert (batch["image"].reshape(8, -1).max(axis=1) > 0).all()


def test_any_number_of_threads(prepared):
    expected = take(iter(loader.PretrainLoader(prepared, **OPTIONS, threads=0)), 6)
    for threads in (1, 2, 4):
        assert equal(take(iter(loader.PretrainLoader(prepared, **OPTIONS, threads=threads)), 6), expected)
    other = take(iter(loader.PretrainLoader(prepared, **{**OPTIONS, "seed": 6})), 6)
    assert not equal(other, expected)


@pytest.mark.parametrize("bounds", [(0, 4, 8), (0, 2, 4, 6, 8), (0, 1, 3, 8)], ids=str)
def test_any_number_of_processes(prepared, bounds):
    """Parts of a batch, also of a volume, laid end to end are the batch."""
    whole = take(iter(loader.PretrainLoader(prepared, **OPTIONS)), 3)
    spans = [range(*pair) for pair in itertools.pairwise(bounds)]
    parts = [take(iter(loader.PretrainLoader(prepared, **OPTIONS, rows=rows)), 3) for rows in spans]
    for number, batch in enumerate(whole):
        images = [part[number]["image"] for part in parts]
        assert np.array_equal(np.concatenate(images), batch["image"])
        for rows, part in zip(spans, parts):
            volumes = batch["index"][rows[0] // 2 : rows[-1] // 2 + 1]
            assert np.array_equal(part[number]["index"], volumes)


def test_every_epoch_holds_every_volume_once(prepared):
    data = loader.PretrainLoader(prepared, **OPTIONS)
    seen = np.concatenate([batch["index"] for batch in take(iter(data), 14)])
    epochs = seen.reshape(8, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 4


@pytest.mark.parametrize("volumes_per_batch", [1, 4, 5, 7, 16])
def test_a_run_of_so_many_epochs_passes_over_every_volume_so_often(prepared, volumes_per_batch):
    options = OPTIONS | {"volumes_per_batch": volumes_per_batch}
    data = loader.PretrainLoader(prepared, **options)
    steps = RunConfig(epochs=100).total_steps(data.batches_per_epoch)
    seen = Counter(data.volume_of(index) for step in range(steps) for index in data.samples(step))
    assert min(seen.values()) >= 100
    assert sum(seen.values()) - 7 * 100 < volumes_per_batch


def test_resumes_in_mid_epoch_bit_for_bit(prepared):
    data = loader.PretrainLoader(prepared, **OPTIONS, threads=2)
    iterator = iter(data)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state["examples"] == 12
    expected = take(iterator, 4)
    for threads in (0, 4):
        resumed = iter(loader.PretrainLoader(prepared, **OPTIONS, threads=threads))
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert equal(take(resumed, 4), expected)
    used = iter(data)
    take(used, 5)
    used.set_state(state)
    assert equal(take(used, 4), expected)
    half = iter(loader.PretrainLoader(prepared, **OPTIONS, rows=range(4, 8)))
    half.set_state(state)
    assert np.array_equal(next(half)["image"], expected[0]["image"][4:])


def test_refuses_a_state_of_something_else(prepared, tmp_path):
    state = iter(loader.PretrainLoader(prepared, **OPTIONS)).get_state()
    for change, word in (
        ({"seed": 6}, "seed"),
        ({"volumes_per_batch": 2}, "volumes_per_batch"),
        ({"crop": (16, 16, 16)}, "sampling"),
    ):
        with pytest.raises(ValueError, match=f"^iterator state was saved with {word}"):
            iter(loader.PretrainLoader(prepared, **{**OPTIONS, **change})).set_state(state)
    source = prepared.entries[0].source
    fewer = store.prepare(datasets.discover(source)[1:], prepared.folder, workers=1)
    with pytest.raises(ValueError, match="fingerprint"):
        iter(loader.PretrainLoader(fewer, **OPTIONS)).set_state(state)
    with pytest.raises(ValueError, match=r"range\(4, 9\), expected neighbouring rows of a batch's 8"):
        loader.PretrainLoader(prepared, **OPTIONS, rows=range(4, 9))
    with pytest.raises(ValueError, match="no usable volume"):
        loader.PretrainLoader(store.Store(prepared.folder, prepared.spec, [], []), **OPTIONS)
    with pytest.raises(ValueError, match="dtype 'float16'"):
        loader.PretrainLoader(prepared, **OPTIONS, dtype="float16")


def sourced(prepared, sources):
    """A loader of the same volumes, each of another source, drawn from equally often."""
    volumes = [line | {"source": source} for line, source in zip(prepared.volumes, sources, strict=True)]
    made = store.Store(prepared.folder, prepared.spec, volumes, prepared.report)
    return loader.PretrainLoader(made, **OPTIONS, weights=dict.fromkeys(sources, 1.0))


def test_goes_on_where_a_source_was_moved_but_not_where_volumes_changed_theirs(prepared):
    iterator = iter(sourced(prepared, ["/data/a"] * 3 + ["/data/b"] * 4))
    take(iterator, 2)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 3)
    older = {key: value for key, value in state.items() if key != "sources"}
    for saved, other in ((state, "/data/b"), (state, "/disk/zz"), (older, "/disk/zz")):
        moved = iter(sourced(prepared, ["/disk/z"] * 3 + [other] * 4))
        moved.set_state(saved)
        assert equal(take(moved, 3), expected)
    with pytest.raises(ValueError, match="weighted sources in the order of their paths; this run's stand in"):
        iter(sourced(prepared, ["/disk/z"] * 3 + ["/data/b"] * 4)).set_state(older)
    divided = sourced(prepared, ["/data/a"] * 4 + ["/data/b"] * 3)
    assert divided.mix.shares == moved._loader.mix.shares
    with pytest.raises(ValueError, match=r"^iterator state was saved with sources"):
        iter(divided).set_state(state)


def test_flips_and_window_reach_the_crop(prepared):
    whole = {**OPTIONS, "crop": (64, 64, 64), "crops_per_volume": 1, "volumes_per_batch": 1}
    plain = next(iter(loader.PretrainLoader(prepared, **whole, flip=(0, 0, 0))))["image"][0, ..., 0]
    mirrored = next(iter(loader.PretrainLoader(prepared, **whole, flip=(1, 0, 1))))["image"][0, ..., 0]
    assert np.array_equal(mirrored, plain[::-1, :, ::-1])
    wide = next(iter(loader.PretrainLoader(prepared, **whole, window=(-1200.0, 3000.0), flip=(0, 0, 0))))
    assert 0.005 < wide["image"].mean() < 0.3
    counted = Counter(plain.ravel().tolist())
    assert counted[0.0] > plain.size / 2  # the padding shows as the window's low end


def test_hu_for_windowing_on_the_device(prepared):
    hu = next(iter(loader.PretrainLoader(prepared, **OPTIONS, dtype="int16")))["image"]
    expected = next(iter(loader.PretrainLoader(prepared, **OPTIONS)))["image"]
    assert hu.dtype == np.int16
    assert np.array_equal(volume.window_intensity(hu, (-175.0, 250.0)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_worker_processes_give_the_same(prepared, workers):
    expected = take(iter(loader.PretrainLoader(prepared, **OPTIONS)), 7)
    iterator = iter(loader.PretrainLoader(prepared, **OPTIONS, workers=workers))
    iterator.set_state({**iterator.get_state(), "examples": 8})
    assert equal(take(iterator, 5), expected[2:])
    assert iterator.get_state()["examples"] == 28


def test_compact_encoding_gives_the_same(prepared, tmp_path):
    pytest.importorskip("blosc2")
    source = prepared.entries[0].source
    compact = store.prepare(datasets.discover(source), tmp_path / "store", workers=1, encoding="blosc2")
    again = store.prepare(datasets.discover(source), tmp_path / "again", workers=1, encoding="blosc2")
    for n, entry in enumerate(compact.entries):
        path = f"volumes/{entry.folder}/image.b2nd"
        assert (compact.folder / path).read_bytes() == (again.folder / path).read_bytes()
        assert np.array_equal(compact.image(n)[:], prepared.image(n))
    assert compact.fingerprint == prepared.fingerprint
    batches = take(iter(loader.PretrainLoader(compact, **OPTIONS)), 4)
    assert equal(batches, take(iter(loader.PretrainLoader(prepared, **OPTIONS)), 4))
    other = next(iter(loader.PretrainLoader(compact, **OPTIONS, window=(-900.0, 100.0))))
    assert equal([other], [next(iter(loader.PretrainLoader(prepared, **OPTIONS, window=(-900.0, 100.0))))])
