"""How a store is made: which cases are missing, who does them, and the manifest at the end. See ``store``."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mambamim_jax.data import arrays, worker
from mambamim_jax.data.arrays import StoreError
from mambamim_jax.data.datasets import Case
from mambamim_jax.data.preprocess import RECIPE, TEMPORARY, dump_json, stamp, write_atomic

Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]
Record = dict[str, Any]


THREADS = 16
"""For looking at many small files, which on a file server mostly waits."""
NOT_ALLOWED = (errno.EACCES, errno.EROFS, errno.EPERM)
EARLIER = {"intensity": "hu", "labels": "nearest"}
"""What ``store.json`` left out once, and how the volumes were made then."""


def check_spec(folder: Path, spec: dict[str, Any]) -> None:
    """Write ``store.json`` into a new store; refuse one that was made otherwise."""
    path = folder / "store.json"
    if not path.exists():
        write_atomic(path, dump_json(spec))
    try:
        found = json.loads(path.read_bytes())
    except json.JSONDecodeError:
        raise StoreError(f"{path}: not readable as JSON; delete this store and preprocess again") from None
    found = EARLIER | found
    wrong = [key for key in {**spec, **found} if found.get(key) != spec.get(key)]
    if wrong:
        key = wrong[0]
        raise StoreError(
            f"{folder}: made with {key} {found.get(key)}, asked for {spec.get(key)}; use another store folder"
        )
    for name in ("volumes", "cases"):
        (folder / name).mkdir(exist_ok=True)


def _record_path(case: Case) -> str:
    images, label = _sources(case)
    paths = [*images, *([label] if label else [])]
    named = chr(0).join([case.id, *paths]).encode(errors="surrogateescape")
    return f"cases/{hashlib.sha256(named).hexdigest()[:24]}.json"


def bring_up_to_date(
    cases: Sequence[Case],
    folder: Path,
    spec: dict[str, Any],
    workers: int | None,
    progress: Progress | None,
    old_labels: bool = False,
    say: Say | None = None,
) -> list[dict[str, Any]]:
    """Preprocess what is missing or changed; the record of every case, in order.

    What is of an earlier recipe is done again, but for volumes without a label or, with ``old_labels``, all volumes.
    """
    for parent in ("volumes", "cases", "."):
        for leftover in (folder / parent).glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(
                missing_ok=True
            )
    records: dict[str, dict[str, Any]] = {}
    jobs: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda case: _current(folder, case), cases))
    earlier = 0
    for case, record in zip(cases, found):
        path, used = _record_path(case), bool(record and record["status"] == "used")
        old = bool(record and record.get("recipe", 1) != RECIPE)
        earlier += old and used and case.label is not None
        if record and (not old or (used and (old_labels or case.label is None))):
            records[path] = record
        else:
            images, label = _sources(case)
            jobs[path] = {"store": str(folder), "record": path, "id": case.id, "source": case.source}
            jobs[path] |= {"images": images, "label": label}
            jobs[path]["earlier"] = record["volume"] if record and used else None
            jobs[path] |= {key: value for key, value in spec.items() if key != "version"}
    if earlier and not old_labels:
        _check_written(folder, earlier)
    if say and earlier:
        say(f"{earlier} label maps of an earlier recipe are {'kept' if old_labels else 'made again'}")
    if progress and records:
        progress(len(records), len(cases), "")
    keys = {(job["id"], job["images"][0], job["label"]): path for path, job in jobs.items()}
    count = workers if workers is not None else min(os.cpu_count() or 1, 8)
    for record in worker.run_jobs(list(jobs.values()), count):
        records[keys[record["id"], record["image"], record["label"]]] = record
        if progress:
            progress(len(records), len(cases), record["id"])
    return [records[_record_path(case)] for case in cases]


def _check_written(folder: Path, earlier: int) -> None:
    """Raises StoreError where so many label maps are to be made again, and nothing may be written."""
    path = folder / "volumes" / f"{TEMPORARY}{os.getpid()}"
    try:
        write_atomic(path, b"")
        path.unlink()
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise
        what = f"{earlier} label maps are of an earlier recipe and must be made again"
        advice = "name another store (--config.data.store), in a folder you may write to"
        raise StoreError(f"{folder}: {what}, but it can't be written ({error.strerror}); {advice}") from error


def _sources(case: Case) -> tuple[list[str], str | None]:
    images = [os.path.abspath(p) for p in case.images]
    return images, os.path.abspath(case.label) if case.label else None


def _current(folder: Path, case: Case) -> Record | None:
    """A case's record if its files are as they were, and so is its volume; a damaged one is removed."""
    record, (images, label) = _load(folder / _record_path(case)), _sources(case)
    if not record or record["stamp"] != stamp([*images, *([label] if label else [])]):
        return None
    if not _whole(folder, record):
        return None
    if record["status"] == "used" and damage(folder, record["volume"], record.get("label_status") == "ok"):
        shutil.rmtree(folder / "volumes" / record["volume"], ignore_errors=True)
        return None
    return record


