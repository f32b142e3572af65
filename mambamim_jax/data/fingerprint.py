"""What a set of volumes looks like: figures as JSON, and one page (PNG) to judge it by, outliers named."""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mambamim_jax.data.preprocess import HISTOGRAM, dump_json, write_atomic
from mambamim_jax.data.store import Store
from mambamim_jax.data.volume import window_intensity
from mambamim_jax.types import NumpyArray

MONTAGE = 32
"""Volumes shown at most."""
_MEASURES = {
    # name: what one volume's figure is, and the least deviation worth naming
    "source spacing in plane, mm": (lambda m: _flat_spacing(m)[0], 0.3),
    "source slice spacing, mm": (lambda m: _flat_spacing(m)[1], 1.0),
    "extent right to left, mm": (lambda m: m["shape"][0] * m["spacing"][0], 60.0),
    "extent front to back, mm": (lambda m: m["shape"][1] * m["spacing"][1], 60.0),
    "extent along the body, mm": (lambda m: m["shape"][2] * m["spacing"][2], 120.0),
    "share of body": (lambda m: m["foreground"], 0.1),
    "mean HU of the body": (lambda m: m["hu"]["body_mean"], 25.0),
    "spread of HU in the body": (lambda m: m["hu"]["body_std"], 25.0),
    "highest HU": (lambda m: m["hu"]["max"], 1500.0),
    "lowest HU": (lambda m: m["hu"]["min"], 300.0),
}


def write(store: Store, folder: str | Path) -> dict[str, Any]:
    """Write ``fingerprint.json`` and ``fingerprint.png`` into ``folder``; the figures are also returned."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metas = [store.meta(n) for n in range(len(store))]
    figures = describe(store, metas)
    write_atomic(folder / "fingerprint.json", dump_json(figures))
    page = io.BytesIO()
    FigureCanvasAgg(draw(store, metas, figures)).print_png(page, metadata={"Software": None})
    write_atomic(folder / "fingerprint.png", page.getvalue())
    return figures


def describe(store: Store, metas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, medians and ranges, HU histogram and outliers of a store, JSON-able."""
    measured = {name: np.array([get(m) for m in metas], float) for name, (get, _) in _MEASURES.items()}
    first, _, width = HISTOGRAM
    voxels = int(sum(np.prod(m["shape"]) for m in metas))
    return {
        "fingerprint": store.fingerprint,
        "volumes": len(store),
        "voxels": voxels,
        "sources": dict(Counter(entry.source for entry in store.entries)),
        "labels": sum(entry.has_label for entry in store.entries),
        "skipped": _skipped(store),
        "labels_left_out": [
            line["id"] for line in store.report if line["label_status"] not in ("ok", "none", None)
        ],
        "orientations": dict(Counter(m["source_orientation"] for m in metas)),
        "tilted": [e.id for e, m in zip(store.entries, metas) if m["tilted"]],
        "measures": {name: _spread(values) for name, values in measured.items()},
        "histogram": {
            "first_hu": first,
            "bin_hu": width,
            "share": np.round(_histograms(metas).mean(axis=0), 6).tolist(),
        },
        "outliers": _outliers(store, measured),
    }


def _skipped(store: Store) -> dict[str, list[str]]:
    """Ids of the cases that are not used, by reason code."""
    found: dict[str, list[str]] = {}
    for line in store.report:
        if line["status"] != "used":
            found.setdefault(line["code"], []).append(line["id"])
    return found


def _flat_spacing(meta: dict[str, Any]) -> tuple[float, float]:
    """Spacing within slices and between them; slices are stacked along the axis that differs from the
    others.
    """
    a, b, c = sorted(meta["source_spacing"])
    return (a, c) if c - b >= b - a else (c, a)


def _spread(values: NumpyArray) -> dict[str, float]:
    points = np.percentile(values, [0, 5, 50, 95, 100])
    return dict(zip(("min", "p5", "median", "p95", "max"), np.round(points, 4).tolist()))


def _histograms(metas: Sequence[dict[str, Any]]) -> NumpyArray:
    counts = np.array([m["histogram"] for m in metas], float)
    return counts / counts.sum(axis=1, keepdims=True)


def _outliers(store: Store, measured: dict[str, NumpyArray]) -> list[dict[str, Any]]:
    """Volumes far from the median: beyond four times the usual deviation, and by enough to matter; ``limits``
    says how many times as far as that. The farthest volumes come first.
    """
    found = []
    for name, values in measured.items():
        middle = np.median(values)
        usual = 1.4826 * np.median(np.abs(values - middle))
        limits = np.abs(values - middle) / max(4.0 * usual, _MEASURES[name][1])
        for n in np.flatnonzero(limits > 1):
            entry = store.entries[n]
            line: dict[str, Any] = {"id": entry.id, "source": entry.source, "measure": name}
            line |= {"value": round(float(values[n]), 4), "median": round(float(middle), 4)}
            found.append(line | {"limits": round(float(limits[n]), 2)})
    farthest: dict[str, float] = {}
    for line in found:
        farthest[line["id"]] = max(farthest.get(line["id"], 0.0), line["limits"])
    return sorted(found, key=lambda line: (-farthest[line["id"]], line["id"], -line["limits"]))


# --- the page ---


