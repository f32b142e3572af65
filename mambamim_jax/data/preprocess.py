"""Preprocess one case into its folder of a store: read, check, put on the RAS grid, index the foreground,
write at once.

A volume's folder holds:

    image       int16 (h, w, d), HU before any window; or float16 (h, w, d, c), z-scores of each channel
    label       uint8 or uint16 (h, w, d), if there is
    one index.npy   uint16, see ``crop.block_counts``           meta.json    geometry, box, statistics,
    digests

with image and label as ``.npy`` or ``.b2nd``, see ``arrays``.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from mambamim_jax.data import arrays, crop, nifti, organ_volumes, volume
from mambamim_jax.data.intensity import normalise
from mambamim_jax.data.volume import Volume, VolumeError
from mambamim_jax.types import NumpyArray

HISTOGRAM = (-1024, 2048, 64)
"""First edge, last edge and width in HU of the histogram kept per volume; the end bins take what lies
beyond.
"""
TEMPORARY = ".partial-"
RECIPE = 2
"""Raised with whatever changes in a prepared label map: those of a store made before are then made again."""


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do one case and return its record, which is also written to the store.

    Args:
        job: ``store`` (folder), ``record`` (file of the record), ``id``, ``source``, ``images``, ``label``
            (or None), ``earlier`` (the case's volume of an earlier recipe, where there is one); and
            ``spacing``, ``window``, ``encoding``, ``intensity`` and ``labels`` of ``store.prepare``.

    Raises:
        OSError: the store can't be written; nothing half-written is left.
    """
    record = {
        "id": job["id"],
        "source": job["source"],
        "image": job["images"][0],
        "label": job["label"],
        "recipe": RECIPE,
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
    normalised = job["intensity"] != "hu"
    if len(job["images"]) != 1 and not normalised:
        raise VolumeError("several_channels", job["images"][0], f"{len(job['images'])} channels, CT has one")
    read = [_read(path) for path in job["images"]]
    contents, digests = [content for content, _ in read], [digest for _, digest in read]
    del read  # so that a file's bytes go as soon as they are unpacked
    digest = digests[0] if len(digests) == 1 else _digest_of("".join(digests))
    label_content, label_digest = _read(job["label"]) if job["label"] else (None, "")
    made = f"{digest}{label_digest}{RECIPE}" if label_content is not None else digest
    key = _digest_of(made)[:16]
    folder = Path(job["store"]) / "volumes" / f"{_plain(job['id'])}-{key}"
    if not (folder / "meta.json").is_file():
        parts, meta = (_channels if normalised else _ct)(job, contents, label_content)
        earlier = folder.with_name(job["earlier"]) if job.get("earlier") else None
        _write_folder(folder, parts, meta | {"content": digest}, job["encoding"], earlier)
    meta = json.loads((folder / "meta.json").read_bytes())
    return {"volume": folder.name, "label_status": meta["label"]}


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


Parts = tuple[dict[str, NumpyArray], dict[str, Any]]


def _ct(job: dict[str, Any], contents: list[bytes], label_content: bytes | None) -> Parts:
    """One channel of HU, kept as it is: arrays to write, and what meta.json says."""
    low, spacing = job["window"][0], tuple(job["spacing"])
    image = nifti.read(job["images"][0], low=low, content=contents.pop())
    label, refusal = _label(job, label_content, image)
    hu = volume.resample(image, spacing, dtype=np.int16)
    box = volume.foreground_box(hu.voxels, low)
    if box is None:
        raise VolumeError("air_only", job["images"][0], f"nothing above {low:g} HU after resampling")
    meta = _describe(image, hu, box, low)
    parts = {"image": hu.voxels, "index": crop.block_counts(hu.voxels, low)}
    return _with_label(parts, meta, label, refusal, job)


def _channels(job: dict[str, Any], contents: list[bytes], label_content: bytes | None) -> Parts:
    """Channels without a scale of their own (MRI): z-scores of each over its non-zero voxels, float16 (h, w, d, c).

    Foreground is where any channel is not zero.
    """
    spacing = tuple(job["spacing"])
    images = [nifti.read(path, hu=False, content=c) for path, c in zip(job["images"], contents)]
    for image, path in zip(images, job["images"]):
        if not volume.same_grid(images[0], image):
            raise VolumeError("channel_grid", path, f"not on the grid of {Path(job['images'][0]).name}")
    label, refusal = _label(job, label_content, images[0])
    images = [volume.on_grid_of(image, images[0]) for image in images]
    resampled = [volume.resample(image, spacing, outside=0.0) for image in images]
    raw = np.stack([r.voxels for r in resampled], axis=-1)
    inside = (raw != 0).any(axis=-1).view(np.uint8)
    box = volume.foreground_box(inside, 0)
    if box is None:
        raise VolumeError("air_only", job["images"][0], "all voxels are 0")
    voxels = normalise(raw, [{"kind": "zscore"}] * raw.shape[-1]).astype(np.float16)
    parts = {"image": voxels, "index": crop.block_counts(inside, 0)}
    meta = _describe(images[0], resampled[0], box, 0.0) | {"voxels": _digest(voxels)}
    return _with_label(parts, meta, label, refusal, job)


def _with_label(
    parts: dict[str, NumpyArray],
    meta: dict[str, Any],
    label: Volume | None,
    refusal: str | None,
    job: dict[str, Any],
) -> Parts:
    meta |= {"label": refusal or ("ok" if label else "none")}
    if label is not None:
        parts |= {"label": _resample_label(label, tuple(job["spacing"]), job["labels"])}
        meta |= {"label_values": np.unique(label.labels()).tolist()}
    return parts, meta


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
    return volume.on_grid_of(label, image), None


def _resample_label(label: Volume, spacing: tuple[float, ...], how: str) -> NumpyArray:
    resampled = volume.resample(label, spacing, label=True, dtype=np.uint16)  # type: ignore[arg-type]
    if how == "volume":
        organ_volumes.keep_volumes(resampled, label)
    voxels = resampled.voxels
    return voxels.astype(np.uint8) if voxels.max(initial=0) < 256 else voxels


def _describe(image: Volume, hu: Volume, box: NumpyArray, low: float) -> dict[str, Any]:
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
        "voxels": _digest(hu.voxels),
    }


