"""Mixing sources: shares as asked, every source gone through before it repeats."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambamim_jax.data.mix import Mix


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    weights=st.tuples(*[st.integers(1, 50)] * 4),
    seed=st.integers(0, 99),
)
def test_shares_and_coverage(sizes, weights, seed):
    sources = [f"/data/s{n}" for n, size in enumerate(sizes) for _ in range(size)]
    given_weights = {f"s{n}": weights[n] for n in range(len(sizes))}
    mix = Mix.of(sources, given_weights)
    total = len(sources)
    assert sum(mix.shares) == total
    scale = total / sum(given_weights.values())
    assert min(mix.shares) >= 1
    rare = sum(weights[n] * scale < 1 for n in range(len(sizes)))  # what they get more comes from the others
    for n, share in enumerate(mix.shares):
        assert -1 - rare < share - weights[n] * scale < 1
    drawn = [mix.volume(seed, index) for index in range(total * 6)]
    for n, members in enumerate(mix.members):
        mine = [volume for volume in drawn if volume in members]
        assert len(mine) == mix.shares[n] * 6
        counts = Counter(mine)
        fewest, most = min(counts.get(m, 0) for m in members), max(counts.get(m, 0) for m in members)
        assert most - fewest <= 2  # within an epoch the order of two turns can interleave


def test_a_weight_however_small_is_not_none():
    sources = ["a"] * 3 + ["b"] * 7 + ["c"] * 2
    assert Mix.of(sources, {"a": 1, "b": 1000, "c": 0}).shares == (1, 11, 0)
    assert Mix.of(sources, {"a": 1, "b": 1, "c": 1000}).shares == (1, 1, 10)


def test_without_weights_every_volume_once_per_epoch():
    mix = Mix.of(["a"] * 3 + ["b"] * 4, None)
    for epoch in range(5):
        assert sorted(mix.volume(0, epoch * 7 + n) for n in range(7)) == list(range(7))


def test_the_names_of_sources_do_not_matter_but_their_order():
    sizes, weights = (3, 5, 2), (2.0, 1.0, 4.0)
    drawn = []
    for names in (("/data/a", "/data/b", "/data/c"), ("/disk/z", "/data/b", "/a/m"), ("c", "b", "a")):
        sources = [name for name, size in zip(names, sizes) for _ in range(size)]
        mix = Mix.of(sources, dict(zip(names, weights)))
        assert mix.members == ((0, 1, 2), (3, 4, 5, 6, 7), (8, 9))
        drawn.append([mix.volume(1, index) for index in range(30)])
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize("key", ["/data/one", "/data/one/", "one", "one/"])
@pytest.mark.parametrize("name", ["/data/one", "/data/one/"])
def test_a_slash_at_the_end_does_not_matter(name, key):
    assert Mix.of([name, "/data/two"], {"two": 0.0, key: 1.0}).shares == (2, 0)


def test_a_path_goes_before_the_last_part_of_it():
    assert Mix.of(["/data/one", "/disk/one"], {"/disk/one": 1.0, "one": 0.0}).shares == (0, 2)
    assert Mix.of(["/data/one", "/disk/one"], {"one": 0.0, "/disk/one": 1.0}).shares == (0, 2)


def test_what_does_not_fit_is_refused():
    sources = ["/data/one", "/data/two"]
    for weights, words in (
        ({"one": 1.0}, "no weight for source /data/two"),
        ({"one": 1.0, "two": 1.0, "three": 1.0}, "weight for 'three'"),
        ({"one": 1.0, "one/": 2.0, "two": 1.0}, "source /data/one has 2 weights, of one and one/"),
        ({"one": 1.0, "/data/one": 2.0, "two": 1.0}, "weight for 'one', but the sources are"),
        ({"one": 0.0, "two": 0.0}, "not all zero"),
        ({"one": -1.0, "two": 1.0}, "zero or more"),
    ):
        with pytest.raises(ValueError, match=words):
            Mix.of(sources, weights)
    assert Mix.of(sources, {"/data/one": 0.0, "two": 3.0}).shares == (0, 2)
