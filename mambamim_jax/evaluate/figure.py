"""One page on an evaluation: scores per class as box plots, the worst cases as overlays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mambamim_jax.evaluate.statistics import OVERALL, Rows, cases_and_classes
from mambamim_jax.types import NumpyArray
from mambamim_jax.visualise import rasterise

RUNS = ("#1f4e79", "#c8702a")
LABEL, PREDICTION = "#43d17a", "#ff5f57"
GREY = "#5a6570"
PAGE = (8.27, 11.69)
SHOWN = 6
PANELS = (("dice", "Dice"), ("nsd", "NSD"), ("hd95", "HD95 (mm)"))


@dataclass(frozen=True)
class Overlay:
    """A slice of a case: what was labelled and what was predicted of one class.

    Attributes:
      title, note: what stands above and below.
      image: (rows, columns) in [0, 1], None where there is no scan to show.
      labelled, predicted: (rows, columns) bool.
      aspect: height of a pixel over its width.
    """

    title: str
    note: str
    image: NumpyArray | None
    labelled: NumpyArray
    predicted: NumpyArray
    aspect: float


def draw(
    rows: Rows,
    others: Rows | None,
    names: Sequence[str],
    summary: Mapping[str, Any],
    overlays: Sequence[Overlay],
    heading: str,
) -> NumpyArray:
    """The page, (rows, columns, 3) uint8.

    Args:
      rows, others: scores of a run and of the one it is compared with. names: of the runs, for the legend.
      summary: see ``statistics.summarise``. overlays: at most six are shown.
    """
    figure = Figure(figsize=PAGE, dpi=150, facecolor="white")
    figure.text(0.07, 0.972, heading, fontsize=14, weight="bold", va="top")
    figure.text(0.07, 0.949, _headline(summary[OVERALL]), fontsize=9, color=GREY, va="top")
    plots = figure.add_gridspec(len(PANELS), 1, left=0.09, right=0.97, top=0.9, bottom=0.52, hspace=0.1)
    runs = [rows, *([others] if others else [])]
    axes = [figure.add_subplot(plots[number]) for number in range(len(PANELS))]
    for axis, (metric, title) in zip(axes, PANELS):
        _boxes(axis, runs, metric, title, last=axis is axes[-1])
    figure.align_ylabels(axes)
    handles = [
        Line2D([], [], color=colour, linewidth=6, label=name)
        for colour, name in zip(RUNS, names[: len(runs)])
    ]
    missed = {"marker": "o", "markerfacecolor": "white", "markeredgecolor": PREDICTION}
    handles.append(Line2D([], [], linestyle="", markersize=4.5, label="missed or invented", **missed))  # type: ignore
    _legend(figure, handles, 0.93)
    if overlays:
        _overlays(figure, overlays[:SHOWN])
    return rasterise(figure)


def _headline(overall: Mapping[str, Any]) -> str:
    """The means over classes with their intervals, and what was missed, in one line."""
    parts = []
    for metric, title in PANELS:
        found = overall[metric]
        if found["mean"] is not None:
            interval = "" if found["low"] is None else f" [{_number(found['low'])}, {_number(found['high'])}]"
            parts.append(f"{title} {_number(found['mean'])}{interval}")
    counts = ", ".join(f"{overall[status]} {status}" for status in ("missed", "invented", "absent"))
    return f"Mean over classes [95% interval]: {', '.join(parts)}\n{overall['scored']} structures scored; {counts}"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.1f}"


def _boxes(axis: Axes, runs: Sequence[Rows], metric: str, title: str, last: bool) -> None:
    """A box per class and run, each case a point; what was missed or invented as an open one."""
    classes = cases_and_classes(runs[0])[1]
    width = 0.62 / len(runs)
    draw = np.random.default_rng(0)
    for number, rows in enumerate(runs):
        shift, colour = (number - (len(runs) - 1) / 2) * (width + 0.04), RUNS[number]
        for column, name in enumerate(classes):
            scored = [row for row in rows if row["class"] == name and row["status"] != "absent"]
            values = np.array([row[metric] for row in scored])
            if not values.size:
                continue
            place = column + shift
            line = {"color": colour, "linewidth": 1.0}
            axis.boxplot(
                values, positions=[place], widths=width, whis=(5, 95), showfliers=False, patch_artist=True,
                boxprops={"facecolor": colour + "30", **line}, medianprops={**line, "linewidth": 1.8},
                whiskerprops=line, capprops=line, manage_ticks=False,
            )  # fmt: skip
            x = place + draw.uniform(-0.25, 0.25, len(values)) * width
            failed = np.array([row["status"] != "ok" for row in scored])
            axis.scatter(x[~failed], values[~failed], s=7, color=colour, alpha=0.55, linewidths=0, zorder=3)
            axis.scatter(x[failed], values[failed], s=16, facecolors="white", edgecolors=PREDICTION, zorder=4)
    axis.set(xlim=(-0.6, len(classes) - 0.4), ylabel=title)
    if metric == "hd95":
        highest = max(
            (row[metric] for rows in runs for row in rows if row["status"] != "absent"), default=1.0
        )
        axis.set_yscale("symlog", linthresh=1.0, linscale=0.4)
        axis.set_ylim(0, 2 * max(highest, 1.0))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_ylim(-0.03, 1.03)
    size = 8 if len(classes) <= 20 else 5
    names = classes if last else []
    axis.set_xticks(range(len(classes)), names or [""] * len(classes), rotation=35 if len(classes) <= 20 else 90,
                    ha="right" if len(classes) <= 20 else "center", rotation_mode="anchor", fontsize=size)  # fmt: skip
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _overlays(figure: Figure, overlays: Sequence[Overlay]) -> None:
    """Two rows of three slices."""
    figure.text(0.07, 0.437, "Worst cases", fontsize=11, weight="bold", va="top")
    handles = [
        Line2D([], [], color=LABEL, label="label"),
        Line2D([], [], color=PREDICTION, label="prediction"),
    ]
    _legend(figure, handles, 0.443)
    cells = figure.add_gridspec(2, 3, left=0.05, right=0.97, top=0.4, bottom=0.045, hspace=0.3, wspace=0.05)
    for number, overlay in enumerate(overlays):
        axis = figure.add_subplot(cells[number // 3, number % 3])
        shown = np.zeros(overlay.labelled.shape) if overlay.image is None else overlay.image
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1, aspect=overlay.aspect, interpolation="bilinear")
        for mask, colour in ((overlay.labelled, LABEL), (overlay.predicted, PREDICTION)):
            if mask.any():
                axis.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=0.18)
                axis.contour(mask, levels=[0.5], colors=[colour], linewidths=1.1)
        axis.set(xticks=[], yticks=[], facecolor="black")
        axis.set_title(overlay.title, fontsize=8, pad=3)
        axis.set_xlabel(overlay.note, fontsize=7.5, color=GREY, labelpad=3)
        axis.spines[:].set_visible(False)


def _legend(figure: Figure, handles: Sequence[Line2D], top: float) -> None:
    """A line of names at the right, its upper edge at this height of the page."""
    options: dict[str, Any] = {"handlelength": 1.4, "columnspacing": 1.2, "frameon": False, "fontsize": 9}
    figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(0.98, top), ncols=len(handles), **options
    )
