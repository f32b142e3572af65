"""An evaluation from folders to files: scores of every case, summary, comparison, one page to look at."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambamim_jax import visualise
from mambamim_jax.evaluate import figure, worst
from mambamim_jax.evaluate.inputs import InputError
from mambamim_jax.evaluate.label_files import write_text
from mambamim_jax.evaluate.metrics import METRICS
from mambamim_jax.evaluate.output import made_otherwise
from mambamim_jax.evaluate.scoring import Pair, find_pairs, score_all, values_of
from mambamim_jax.evaluate.statistics import Rows, compare, summarise
from mambamim_jax.evaluate.tables import Table, find_table, read_table, table_of_values
from mambamim_jax.train.progress import Terminal

RULES = {
    "absent": "neither label nor prediction has a voxel: left out of every mean",
    "missed": "labelled, not predicted: Dice, IoU and NSD 0, HD95 the image's diagonal",
    "invented": "predicted, not labelled: Dice, IoU and NSD 0, HD95 the image's diagonal",
    "interval": "95%, bootstrap over cases, 10,000 resamples",
    "difference": "over the cases that both have a score for; over classes, the mean of the classes' differences",
    "p": "Wilcoxon signed-rank over cases, two-sided, over classes of each case's mean difference; p_holm corrected "
    "for the number of classes",
}


@dataclass(frozen=True)
class Request:
    """What to evaluate; see ``launch/evaluate.py --help``."""

    predictions: Path
    labels: Path
    output: Path
    labels_json: Path | None = None
    compare: Path | None = None
    images: Path | None = None
    tolerance: float = 2.0
    workers: int = 1


def evaluate(request: Request, terminal: Terminal | None = None) -> dict[str, Any]:
    """Scores, summarises, draws, and writes scores.csv, summary.json and report.png into the output folder.

    Returns: what summary.json holds.

    Raises: InputError or VolumeError, in one line.
    """
    terminal = terminal or Terminal()
    if not 0 < request.tolerance < math.inf:
        raise InputError(f"--tolerance: found {request.tolerance}, expected a positive length in mm")
    _check_output(request.output)
    pairs, left = find_pairs(request.predictions, request.labels)
    other_pairs = _other_pairs(request, pairs) if request.compare else []
    _check_images(request.images, pairs)
    table = _table(request, pairs)
    rows = _score(pairs, table, request, terminal, "Scoring")
    summary: dict[str, Any] = {
        "predictions": str(request.predictions),
        "labels": str(request.labels),
        "table": table.source,
        "tolerance_mm": request.tolerance,
        "rules": RULES,
        "cases": len(pairs),
        "labelled_but_not_predicted": left,
        "made_otherwise": sorted(
            {pair.case for pair in pairs}.intersection(made_otherwise(request.predictions))
        ),
        "scores": summarise(rows),
    }
    others = None
    if request.compare:
        others = _score(other_pairs, table, request, terminal, "Scoring the other")
        summary["compared_with"] = str(request.compare)
        summary["other_scores"], summary["differences"] = summarise(others), compare(rows, others)
    try:
        _write(request, rows, others, summary, pairs, table)
    except OSError as error:
        raise InputError(f"{request.output}: cannot be written ({error.strerror})") from None
    for line in lines(summary):
        terminal.say(line)
    return summary


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary as a Markdown table, and what a reader must know besides."""
    heads = {"dice": "Dice", "iou": "IoU", "hd95": "HD95 (mm)", "nsd": f"NSD {summary['tolerance_mm']:g} mm"}
    found = ["", f"| class | {' | '.join(heads[m] for m in METRICS)} | scored | absent | missed | invented |"]
    found += ["|---|" + "---|" * (len(METRICS) + 4)]
    for name, scores in summary["scores"].items():
        counts = " | ".join(str(scores[key]) for key in ("scored", "absent", "missed", "invented"))
        found.append(f"| {name} | {' | '.join(_cell(scores[m]) for m in METRICS)} | {counts} |")
    if "differences" in summary:
        found += ["", f"Difference to {summary['compared_with']} [95% interval], p (Wilcoxon), p (Holm):", ""]
        found += [
            f"| class | pairs | {' | '.join(heads[m] for m in METRICS)} |",
            "|---|---|" + "---|" * len(METRICS),
        ]
        for name, scores in summary["differences"].items():
            cells = " | ".join(_difference(scores[m]) for m in METRICS)
            found.append(f"| {name} | {scores['dice']['pairs']} | {cells} |")
    if left := summary["labelled_but_not_predicted"]:
        found += [
            "",
            f"note: {len(left)} labelled cases have no prediction and are not in this (first {left[0]})",
        ]
    if others := summary["made_otherwise"]:
        found += [
            "",
            f"note: {len(others)} of these predictions may have been made with other settings than the rest, as "
            f"predictions.json says (first {others[0]})",
        ]
    return found


