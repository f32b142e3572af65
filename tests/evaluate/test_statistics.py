"""Means, intervals and paired tests against plain loops and tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mambamim_jax.evaluate.metrics import METRICS
from mambamim_jax.evaluate.statistics import OVERALL, compare, holm, resampled_means, summarise

NAN = float("nan")


def rows_of(values: np.ndarray) -> list[dict]:
    """Rows (cases, classes) whose every metric is the value; NaN for an absent class."""
    rows = []
    for case, line in enumerate(values):
        for name, value in zip("ab", line):
            status = "absent" if math.isnan(value) else "missed" if value == 0 else "ok"
            rows.append(
                {"case": f"c{case}", "class": name, "status": status, **dict.fromkeys(METRICS, value)}
            )
    return rows


VALUES = np.array([[0.9, 0.5], [0.7, NAN], [0.0, 0.7], [0.8, 0.6]])


def test_summary_by_hand():
    found = summarise(rows_of(VALUES))
    assert list(found) == [OVERALL, "a", "b"]
    a, b, over = found["a"], found["b"], found[OVERALL]
    assert (a["scored"], a["absent"], a["missed"]) == (4, 0, 1)
    assert (b["scored"], b["absent"], b["missed"]) == (3, 1, 0)
    assert (over["scored"], over["absent"], over["missed"]) == (7, 1, 1)
    for metric in METRICS:
        assert a[metric]["mean"] == pytest.approx(0.6)
        assert a[metric]["std"] == pytest.approx(np.std([0.9, 0.7, 0, 0.8], ddof=1))
        assert a[metric]["median"] == pytest.approx(0.75)
        assert b[metric]["mean"] == pytest.approx(0.6)
        assert over[metric]["mean"] == pytest.approx(0.6)
        assert over[metric]["std"] == pytest.approx(np.std([0.7, 0.7, 0.35, 0.7], ddof=1))
        assert 0 <= a[metric]["low"] < 0.6 < a[metric]["high"] <= 0.9
        assert 0.5 <= b[metric]["low"] < 0.6 < b[metric]["high"] <= 0.7
    assert summarise(rows_of(VALUES)) == found


def test_the_interval_is_that_of_a_plain_bootstrap():
    values = np.random.default_rng(3).uniform(0.4, 1, (25, 2))
    found = summarise(rows_of(values))["a"]["dice"]
    draw = np.random.default_rng(9)
    means = [draw.choice(values[:, 0], 25).mean() for _ in range(10_000)]
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(means, [0.025, 0.975]), atol=0.006)


def test_resampled_means_equal_plain_loops():
    draws = np.random.default_rng(0).multinomial(4, [0.25] * 4, 50).astype(float)
    found = resampled_means(VALUES, draws)
    for line, counts in zip(found, draws):
        chosen = np.repeat(VALUES, counts.astype(int), axis=0)
        for column in range(2):
            known = chosen[~np.isnan(chosen[:, column]), column]
            if known.size:
                assert line[column] == pytest.approx(known.mean())
            else:
                assert math.isnan(line[column])


def test_a_class_that_is_nowhere_and_a_single_case():
    found = summarise(rows_of(np.array([[0.9, NAN]])))
    assert found["b"]["dice"]["mean"] is None
    assert found["a"]["dice"] == {"mean": 0.9, "std": None, "median": 0.9, "low": None, "high": None}
    assert found[OVERALL]["dice"]["mean"] == pytest.approx(0.9)


def test_paired_comparison():
    better = VALUES + np.array([[0.05, 0.02], [0.01, 0.04], [0.03, 0.01], [0.02, 0.05]])
    found = compare(rows_of(better), rows_of(VALUES))
    a, b = found["a"]["nsd"], found["b"]["nsd"]
    assert (a["pairs"], b["pairs"], found[OVERALL]["nsd"]["pairs"]) == (4, 3, 4)
    assert a["difference"] == pytest.approx(0.0275)
    assert 0.01 <= a["low"] < 0.0275 < a["high"] <= 0.05
    # all of one sign: twice the chance of that, 2 / 2^n
    assert a["p"] == pytest.approx(0.125)
    assert b["p"] == pytest.approx(0.25)
    assert a["p_holm"] == b["p_holm"] == pytest.approx(0.25)
    same = compare(rows_of(VALUES), rows_of(VALUES))
    assert same["a"]["dice"]["p"] == 1.0
    assert same["a"]["dice"]["difference"] == 0.0
    draw = np.random.default_rng(0)
    x, y = draw.uniform(size=(2, 30, 2))
    found = compare(rows_of(x), rows_of(y))["b"]["dice"]
    assert found["p"] == pytest.approx(stats.wilcoxon(x[:, 1], y[:, 1]).pvalue)


def test_pairs_are_found_by_name():
    """The same scores in another order of cases and classes are equal, and rows that are not there leave no trace."""
    x, y = np.random.default_rng(1).uniform(size=(2, 12, 2))
    ours, theirs = rows_of(x), rows_of(y)
    expected = compare(ours, theirs)
    turned = [theirs[n] for n in np.random.default_rng(2).permutation(len(theirs))]
    assert compare(ours, turned) == expected
    assert compare(ours, turned + [{**theirs[0], "case": "another"}])["a"]["dice"]["pairs"] == 12
    without = compare(
        ours[1:], theirs
    )  # of the first case, ours has class b alone, and so b is its first class
    assert without["b"]["dice"]["difference"] == expected["b"]["dice"]["difference"]
    assert without["a"]["dice"]["difference"] == pytest.approx((x - y)[1:, 0].mean())
    assert (without["a"]["dice"]["pairs"], without["b"]["dice"]["pairs"]) == (11, 12)
    only_a = compare(ours, [row for row in theirs if row["class"] == "a"])
    assert only_a["a"]["dice"]["difference"] == expected["a"]["dice"]["difference"]
    assert only_a["b"]["dice"] == {"pairs": 0, **dict.fromkeys(("difference", "low", "high", "p", "p_holm"))}
    assert only_a[OVERALL]["dice"]["difference"] == pytest.approx((x - y)[:, 0].mean())


def test_the_difference_over_classes_is_that_of_the_means_over_classes():
    """Class b is in two of ten labels: better there by 0.1, in class a worse by 0.02, so better by 0.04 in all."""
    theirs = np.column_stack([np.linspace(0.7, 0.9, 10), [0.5, 0.6, *[NAN] * 8]])
    ours = theirs + np.array([-0.02, 0.1])
    found = compare(rows_of(ours), rows_of(theirs))[OVERALL]["dice"]
    means = [summarise(rows_of(values))[OVERALL]["dice"]["mean"] for values in (ours, theirs)]
    assert found["difference"] == pytest.approx(0.04, abs=1e-12)
    assert found["difference"] == pytest.approx(means[0] - means[1], abs=1e-12)
    assert found["pairs"] == 10
    # p is of the cases' means: 0.04 twice, -0.02 eight times, whose mean has the other sign
    assert found["p"] == pytest.approx(stats.wilcoxon([0.04] * 2 + [-0.02] * 8).pvalue)
    scores = np.random.default_rng(5).uniform(size=(2, 7, 2))
    means = [summarise(rows_of(values))[OVERALL]["dice"]["mean"] for values in scores]
    found = compare(*map(rows_of, scores))[OVERALL]["dice"]["difference"]
    assert found == pytest.approx(means[0] - means[1], abs=1e-12)


def test_the_interval_over_classes_is_that_of_a_plain_bootstrap():
    draw = np.random.default_rng(4)
    ours, theirs = draw.uniform(size=(2, 20, 2))
    ours[:, 1] += 0.5
    ours[10:, 1] = NAN
    found = compare(rows_of(ours), rows_of(theirs))[OVERALL]["dice"]
    chosen = draw.integers(20, size=(10_000, 20))
    means = np.nanmean((ours - theirs)[chosen], axis=1).mean(-1)
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(means, [0.025, 0.975]), atol=0.012)


def test_rounding_makes_neither_differences_nor_ranks():
    exact = np.array([0.0, 0.0, 2.0, 2.0, -1.0, 3.0, 3.0, 5.0])
    noise = 1e-9 * np.arange(-4, 4)
    zeros = np.zeros(8)
    found = [compare(rows_of(np.stack([some, some], 1)), rows_of(np.stack([zeros, zeros], 1)))["a"]["hd95"]
             for some in (exact, exact + noise)]  # fmt: skip
    assert found[0]["p"] == found[1]["p"] == pytest.approx(stats.wilcoxon(exact[2:]).pvalue)
    assert found[1]["pairs"] == 8


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
