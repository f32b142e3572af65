"""Arrays → PNG: panels of a crop in three planes, and loss curves.

Volumes are in RAS order; every plane is turned the way radiologists look at it: anterior or superior up, the
patient's right on the left of axial and coronal pictures, anterior on the left of sagittal ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mambamim_jax.types import NumpyArray

if TYPE_CHECKING:  # Matplotlib is loaded when something is drawn: most processes draw nothing
    from matplotlib.figure import Figure

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}
BACKGROUND, TEXT, HIDDEN = "#111417", "#e8e6e3", "#2d3f4f"
ERROR = "error"


def plane(volume: NumpyArray, name: str) -> NumpyArray:
    """The central slice of an RAS volume (h, w, d, …), as a radiologist looks at it: (rows, columns, …)."""
    axis = PLANES[name]
    flat = np.take(volume, volume.shape[axis] // 2, axis=axis)
    return flat[::-1, ::-1].swapaxes(0, 1)


def label_colours(count: int) -> NumpyArray:
    """RGB of the labels 0 to count - 1, (count, 3) float32 in [0, 1]; neighbours differ clearly."""
    import matplotlib

    colours = matplotlib.colormaps["tab10"].colors + matplotlib.colormaps["Set2"].colors  # type: ignore[attr-defined]
    return np.array([colours[n % len(colours)] for n in range(-1, count - 1)], np.float32)


def draw_panel(pictures: Mapping[str, NumpyArray], heading: str) -> NumpyArray:
    """Three planes (rows) of several volumes of one crop (columns).

    Args:
      pictures: {title: (h, w, d), or (h, w, d, 3) in RGB} in [0, 1], NaN where hidden; a title that holds "error"
        is drawn in colour.
      heading: a line above.

    Returns:
      (rows, columns, 3) uint8.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = len(pictures)
    figure = Figure(figsize=(2.5 * columns + 1.1, 8.3), dpi=100, facecolor=BACKGROUND)
    room = {"left": 0.035, "right": 0.95, "top": 0.925, "bottom": 0.01, "wspace": 0.03, "hspace": 0.03}
    cells = figure.add_gridspec(len(PLANES), columns + 1, width_ratios=[1.0] * columns + [0.05], **room)
    for column, (title, volume) in enumerate(pictures.items()):
        volume, is_error = np.asarray(volume, np.float32), ERROR in title
        colours = matplotlib.colormaps["inferno" if is_error else "gray"].with_extremes(bad=HIDDEN)
        high = max(0.25, float(np.nanmax(volume))) if is_error else 1.0
        for row, name in enumerate(PLANES):
            axis = figure.add_subplot(cells[row, column])
            drawn = axis.imshow(plane(volume, name), cmap=colours, vmin=0, vmax=high, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(title, color=TEXT, fontsize=12)
            if column == 0:
                axis.set_ylabel(name, color=TEXT, fontsize=12)
        if is_error:
            bar = figure.colorbar(drawn, cax=figure.add_subplot(cells[1, columns]))
            bar.ax.tick_params(colors=TEXT, labelsize=9)
            bar.outline.set_visible(False)
    figure.suptitle(heading, color=TEXT, fontsize=13, y=0.988)
    return rasterise(figure)


def draw_loss_curve(rows: Sequence[Mapping[str, Any]], heading: str) -> NumpyArray:
    """Loss by step, each and smoothed, with the learning rate below; (rows, columns, 3) uint8."""
    from matplotlib.figure import Figure

    step, loss, rate = (np.array([row[name] for row in rows], float) for name in ("step", "loss", "lr"))
    figure = Figure(figsize=(9, 5), dpi=100, facecolor="white")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot(step, loss, color="#9db7cf", linewidth=0.9, label="each step")
    upper.plot(step, smooth(loss), color="#1f4e79", linewidth=2, label="smoothed")
    upper.set(ylabel="loss", title=heading)
    upper.legend(frameon=False)
    lower.plot(step, rate, color="#7a4b1f")
    lower.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    for axis in (upper, lower):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return rasterise(figure)


def smooth(values: NumpyArray) -> NumpyArray:
    """A centred mean over about a twentieth of the values."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    low = np.maximum(np.arange(len(values)) - half, 0)
    return (total[high] - total[low]) / (high - low)


def rasterise(figure: Figure) -> NumpyArray:
    """(rows, columns, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_png(image: NumpyArray, path: Path) -> None:
    """Writes (rows, columns, 3) uint8, aside first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".png.part")
    try:
        Image.fromarray(image).save(aside, format="png")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
