"""Does pre-training help? One fine-tuning config from a pre-trained encoder and from scratch, seeds and label shares.

    pre-train on the training scans, no labels → fine-tune each (start, share of labels, seed) → predict the held-out
    scans → evaluate → a Markdown table

Every stage is the command line that a user would give, written to WORKDIR/commands.txt; what is done is not done again.
One workdir holds one comparison: more --seeds and --shares may be added to it, other settings are refused.
"""

from __future__ import annotations

import argparse
import csv
import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mambamim_jax.bench.stages import StageError, Stages
from mambamim_jax.bench.starts_checks import find_config, prepare
from mambamim_jax.checks import ConfigError, LineParser, overlap, whole
from mambamim_jax.data.datasets import DatasetError
from mambamim_jax.evaluate.label_files import write_text
from mambamim_jax.evaluate.metrics import METRICS
from mambamim_jax.evaluate.statistics import OVERALL, compare, summarise
from mambamim_jax.paths import home
from mambamim_jax.train.logs import METRICS as METRICS_FILE
from mambamim_jax.train.logs import read_rows
from mambamim_jax.train.signals import caught_signals, exit_code

STARTS = ("scratch", "pretrained")
POLL = 0.5
"""Seconds between two looks for a signal."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    start: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.start}_{percent(self.share)}_{self.seed}"

    def evaluation(self, workdir: Path) -> Path:
        """Where its scores lie."""
        return workdir / "runs" / self.name / "evaluation"


def percent(share: float) -> str:
    """A share as the number of its per cent: 0.2 → "20", 0.998 → "99.8"."""
    return f"{100 * share:g}"


def pretrain(stages: Stages, options: argparse.Namespace) -> None:
    """Pre-trains on the training scans."""
    folder = options.workdir / "pretrain"
    stages.run(
        "all", "pretrain", f"--config={options.pretrain}", f"--workdir={folder}",
        *(f"--config.{flag}" for flag in options.pretrain_flag),
        f"--config.data.source={options.workdir / 'data' / 'train'}",
    )  # fmt: skip


def finetune_and_score(
    stages: Stages, run: Run, options: argparse.Namespace, before: Sequence[Callable[[], object]]
) -> None:
    """Fine-tunes, predicts the held-out scans with the last network, and evaluates them on the scans' own grids.

    Args:
      before: what it waits for.
    """
    workdir: Path = options.workdir
    folder, data = workdir / "runs" / run.name, workdir / "data"
    if (run.evaluation(workdir) / "summary.json").is_file():
        return
    for awaited in before:
        awaited()
    init = [f"--config.init={workdir / 'pretrain'}"] if run.start == "pretrained" else []
    flags = [f"--config.{flag}" for flag in options.finetune_flag]
    stages.run(
        run.name, "finetune", f"--config={options.finetune}", f"--workdir={folder}", *flags, *init,
        f"--config.data.source={options.source}", f"--config.data.store={workdir / 'store'}",
        f"--config.data.label_fraction={run.share}", f"--config.data.split_seed={run.seed}",
        f"--config.seed={run.seed}",
    )  # fmt: skip
    predictions = folder / "predictions"
    stages.run(
        run.name, "predict", f"--model={folder / 'last'}", f"--input={data / 'held_out'}",
        f"--output={predictions}", f"--overlap={options.overlap}", "--batch=8",
    )  # fmt: skip
    stages.run(
        run.name, "evaluate", f"--predictions={predictions}", f"--labels={data / 'held_out_labels'}",
        f"--output={run.evaluation(workdir)}", "--workers=1",
    )  # fmt: skip


def compiled(run: Path, work: Future) -> None:
    """Waits for a run's first step, after which the others find its program in the cache, or for its end."""
    while not work.done() and not read_rows(run / METRICS_FILE):
        time.sleep(1)


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Rows of an evaluation's scores.csv, numbers as numbers, NaN where a class is absent."""
    with open(folder / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{**row, **{m: float(row[m]) if row[m] else math.nan for m in METRICS}} for row in rows]