def _digest(voxels: NumpyArray) -> str:
    digest = hashlib.sha256(f"{voxels.shape}".encode())
    digest.update(voxels)  # type: ignore[arg-type]
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ writing


def _write_folder(
    folder: Path, parts: dict[str, NumpyArray], meta: dict[str, Any], encoding: str, earlier: Path | None
) -> None:
    """Write all of a volume's files under a passing name, then rename the folder: it is there whole or not
    at all.

    A file that ``earlier``, another folder of the same store, holds with equal bytes takes no room of its own.
    """
    partial = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    try:
        partial.mkdir()
        for name, array in parts.items():
            arrays.write(partial / name, array, "npy" if name == "index" else encoding)
        if earlier:
            _share(partial, earlier)
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


def _share(partial: Path, earlier: Path) -> None:
    """Put a link in the place of each file that another folder holds with equal bytes, where there can be one."""
    for file in [*partial.iterdir()]:
        link, other = file.with_name(f"{TEMPORARY}link"), earlier / file.name
        try:
            if filecmp.cmp(file, other, shallow=False):
                link.hardlink_to(other)
                link.replace(file)
        except OSError:
            continue


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's content as a whole."""
    partial = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def dump_json(content: Any) -> bytes:
    """Sorted, so that equal content is equal bytes; a file name's bytes that are not UTF-8 as JSON's own escapes."""
    return (json.dumps(content, sort_keys=True, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _plain(name: str) -> str:
    """A case id as part of a folder name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:80].lstrip(".") or "case"