def _cell(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "–"
    spread = "" if found["std"] is None else f" ± {_number(found['std'])}"
    interval = "" if found["low"] is None else f" [{_number(found['low'])}, {_number(found['high'])}]"
    return f"{_number(found['mean'])}{spread}{interval}"


def _difference(found: Mapping[str, Any]) -> str:
    if found["difference"] is None:
        return "–"
    interval = "" if found["low"] is None else f" [{_number(found['low'])}, {_number(found['high'])}]"
    ps = [f"p {found[key]:.2g}" for key in ("p", "p_holm") if found.get(key) is not None]
    return f"{found['difference']:+.3f}{interval} {', '.join(ps)}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _check_output(folder: Path) -> None:
    """Raises InputError for what no files can be written into; makes nothing."""
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    if not there.is_dir():
        raise InputError(f"{there}: is not a folder; name another --output, it is made if it is not there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there}: cannot be written; name another --output")


def _check_images(folder: Path | None, pairs: Sequence[Pair]) -> None:
    """Raises InputError where a folder of scans is asked for and has none of any case."""
    expected = "expected scans in it, CASE_0000.nii.gz or CASE.nii.gz"
    if folder and not folder.is_dir():
        raise InputError(f"{folder}: no such folder (--images); {expected}")
    if folder and not any(worst.find_image(pair, folder) for pair in pairs):
        raise InputError(f"{folder}: no scan of {pairs[0].case} or any other case (--images); {expected}")


def _table(request: Request, pairs: list[Pair]) -> Table:
    if request.labels_json:
        return read_table(request.labels_json)
    return find_table(request.labels, request.predictions) or table_of_values(values_of(pairs))


def _score(
    pairs: list[Pair], table: Table, request: Request, terminal: Terminal, title: str
) -> list[dict[str, Any]]:
    with terminal.counting(title) as progress:
        return score_all(pairs, table, request.tolerance, request.workers, progress)


def _other_pairs(request: Request, pairs: list[Pair]) -> list[Pair]:
    """The same cases' predictions of the other run; raises InputError where one is missing."""
    assert request.compare
    found = {pair.case: pair for pair in find_pairs(request.compare, request.labels)[0]}
    missing = [pair.case for pair in pairs if pair.case not in found]
    if missing:
        advice = "a paired comparison needs the same cases in both"
        raise InputError(
            f"{request.compare}: no prediction of case {missing[0]} ({len(missing)} missing); {advice}"
        )
    return [found[pair.case] for pair in pairs]


def _write(
    request: Request,
    rows: Rows,
    others: Rows | None,
    summary: Mapping[str, Any],
    pairs: Sequence[Pair],
    table: Table,
) -> None:
    request.output.mkdir(parents=True, exist_ok=True)
    write_text(request.output / "scores.csv", _csv(rows, others))
    write_text(request.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    by_case = {pair.case: pair for pair in pairs}
    slices = [
        worst.overlay(row, by_case[row["case"]], table, request.images)
        for row in worst.worst_rows(rows, figure.SHOWN)
    ]
    names = [path.resolve().name for path in (request.predictions, request.compare) if path]
    heading = f"{names[0]}{' against ' + names[1] if len(names) > 1 else ''}: {len(pairs)} cases"
    page = figure.draw(rows, others, names, summary["scores"], slices, heading)
    visualise.write_png(page, request.output / "report.png")


def _csv(rows: Rows, others: Rows | None) -> str:
    """A line per run, case and class; empty cells where a class is absent."""
    text = io.StringIO()
    columns = ["run", "case", "class", *METRICS, "status", "predicted_ml", "labelled_ml"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for run, some in (("predictions", rows), ("compared", others or [])):
        for row in some:
            values = ["" if math.isnan(row[m]) else f"{row[m]:.6g}" for m in METRICS]
            volumes = [f"{row[key]:.6g}" for key in ("predicted", "labelled")]
            writer.writerow([run, row["case"], row["class"], *values, row["status"], *volumes])
    return text.getvalue()