def mean_over_seeds(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each case's and class's scores averaged over the seeds; NaN where one of them has none."""
    found = defaultdict(list)
    for rows in runs:
        for row in rows:
            found[row["case"], row["class"]].append(row)
    return [
        {**rows[0], **{m: float(np.mean([row[m] for row in rows])) for m in METRICS}}
        if len(rows) == len(runs)
        else {**rows[0], **dict.fromkeys(METRICS, math.nan)}
        for rows in found.values()
    ]


def table(workdir: Path, shares: Sequence[float], seeds: int) -> list[str]:
    """The results as Markdown: Dice by class, mean over seeds, spread between seeds, and the paired difference.

    First of all organs; then of those that the label has, since a set may leave organs undrawn that the scan shows;
    then the other metrics' means over classes. A cell is of all scores of the runs, a difference of the cases in
    which every run has a score; the two agree where no run lacks any.
    """
    scores = {
        share: {
            start: [read_scores(Run(start, share, seed).evaluation(workdir)) for seed in range(seeds)]
            for start in STARTS
        }
        for share in shares
    }
    over = f"mean ± deviation over {seeds} seeds"
    lines = []
    for what, left_out in (("Dice", ()), ("Dice where the label has the organ", ("invented",))):
        for share, runs in scores.items():
            kept = {
                start: [[_without(row, left_out) for row in rows] for rows in some]
                for start, some in runs.items()
            }
            cases = len({row["case"] for row in runs["scratch"][0]})
            heading = f"{percent(share)}% of the labels; {what} on {cases} held-out cases, {over}"
            lines += ["", heading, "", *_body(kept)]
    return [*lines, "", f"Means over classes, {over}", "", *_others(scores)]


def _without(row: Mapping[str, Any], statuses: Sequence[str]) -> dict[str, Any]:
    """The row, without scores if its status is one of these."""
    return {**row, **(dict.fromkeys(METRICS, math.nan) if row["status"] in statuses else {})}


def _others(scores: Mapping[float, Mapping[str, Sequence[list[dict[str, Any]]]]]) -> list[str]:
    """The metrics beside Dice: a row for each share and start."""
    names = [metric for metric in METRICS if metric != "dice"]
    lines = [f"| labels, start | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for share, runs in scores.items():
        for start, some in runs.items():
            means = [summarise(rows)[OVERALL] for rows in some]
            cells = [_cell([mean[name]["mean"] for mean in means]) for name in names]
            lines.append(f"| {percent(share)}%, {start} | {' | '.join(cells)} |")
    return lines


def _body(runs: Mapping[str, Sequence[list[dict[str, Any]]]]) -> list[str]:
    """Heading and rows: a class each, the mean first."""
    averaged = {start: mean_over_seeds(some) for start, some in runs.items()}
    differences = compare(averaged["pretrained"], averaged["scratch"])
    by_seed = {start: [summarise(one) for one in some] for start, some in runs.items()}
    lines = [
        "| class | from scratch | pre-trained | difference [95% over cases] | p (Wilcoxon over cases) |",
        "|---|---|---|---|---|",
    ]
    for name in (OVERALL, *(n for n in differences if n != OVERALL)):
        cells = [_cell([one[name]["dice"]["mean"] for one in by_seed[start]]) for start in STARTS]
        d = differences[name]["dice"]
        low, high = (f"{d[end]:+.3f}" if d[end] is not None else "–" for end in ("low", "high"))
        p = "–" if d["p"] is None else f"{d['p']:.2g}"
        gap = "–" if d["difference"] is None else f"{d['difference']:+.3f} [{low}, {high}]"
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {gap} | {p} |")
    return lines


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{np.mean(known):.3f}" + (f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else "")


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"found {text}, expected numbers in (0, 1] with commas between")
    if len({percent(share) for share in shares}) < len(shares):
        raise argparse.ArgumentTypeError(f"found {text}, expected every share once (up to six digits count)")
    return shares


def main(argv: list[str]) -> int:
    """Everything; 0, 2 with one line on what is wrong, or after a signal 75 (SIGTERM, SIGUSR1) or 130 (Ctrl-C)."""
    options = _parser().parse_args(argv)
    options.workdir = home(options.workdir).resolve()
    options.source = home(options.source).resolve()
    options.pretrain, options.finetune = find_config(options.pretrain), find_config(options.finetune)
    try:
        prepare(options)
        stages = Stages(options.workdir, options.jobs, options.gpus)
        with caught_signals() as caught:
            run_all(stages, options, caught)
        if caught:
            print(f"Ended by {signal.Signals(caught[0]).name}; the same command goes on", file=sys.stderr)
            return exit_code(caught[0])
        lines = table(options.workdir, options.shares, options.seeds)
        print("\n".join(lines))
        write_text(options.workdir / "table.md", "\n".join(lines) + "\n")
    except (ConfigError, DatasetError, StageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_all(stages: Stages, options: argparse.Namespace, caught: Sequence[int]) -> None:
    """Pre-training, and every run after what it waits for; returns early when ``caught`` gets a signal.

    Raises: StageError if one fails; the others have been ended then, so that the same command goes on from there.
    """
    pretraining = stages.pool.submit(pretrain, stages, options)
    runs = [
        Run(start, share, seed)
        for start in STARTS
        for seed in range(options.seeds)
        for share in options.shares
    ]
    submit = lambda run, before: stages.pool.submit(finetune_and_score, stages, run, options, before)  # noqa: E731
    first = submit(runs[0], ())
    after = partial(compiled, options.workdir / "runs" / runs[0].name, first)
    waits = {"scratch": (after,), "pretrained": (pretraining.result, after)}
    waiting = {pretraining, first, *(submit(run, waits[run.start]) for run in runs[1:])}
    try:
        while waiting and not caught:
            done, waiting = wait(waiting, POLL, FIRST_COMPLETED)
            for job in done:
                job.result()
    except StageError:
        if not caught:  # else it is the signal that has ended the stage
            raise
    finally:
        stages.end(caught[0] if caught else 0)


def _parser() -> LineParser:
    description, _, usage = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = LineParser(
        prog="launch/compare.py", description=description, epilog=usage, formatter_class=formatter
    )
    parser.add_argument("--source", type=Path, required=True, help="an nnU-Net raw data set with a split")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--pretrain", default="configs/pretrain.py:openkbp_cpu", help="config")
    parser.add_argument("--finetune", default="configs/finetune.py:openkbp_cpu", help="config")
    parser.add_argument("--seeds", type=whole(1), default=3)
    parser.add_argument("--shares", type=_shares, default="1.0,0.2", help="of the labels, each in (0, 1]")
    parser.add_argument("--overlap", type=overlap, default=0.5, help="of windows in prediction, 0 to 0.9")
    parser.add_argument(
        "--jobs", type=whole(1), default=1, help="runs at a time, each on its part of the cores"
    )
    parser.add_argument(
        "--gpus", type=whole(0), default=0, help="over which the runs are spread; 0: each sees all"
    )
    parser.add_argument(
        "--pretrain-flag", action="append", default=[], metavar="KEY=VALUE", help="of its config"
    )
    parser.add_argument(
        "--finetune-flag", action="append", default=[], metavar="KEY=VALUE", help="of its config"
    )
    return parser