def draw(store: Store, metas: Sequence[dict[str, Any]], figures: dict[str, Any]) -> Figure:
    """Summary, distributions and a montage of middle slices; outliers in red."""
    odd = list(dict.fromkeys(line["id"] for line in figures["outliers"]))
    shown = _choose(store, odd)
    rows = -(-len(shown) // 8)
    figure = Figure(figsize=(16, 7.2 + 2.1 * rows), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[7.2, max(2.1 * rows, 0.1)])
    top, bottom = parts
    axes = top.subplots(2, 3)
    _write_summary(axes[0, 0], figures)
    _draw_histogram(axes[0, 1], metas)
    _write_outliers(axes[0, 2], figures)
    flat = np.array([_flat_spacing(m) for m in metas])
    extent = np.array([np.multiply(m["shape"], m["spacing"]) for m in metas])
    marks = ["tab:red" if entry.id in odd else "tab:blue" for entry in store.entries]
    _scatter(axes[1, 0], flat, marks, "spacing in plane, mm", "slice spacing, mm")
    _scatter(axes[1, 1], extent[:, [0, 2]], marks, "extent right to left, mm", "extent along the body, mm")
    body = np.array([[m["foreground"], m["hu"]["body_mean"]] for m in metas])
    _scatter(axes[1, 2], body, marks, "share of body", "mean HU of the body")
    panels = bottom.subplots(rows, 8, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, n in zip(panels, shown):
        panel.imshow(_slice(store, n), cmap="gray", vmin=0, vmax=1)
        name = store.entries[n].id
        panel.set_title(_short(name), fontsize=7, color="tab:red" if name in odd else "black")
    return figure


def _choose(store: Store, odd: Sequence[str]) -> list[int]:
    """The farthest outliers, then volumes spread evenly over the rest; in the store's order."""
    place = {entry.id: n for n, entry in enumerate(store.entries)}
    strange = [place[name] for name in odd[: MONTAGE // 2]]
    rest = [n for n in range(len(store)) if n not in set(strange)]
    room = MONTAGE - len(strange)
    picked = rest if len(rest) <= room else [rest[i * len(rest) // room] for i in range(room)]
    return sorted(strange + picked)


def _slice(store: Store, n: int) -> NumpyArray:
    """The middle coronal slice of the foreground's box, head up, patient's right on the left."""
    first, stop = store.entries[n].box
    middle = (first[1] + stop[1]) // 2
    plane = np.asarray(store.image(n)[first[0] : stop[0], middle : middle + 1, first[2] : stop[2]])
    return window_intensity(plane[:, 0], (-160.0, 240.0)).T[::-1, ::-1]


def _write_summary(axes: Any, figures: dict[str, Any]) -> None:
    size = f"{figures['voxels'] / 1e9:.2f} G voxels"
    lines = [f"{figures['volumes']} volumes, {figures['labels']} with labels, {size}"]
    lines += [f"  {count} from …{source[-40:]}" for source, count in list(figures["sources"].items())[:5]]
    skipped = [
        f"{len(ids)} {code} ({', '.join(map(_short, ids[:3]))}{', …' * (len(ids) > 3)})"
        for code, ids in figures["skipped"].items()
    ]
    lines += textwrap.wrap(f"skipped: {', '.join(skipped) or 'none'}", 74)[:5]
    lines += [f"stored {', '.join(f'{c} {o}' for o, c in figures['orientations'].items())}"]
    lines += [f"{len(figures['tilted'])} tilted or oblique, put straight"] if figures["tilted"] else []
    lines += ["", "median (5% to 95%)"]
    lines += [
        f"  {name}: {_plain(m['median'])} ({_plain(m['p5'])} to {_plain(m['p95'])})"
        for name, m in figures["measures"].items()
    ]
    axes.axis("off")
    axes.text(0, 1, "\n".join(lines[:26]), va="top", fontsize=8.5, transform=axes.transAxes)


def _write_outliers(axes: Any, figures: dict[str, Any]) -> None:
    """One line a volume, its measures in the order of how far off they are, then the usual values."""
    volumes: dict[str, list[str]] = {}
    for line in figures["outliers"]:
        volumes.setdefault(line["id"], []).append(
            f"{line['measure'].partition(',')[0]} {_plain(line['value'])}"
        )
    lines = [textwrap.shorten(f"{_short(name)}: {', '.join(odd)}", 92) for name, odd in volumes.items()]
    heading = f"{len(lines)} outliers, shown in red; the farthest first" if lines else "no outliers"
    more = [f"… and {len(lines) - 22} more in fingerprint.json"] if len(lines) > 22 else []
    axes.axis("off")
    text = "\n".join([heading, "", *lines[:22], *more])
    color = "tab:red" if lines else "black"
    axes.text(-0.1, 1, text, va="top", fontsize=8, color=color, transform=axes.transAxes)


def _draw_histogram(axes: Any, metas: Sequence[dict[str, Any]]) -> None:
    shares = _histograms(metas)
    first, last, width = HISTOGRAM
    middle = np.arange(first, last, width) + width / 2
    low, high = np.percentile(shares, [5, 95], axis=0)
    axes.fill_between(
        middle, np.maximum(low, 1e-6), np.maximum(high, 1e-6), alpha=0.3, label="5% to 95% of volumes"
    )
    axes.plot(middle, np.maximum(np.median(shares, axis=0), 1e-6), label="median")
    axes.set(yscale="log", xlabel="HU", ylabel="share of voxels", ylim=(1e-6, 1))
    axes.legend(fontsize=8)


def _scatter(axes: Any, points: NumpyArray, colors: list[str], x: str, y: str) -> None:
    axes.scatter(points[:, 0], points[:, 1], c=colors, s=14, alpha=0.7)
    axes.set(xlabel=x, ylabel=y)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}"


def _plain(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.3g}"
