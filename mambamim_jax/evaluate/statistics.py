"""From rows of scores to what can be said about a set: means with intervals, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from mambamim_jax.evaluate.metrics import METRICS
from mambamim_jax.types import NumpyArray

RESAMPLES = 10_000
LEVEL = 0.95
OVERALL = "mean over classes"
DIGITS = 6
"""Decimals of a difference that are ranked: what is equal but for rounding is a tie, and 0 no difference."""
Rows = Sequence[Mapping[str, Any]]


def cases_and_classes(rows: Rows) -> tuple[list[str], list[str]]:
    """Cases and classes of the rows, in the order in which they first come."""
    cases, classes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "class"))
    return cases, classes


def matrix(rows: Rows, metric: str, cases: Sequence[str], classes: Sequence[str]) -> NumpyArray:
    """One metric as (cases, classes) in the order given, NaN where a class is absent or there is no row."""
    line, column = ({name: n for n, name in enumerate(order)} for order in (cases, classes))
    values = np.full((len(cases), len(classes)), np.nan)
    for row in rows:
        values[line[row["case"]], column[row["class"]]] = row[metric]
    return values


def summarise(rows: Rows, seed: int = 0) -> dict[str, dict[str, Any]]:
    """For each class, and over all of them, counts and {metric: mean, std, median, low, high}.

    The mean over classes is the mean of the classes' means, its deviation and median those of the cases' means. The
    interval is the bootstrap's: of 10,000 resamples of the cases, drawn with replacement, the middle 95% of the means;
    a class of which a resample has no score is left out of its mean over classes.
    """
    result: dict[str, dict[str, Any]] = {}
    cases, classes = cases_and_classes(rows)
    draws = _resamples(len(cases), seed)
    for metric in METRICS:
        values = matrix(rows, metric, cases, classes)
        means = resampled_means(values, draws)
        for column, name in enumerate(classes):
            known = values[~np.isnan(values[:, column]), column]
            result.setdefault(name, _counts(rows, name))[metric] = _describe(
                known, _mean(known), means[:, column]
            )
        per_case = nanmean(values, 1)
        described = _describe(per_case[~np.isnan(per_case)], mean_over_classes(values), nanmean(means, 1))
        result.setdefault(OVERALL, _counts(rows, None))[metric] = described
    return {OVERALL: result.pop(OVERALL), **result}


def compare(rows: Rows, others: Rows, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Paired differences, ours less the other's, per class and over the classes.

    A pair is a class of a case, by name, that both have a score for; others are left out. Each metric has the mean
    difference, its bootstrap interval, the number of pairs, and the p of Wilcoxon's signed-rank test, two-sided;
    ``p_holm`` is corrected (Holm) for the number of classes. Over the classes, the difference is the mean of the
    classes' mean differences, pairs are cases, and p is that of the cases' mean differences.
    """
    result: dict[str, dict[str, Any]] = {}
    cases, classes = cases_and_classes([*rows, *others])
    draws = _resamples(len(cases), seed)
    for metric in METRICS:
        ours, theirs = (matrix(some, metric, cases, classes) for some in (rows, others))
        difference = ours - theirs
        means = resampled_means(difference, draws)
        values = [
            _paired(column, _mean(column[~np.isnan(column)]), resampled)
            for column, resampled in zip(difference.T, means.T)
        ]
        for value, corrected in zip(values, holm([value["p"] for value in values])):
            value["p_holm"] = corrected
        overall = _paired(nanmean(difference, 1), mean_over_classes(difference), nanmean(means, 1))
        for name, value in [(OVERALL, overall), *zip(classes, values)]:
            result.setdefault(name, {})[metric] = value
    return result


def mean_over_classes(values: NumpyArray) -> float:
    """Mean of the classes' means of (cases, classes) with NaN; a class that is nowhere is left out."""
    return float(nanmean(nanmean(values, 0)[None], 1)[0])


def resampled_means(values: NumpyArray, draws: NumpyArray) -> NumpyArray:
    """Means (resamples, classes) of (cases, classes) with NaN, each case counted as often as it was drawn."""
    known = ~np.isnan(values)
    count = draws @ known.astype(np.float64)
    total = draws @ np.where(known, values, 0.0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number: the i-th smallest of m times (m - i), never falling, at most 1."""
    known = sorted((p, n) for n, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, n) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        corrected[n] = highest
    return corrected


def nanmean(values: NumpyArray, axis: int) -> NumpyArray:
    """Mean of what is not NaN; NaN without a warning where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _resamples(cases: int, seed: int) -> NumpyArray:
    """How often each case is drawn, (resamples, cases)."""
    return np.random.default_rng(seed).multinomial(cases, [1 / cases] * cases, RESAMPLES).astype(np.float64)


def _counts(rows: Rows, name: str | None) -> dict[str, Any]:
    found = [row["status"] for row in rows if name is None or row["class"] == name]
    scored = len(found) - found.count("absent")
    return {"scored": scored, **{status: found.count(status) for status in ("absent", "missed", "invented")}}


def _mean(values: NumpyArray) -> float:
    return float(values.mean()) if values.size else math.nan


def _interval(means: NumpyArray) -> dict[str, Any]:
    known = means[~np.isnan(means)]
    if not known.size:
        return {"low": None, "high": None}
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}


def _describe(values: NumpyArray, mean: float, means: NumpyArray) -> dict[str, Any]:
    """Mean, deviation (of a sample), median and interval; None where there are too few values."""
    if not values.size:
        return dict.fromkeys(("mean", "std", "median", "low", "high"))
    std = float(values.std(ddof=1)) if values.size > 1 else None
    interval = _interval(means) if values.size > 1 else {"low": None, "high": None}
    return {"mean": mean, "std": std, "median": float(np.median(values)), **interval}


def _paired(differences: NumpyArray, mean: float, means: NumpyArray) -> dict[str, Any]:
    """Number, mean, interval and p of differences with NaN where there is no pair; None where there are none."""
    known = differences[~np.isnan(differences)]
    if not known.size:
        return {"pairs": 0, **dict.fromkeys(("difference", "low", "high", "p"))}
    unequal = np.round(known, DIGITS)
    unequal = unequal[unequal != 0]
    p = float(wilcoxon(unequal, method="auto").pvalue) if unequal.size else 1.0
    interval = _interval(means) if known.size > 1 else {"low": None, "high": None}
    return {"pairs": int(known.size), "difference": mean, **interval, "p": p}