def damage(folder: Path, name: str, has_label: bool) -> str | None:
    """What is wrong with the files of a volume, see ``arrays.damage``."""
    parts = ("image", "index", "label") if has_label else ("image", "index")
    return next(filter(None, (arrays.damage(f"{folder}/volumes/{name}/{part}") for part in parts)), None)


def _load(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (OSError, json.JSONDecodeError):
        return None


def _whole(folder: Path, record: dict[str, Any]) -> bool:
    return record["status"] != "used" or (folder / "volumes" / record["volume"] / "meta.json").is_file()


def assemble(folder: Path, records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Usable volumes (the first of several equal ones) and the report of these records, in their order."""
    volumes: list[Record] = []
    report: list[Record] = []
    seen: dict[str, str] = {}
    for record in records:
        line = {
            key: record.get(key) for key in ("id", "status", "code", "message", "source", "image", "label")
        }
        line["label_status"] = record.get("label_status")
        if record["status"] == "used":
            meta = json.loads((folder / "volumes" / record["volume"] / "meta.json").read_bytes())
            kept = ("shape", "source_shape", "source_spacing", "source_orientation", "tilted")
            line |= {key: meta[key] for key in kept}
            if twin := seen.get(meta["voxels"]):
                message = f"{record['image']}: same voxels as {twin} [duplicate]"
                line |= {"status": "duplicate", "code": "duplicate", "message": message}
            else:
                seen[meta["voxels"]] = record["image"]
                volumes.append({**meta, **{key: record[key] for key in ("id", "source", "volume")}})
        report.append(line)
    return volumes, report


def write_manifest(folder: Path, spec: dict[str, Any]) -> None:
    """Everything the store holds, of all sources, sorted by source and id."""
    records = [record for path in sorted((folder / "cases").glob("*.json")) if (record := _load(path))]
    records = [record for record in records if _whole(folder, record)]
    records.sort(key=lambda r: (r["source"], r["id"], r["image"], not r["label"], r["label"] or ""))
    volumes, report = assemble(folder, records)
    encoded = dump_json({"version": spec["version"], "spec": spec, "volumes": volumes, "cases": report})
    path = folder / "manifest.json"
    if not path.exists() or path.read_bytes() != encoded:
        write_atomic(path, encoded)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time; others wait.

    Raises: StoreError for a folder with something else in it, which stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    others = [child.name for child in folder.iterdir() if not child.name.startswith(".")]
    # looked for last: another process that begins a store writes it before all else
    if others and not (folder / "store.json").exists():
        raise StoreError(
            f"{folder}: not a store, and not empty (has {others[0]}); name an empty or new folder"
        )
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError:
        if not (folder / "manifest.json").is_file():
            raise
        yield  # a read-only store: complete as it is, or the first write says that it can't be
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def explain(error: OSError, folder: Path) -> str:
    """What went wrong with writing a store, in one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{folder}: disk full; nothing half-written is left, free some space and run again to go on"
    if error.errno in NOT_ALLOWED:
        where = error.filename or folder
        return f"{where}: can't be written ({error.strerror}); name a folder you may write to"
    return f"{folder}: {error.strerror or error}"
