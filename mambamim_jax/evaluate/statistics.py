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
Rows = Sequence[Mapping[str, Any]]


def matrix(rows: Rows, metric: str) -> tuple[list[str], list[str], NumpyArray]:
    """Cases, classes, and one metric of them as (cases, classes), NaN where a class is absent."""
    cases, classes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "class"))
    values = np.full((len(cases), len(classes)), np.nan)
    for row in rows:
        values[cases.index(row["case"]), classes.index(row["class"])] = row[metric]
    return cases, classes, values


def summarise(rows: Rows, seed: int = 0) -> dict[str, dict[str, Any]]:
    """For each class, and over all of them, counts and {metric: mean, std, median, low, high}.

    The mean over classes is the mean of the classes' means, its deviation that of the cases' means. The interval is
    the bootstrap's: of 10,000 resamples of the cases, drawn with replacement, the middle 95% of the means.
    """
    result: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        cases, classes, values = matrix(rows, metric)
        draws = _resamples(len(cases), seed)
        means = resampled_means(values, draws)
        for column, name in enumerate(classes):
            known = values[~np.isnan(values[:, column]), column]
            result.setdefault(name, _counts(rows, name))[metric] = _describe(
                known, _mean(known), means[:, column]
            )
        over_classes = nanmean(means, 1)
        middle = nanmean(np.array([[_mean(v[~np.isnan(v)]) for v in values.T]]), 1)[0]
        per_case = nanmean(values, 1)
        described = _describe(per_case[~np.isnan(per_case)], float(middle), over_classes)
        result.setdefault(OVERALL, _counts(rows, None))[metric] = described
    return {OVERALL: result.pop(OVERALL), **result}


def compare(rows: Rows, others: Rows, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Paired differences, ours less the other's, per class and over the cases' means.

    Each metric has the mean difference, its bootstrap interval, the number of pairs, and the p of Wilcoxon's
    signed-rank test, two-sided; ``p_holm`` is corrected (Holm) for the number of classes. Pairs of which one is
    absent are left out.
    """
    result: dict[str, dict[str, Any]] = {}
    for metric in METRICS:
        _, classes, ours = matrix(rows, metric)
        _, _, theirs = matrix(others, metric)
        difference = ours - theirs
        draws = _resamples(len(difference), seed)
        means = resampled_means(difference, draws)
        values = [_paired(difference[:, n], means[:, n]) for n in range(len(classes))]
        for value, corrected in zip(values, holm([value["p"] for value in values])):
            value["p_holm"] = corrected
        per_case = nanmean(difference, 1)[:, None]
        overall = _paired(per_case[:, 0], resampled_means(per_case, draws)[:, 0])
        for name, value in [(OVERALL, overall), *zip(classes, values)]:
            result.setdefault(name, {})[metric] = value
    return result


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


def _paired(difference: NumpyArray, means: NumpyArray) -> dict[str, Any]:
    known = difference[~np.isnan(difference)]
    if not known.size:
        return {"pairs": 0, **dict.fromkeys(("difference", "low", "high", "p"))}
    p = 1.0 if not known.any() else float(wilcoxon(known, zero_method="wilcox", method="auto").pvalue)
    interval = _interval(means) if known.size > 1 else {"low": None, "high": None}
    return {"pairs": int(known.size), "difference": float(known.mean()), **interval, "p": p}
