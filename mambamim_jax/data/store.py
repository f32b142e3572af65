"""A store: every volume preprocessed once into a folder of plain NumPy files, and read from there by random
access.

    store.json             version, spacing (mm), window (HU) that counts as foreground
    volumes/ID-KEY/        one per volume, see ``preprocess``; KEY is a digest of the source files' content, and of
                           the recipe of labels where there is one
    cases/KEY.json         what became of each source case, so that no file is read twice
    manifest.json          all usable volumes of the store in one file

Everything is written under a passing name and renamed, so a run killed at any moment leaves a store that the
next run completes; nothing in it depends on when or with how many workers it was made.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mambamim_jax.data import arrays, builder, crop, volume
from mambamim_jax.data.arrays import StoreError
from mambamim_jax.data.builder import Progress, Record, Say
from mambamim_jax.data.datasets import Case, discover_all
from mambamim_jax.data.preprocess import dump_json, write_atomic
from mambamim_jax.types import NumpyArray, Size3, Spacing

__all__ = [
    "DataLossError",
    "Entry",
    "Store",
    "StoreError",
    "is_store",
    "open_or_prepare",
    "open_store",
    "prepare",
]

VERSION = 1


class DataLossError(RuntimeError):
    """Too few cases of a data set are usable; the message is one line."""

    exit_code = 2


@dataclass(frozen=True)
class Entry:
    """One usable volume. ``box`` is the foreground's first voxel and one past its last, for the store's own
    window.
    """

    id: str
    source: str
    folder: str
    shape: Size3
    box: tuple[Size3, Size3]
    digest: str
    has_label: bool


class Store:
    """Usable volumes, in a fixed order, read by random access. Cheap to hold and to pickle: files open when
    read.
    """

    def __init__(
        self, folder: Path, spec: dict[str, Any], volumes: Sequence[Record], report: Sequence[Record]
    ) -> None:
        self.folder, self.spec, self.report = Path(folder).absolute(), spec, tuple(report)
        self.volumes = tuple(volumes)
        self.entries = tuple(_entry(line) for line in volumes)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def normalised(self) -> bool:
        """Whether images are stored normalised, float16 (h, w, d, c), 0 where nothing was scanned; else HU."""
        return self.spec.get("intensity", "hu") != "hu"

    def select(self, ids: Sequence[str]) -> Store:
        """The same store with only these cases, in this order."""
        volumes = {line["id"]: line for line in self.volumes}
        chosen = [volumes[name] for name in ids]
        return Store(self.folder, self.spec, chosen, [line for line in self.report if line["id"] in set(ids)])

    @property
    def fingerprint(self) -> str:
        """Digest of the volumes' voxels, their order and the spacing."""
        parts = [str(self.spec["spacing"]), *(entry.digest for entry in self.entries)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def summary(self) -> str:
        """A few lines for the terminal: usable and skipped volumes, and why."""
        skipped = Counter(line["code"] for line in self.report if line["status"] != "used")
        labels = sum(entry.has_label for entry in self.entries)
        bad_labels = sum(line.get("label_status") not in ("ok", "none", None) for line in self.report)
        lines = [f"{len(self)} of {len(self.report)} volumes usable, {labels} with labels, in {self.folder}"]
        lines += [
            f"  {count} skipped: {code} ({volume.REASONS[code]})" for code, count in skipped.most_common()
        ]
        lines += [f"  {bad_labels} label maps left out (see data_report.jsonl)"] if bad_labels else []
        return "\n".join(lines)

    def image(self, n: int) -> NumpyArray:
        """HU of volume ``n``, int16 (h, w, d), or z-scores, float16 (h, w, d, c); slice it to read."""
        return arrays.open_array(self.path(n, "image"))

    def label(self, n: int) -> NumpyArray:
        """Label map of volume ``n``, uint8 or uint16 (h, w, d); slice it to read."""
        return arrays.open_array(self.path(n, "label"))

    def meta(self, n: int) -> dict[str, Any]:
        """Geometry, statistics and digests of volume ``n``."""
        return json.loads((self.folder / "volumes" / self.entries[n].folder / "meta.json").read_bytes())

    def foreground(self, n: int, low: float) -> tuple[NumpyArray, NumpyArray]:
        """Box int64 (2, 3) and ``crop.block_counts`` of what lies above ``low`` HU in volume ``n``.

        Both come from disk for the store's own window, and are computed once (and kept) for another. In a store
        of z-scores foreground is what is not zero, whatever ``low``.
        """
        if self.normalised or low == self.spec["window"][0]:
            return np.array(self.entries[n].box, np.int64), arrays.open_array(self.path(n, "index"))
        return _foreground(self.path(n, "image"), low)

    def path(self, n: int, name: str) -> str:
        """Where an array of volume ``n`` lies, without the ending of its encoding."""
        return f"{self.folder}/volumes/{self.entries[n].folder}/{name}"


@lru_cache(maxsize=4096)
def _foreground(path: str, low: float) -> tuple[NumpyArray, NumpyArray]:
    hu = arrays.open_array(path)[:]
    box = volume.foreground_box(hu, low)
    if box is None:
        raise StoreError(
            f"{path}: nothing above {low:g} HU; lower the window's low end or leave this volume out"
        )
    return box, crop.block_counts(hu, low)


# ----------------------------------------------------------------------------------------- making and opening


def prepare(
    cases: Sequence[Case],
    folder: str | Path,
    *,
    spacing: Spacing = (1.5, 1.5, 1.5),
    window: tuple[float, float] = (-175.0, 250.0),
    encoding: str = "npy",
    intensity: str = "hu",
    labels: str = "volume",
    old_labels: bool = False,
    report_path: str | Path | None = None,
    max_lost: float = 0.1,
    workers: int | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Store:
    """Preprocess the cases that ``folder`` does not hold yet, and open it for exactly these cases, in their
    order.

    Idempotent and resumable. Cases already in the store are neither read nor written again as long as their
    files keep size and modification time.

    Args:
        cases: from ``datasets.discover``. folder: the store, made if missing. spacing: mm along R, A, S.
        window: HU; what lies above its low end is foreground (the store itself keeps all HU).
        encoding: ``npy`` (fast) or ``blosc2`` (compact), see ``arrays``. intensity: ``hu``, one channel kept
            as it is; or ``zscore``, any channels, normalised over their non-zero voxels.
        labels: ``nearest`` voxel alone; or ``volume``, with every organ's volume kept, see ``organ_volumes``.
        old_labels: take those of an earlier recipe, too, in place of making them again: for whom reads none, or
            goes on with them.
        report_path: write one JSON line per case here. max_lost: largest share of cases that may be refused.
        workers: processes; None for one per core and at most eight. progress: called with (done, total, case
            id). say: called with a line on label maps of an earlier recipe, where there are some.

    Raises:
        DataLossError: none usable, or more than ``max_lost`` refused.
        StoreError: the store was made with other settings, or can't be written.
    """
    folder = Path(folder)
    arrays.require(encoding)
    spec: dict[str, Any] = {"version": VERSION, "encoding": encoding, "intensity": intensity}
    spec |= {"labels": labels, "spacing": list(map(float, spacing)), "window": list(map(float, window))}
    try:
        with builder.locked(folder):
            builder.check_spec(folder, spec)
            records = builder.bring_up_to_date(cases, folder, spec, workers, progress, old_labels, say)
            volumes, report = builder.assemble(folder, records)
            builder.write_manifest(folder, spec)
        store = Store(folder, spec, volumes, report)
        if report_path is not None:
            Path(report_path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(report_path), b"".join(dump_json(line) for line in store.report))
    except OSError as error:
        raise StoreError(builder.explain(error, folder)) from error
    _check_loss(store, max_lost, report_path)
    return store


def open_store(folder: str | Path) -> Store:
    """Open all usable volumes of a finished store.

    Raises:
        StoreError: no store there, or of another version, or not all of it, or what reads it is not installed.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError(
            f"{folder}: not a finished store ({error}); make one with launch/preprocess.py"
        ) from None
    if manifest.get("version") != VERSION:
        raise StoreError(
            f"{folder}: store version {manifest.get('version')}, this code reads {VERSION}; preprocess again"
        )
    store = Store(folder, manifest["spec"], manifest["volumes"], manifest["cases"])
    try:
        arrays.require(store.spec["encoding"])
    except StoreError as error:
        raise StoreError(f"{folder}: {error}") from None
    with ThreadPoolExecutor(builder.THREADS) as pool:
        looks = pool.map(lambda entry: builder.damage(folder, entry.folder, entry.has_label), store.entries)
        damaged = [found for found in looks if found]
    if damaged:
        raise StoreError(f"{len(damaged)} of {len(store)} volumes are damaged, first {damaged[0]}")
    return store


def is_store(folder: str | Path) -> bool:
    """Whether a folder is a store, finished or not."""
    return (Path(folder) / "store.json").is_file()


def open_or_prepare(
    source: str | Path | Sequence[str | Path], folder: str | Path, *, format: str = "auto", **options: Any
) -> Store:
    """``open_store`` if ``source`` is a store, else ``prepare`` the cases of one or several sources into
    ``folder``.

    Args:
        source: a store, or data sets as ``datasets.discover`` takes them. options: of ``prepare``.

    Raises:
        StoreError: also if the store has another spacing than asked for.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if len(sources) == 1 and is_store(sources[0]):
        store = open_store(sources[0])
        asked = [float(s) for s in options.get("spacing", store.spec["spacing"])]
        if asked != store.spec["spacing"]:
            found = f"made with spacing {store.spec['spacing']} mm, asked for {asked}"
            advice = "set --config.data.spacing to the store's, or preprocess into another"
            raise StoreError(f"{sources[0]}: {found}; {advice}")
        return store
    return prepare(discover_all(sources, format), folder, **options)


def _entry(line: dict[str, Any]) -> Entry:
    first, stop = (tuple(point) for point in line["box"])
    return Entry(
        line["id"],
        line["source"],
        line["volume"],
        tuple(line["shape"]),
        (first, stop),
        line["voxels"],
        line["label"] == "ok",
    )


def _check_loss(store: Store, max_lost: float, report_path: str | Path | None) -> None:
    lost = [line for line in store.report if line["status"] == "refused"]
    where = f"; see {report_path}" if report_path else ""
    example = f" (first: {lost[0]['message']})" if lost else ""
    if not len(store):
        raise DataLossError(f"none of {len(store.report)} volumes can be used{example}{where}")
    if len(lost) > max_lost * len(store.report):
        share = f"{len(lost)} of {len(store.report)} volumes refused, more than max_lost={max_lost:g} allows"
        raise DataLossError(f"{share}{example}{where}")
