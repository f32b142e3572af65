"""Preprocess one case into its folder of a store: read, check, put on the RAS grid, index the foreground,
write at once.

A volume's folder holds:

    image       int16 (h, w, d), HU before any window       label    uint8 or uint16 (h, w, d), if there is
    one index.npy   uint16, see ``crop.block_counts``           meta.json    geometry, box, statistics,
    digests

with image and label as ``.npy`` or ``.b2nd``, see ``arrays``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from mambamim_jax.data import arrays, crop, nifti, volume
from mambamim_jax.data.volume import Volume, VolumeError
from mambamim_jax.types import NumpyArray

HISTOGRAM = (-1024, 2048, 64)
"""First edge, last edge and width in HU of the histogram kept per volume; the end bins take what lies
beyond.
"""
TEMPORARY = ".partial-"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one case and return its record, which is also written to the store.

    Args:
        job: ``store`` (folder), ``record`` (file of the record), ``id``, ``source``, ``images``, ``label``
            (or None), ``spacing`` (mm) and ``window`` (HU).

    Raises:
        OSError: the store can't be written; nothing half-written is left.
    """
    record = {
        "id": job["id"],
        "source": job["source"],
        "image": job["images"][0],
        "label": job["label"],
        "stamp": stamp([*job["images"], *([job["label"]] if job["label"] else [])]),
    }
    try:
        record |= {"status": "used", "code": None, "message": None, **_preprocess(job)}
    except VolumeError as error:
        record |= {"status": "refused", "code": error.code, "message": str(error)}
    except MemoryError:
        return record | {
            "status": "refused",
            "code": "worker_died",
            "message": "out of memory; use fewer workers",
        }
    write_atomic(Path(job["store"]) / job["record"], dump_json(record))
    return record


def stamp(paths: list[str]) -> list[list[int] | None]:
    """Size and modification time (ns) of each file: what tells that a source has changed."""
    found: list[list[int] | None] = []
    for path in paths:
        try:
            status = os.stat(path)
            found.append([status.st_size, status.st_mtime_ns])
        except OSError:
            found.append(None)
    return found


def _preprocess(job: dict[str, Any]) -> dict[str, Any]:
    if len(job["images"]) != 1:
        raise VolumeError("several_channels", job["images"][0], f"{len(job['images'])} channels, CT has one")
    low = job["window"][0]
    content, digest = _read(job["images"][0])
    label_content, label_digest = _read(job["label"]) if job["label"] else (None, "")
    key = hashlib.sha256(f"{digest}{label_digest}".encode()).hexdigest()[:16]
    folder = Path(job["store"]) / "volumes" / f"{_plain(job['id'])}-{key}"
    if not (folder / "meta.json").is_file():
        image = nifti.read(job["images"][0], low=low, content=content)
        del content
        label, refusal = _label(job, label_content, image)
        spacing = tuple(job["spacing"])
        hu = volume.resample(image, spacing, dtype=np.int16)
        box = volume.foreground_box(hu.voxels, low)
        if box is None:
            raise VolumeError("air_only", job["images"][0], f"nothing above {low:g} HU after resampling")
        meta = _describe(image, hu, box, low, digest) | {"label": refusal or ("ok" if label else "none")}
        parts = {"image": hu.voxels, "index": crop.block_counts(hu.voxels, low)}
        del image
        if label is not None:
            parts["label"] = _resample_label(label, spacing)
            meta["label_values"] = np.unique(label.voxels).astype(int).tolist()
        _write_folder(folder, parts, meta, job["encoding"])
    meta = json.loads((folder / "meta.json").read_bytes())
    return {"volume": folder.name, "label_status": meta["label"]}


def _read(path: str) -> tuple[bytes, str]:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise VolumeError("missing", path, f"can't be opened: {error.strerror or error}") from None
    return content, hashlib.sha256(content).hexdigest()


def _label(job: dict[str, Any], content: bytes | None, image: Volume) -> tuple[Volume | None, str | None]:
    """The label map if it is usable and on the image's grid (in any orientation), or why not."""
    if content is None:
        return None, None
    try:
        label = nifti.read(job["label"], label=True, content=content)
    except VolumeError as error:
        return None, str(error)
    if not volume.same_grid(image, label):
        shapes = ["x".join(map(str, v.voxels.shape)) for v in (label, image)]
        message = f"label grid {shapes[0]} does not cover the image's {shapes[1]} in the same place"
        return None, str(VolumeError("label_grid", job["label"], message))
    # the image's own affine decides, so that both resample to the same voxels
    return label, None


def _resample_label(label: Volume, spacing: tuple[float, ...]) -> NumpyArray:
    voxels = volume.resample(label, spacing, label=True, dtype=np.uint16).voxels  # type: ignore[arg-type]
    return voxels.astype(np.uint8) if voxels.max(initial=0) < 256 else voxels


def _describe(image: Volume, hu: Volume, box: NumpyArray, low: float, digest: str) -> dict[str, Any]:
    """Geometry before and after, foreground and intensities, of a subsample of every third voxel per
    axis.
    """
    few = hu.voxels[::3, ::3, ::3]
    body = few[few > low]
    first, last, width = HISTOGRAM
    bins = np.clip((few.ravel().astype(np.int32) - first) // width, 0, (last - first) // width - 1)
    return {
        "shape": list(hu.voxels.shape),
        "spacing": hu.spacing,
        "affine": hu.affine.tolist(),
        "source_shape": list(image.voxels.shape),
        "source_spacing": [round(s, 6) for s in image.spacing],
        "source_orientation": "".join(nibabel.aff2axcodes(image.affine)),
        "tilted": volume.straight_axes(image.affine, image.voxels.shape) is None,
        "box": box.tolist(),
        "foreground": round(float(len(body) / few.size), 6),
        "hu": {
            "min": int(hu.voxels.min()),
            "max": int(hu.voxels.max()),
            "body_mean": round(float(body.mean()), 3) if len(body) else None,
            "body_std": round(float(body.std()), 3) if len(body) else None,
        },
        "histogram": np.bincount(bins, minlength=(last - first) // width).tolist(),
        "content": digest,
        "voxels": _digest(hu.voxels),
    }


def _digest(voxels: NumpyArray) -> str:
    digest = hashlib.sha256(f"{voxels.shape}".encode())
    digest.update(voxels)  # type: ignore[arg-type]
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ writing


def _write_folder(folder: Path, parts: dict[str, NumpyArray], meta: dict[str, Any], encoding: str) -> None:
    """Write all of a volume's files under a passing name, then rename the folder: it is there whole or not
    at all.
    """
    partial = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    try:
        partial.mkdir()
        for name, array in parts.items():
            arrays.write(partial / name, array, "npy" if name == "index" else encoding)
        with open(partial / "meta.json", "wb") as file:
            file.write(dump_json(meta))
            file.flush()
            os.fsync(file.fileno())
        try:
            partial.rename(folder)
        except OSError:
            if not (
                folder / "meta.json"
            ).is_file():  # else: the same content under the same id, done by another worker
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content as a whole."""
    partial = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def dump_json(content: Any) -> bytes:
    """Sorted, so that equal content is equal bytes."""
    return (json.dumps(content, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _plain(name: str) -> str:
    """A case id as part of a folder name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:80].lstrip(".") or "case"
