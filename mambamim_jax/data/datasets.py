"""Find the cases of a data set: nnU-Net raw folder, Decathlon JSON, or any folder of NIfTI files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mambamim_jax.paths import home

FORMATS = ("auto", "nnunet", "decathlon", "folder")
ENDINGS = (".nii.gz", ".nii")
LABEL_MARKS = ("_label", "_labels", "_seg")
"""In a plain folder ``x_label.nii.gz`` beside ``x.nii.gz`` is its label map."""


REPAIRED = "lost+found"
"""A folder of the file system's own, for its administrator alone."""


class DatasetError(ValueError):
    """A data set that can't be found or understood; the message is one line."""

    exit_code = 2


@dataclass(frozen=True)
class Case:
    """One scan: its channels' files (one, for CT), its label map if any, and the source it was found in.

    The id is ``printable``.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    source: str


def discover(source: str | Path, format: str = "auto") -> list[Case]:
    """List the training cases of a source, sorted by id.

    Args:
        source: an nnU-Net raw folder (``dataset.json``, ``imagesTr``), a Decathlon ``.json`` (or the folder
            of one), or a folder searched for ``.nii``/``.nii.gz`` at any depth, links to folders followed.
        format: one of ``FORMATS``; ``auto`` looks at what is there.

    Raises:
        DatasetError: nothing there, nothing usable, or no telling what it is.
    """
    source = home(source)
    if format not in FORMATS:
        raise DatasetError(f"format {format!r}, expected one of {', '.join(FORMATS)}")
    if not source.exists():
        raise DatasetError(f"{source}: no such file or folder; give a data set's folder or its .json")
    kind = _recognise(source) if format == "auto" else format
    cases = {"nnunet": _nnunet, "decathlon": _decathlon, "folder": _folder}[kind](source)
    if not cases and (source / "store.json").is_file():
        raise DatasetError(
            f"{source}: is a store, expected a data set; name a store alone, or preprocess all data sets into one"
        )
    if not cases:
        raise DatasetError(f"{source}: no .nii or .nii.gz images found ({kind} layout)")
    cases = [replace(case, id=printable(case.id)) for case in cases]
    name, count = Counter(case.id for case in cases).most_common(1)[0]
    if count > 1:
        raise DatasetError(f"{source}: case {name!r} appears {count} times; ids must be unique")
    return sorted(cases, key=lambda case: case.id)


def printable(name: str) -> str:
    """The name of a file with the bytes of it that are not UTF-8 written as ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def discover_all(sources: Sequence[str | Path], format: str = "auto") -> list[Case]:
    """The cases of several sources, one source after the other.

    Raises:
        DatasetError: as ``discover``, and where an image is in two of them.
    """
    cases: list[Case] = []
    holder: dict[str, int] = {}
    for n, source in enumerate(sources):
        found = discover(source, format)
        for image in (image for case in found for image in case.images):
            other = holder.setdefault(os.path.realpath(image), n)
            if other != n:
                raise DatasetError(
                    f"{image}: in two sources, {sources[other]} and {source}; name each data set once"
                )
        cases += found
    return cases


def _recognise(source: Path) -> str:
    if source.is_file():
        if source.suffix == ".json":
            return "decathlon"
        raise DatasetError(f"{source}: is a file; expected a folder or a Decathlon .json")
    description = source / "dataset.json"
    if description.is_file():
        content = read_json(description)
        if isinstance(content.get("training"), list) and content["training"]:
            return "decathlon"
        if (source / "imagesTr").is_dir():
            return "nnunet"
        raise DatasetError(
            f"{source}: dataset.json but neither an imagesTr folder nor a list 'training' in it"
        )
    nested = sorted(child.parent.name for child in source.glob("*/dataset.json"))
    if nested:
        raise DatasetError(
            f"{source}: holds several data sets ({', '.join(nested[:3])}, …); name one of them"
        )
    return "folder"


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises: DatasetError if there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DatasetError(f"{path}: not readable as JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _stem(name: str, endings: Iterable[str] = ENDINGS) -> str:
    for ending in endings:
        if name.endswith(ending):
            return name[: -len(ending)]
    return name


def _nnunet(source: Path) -> list[Case]:
    """``imagesTr/ID_0000.nii.gz`` (further channels _0001 …) and ``labelsTr/ID.nii.gz``."""
    description = read_json(source / "dataset.json")
    ending = description.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        raise DatasetError(
            f"{source / 'dataset.json'}: file_ending {ending!r}, expected {' or '.join(ENDINGS)}"
        )
    folder = source / "imagesTr"
    if not folder.is_dir():
        raise DatasetError(f"{source}: no imagesTr folder, which an nnU-Net raw data set has")
    channels: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        found = re.fullmatch(r"(.+)_(\d{4})" + re.escape(ending), path.name)
        if found and not path.name.startswith("."):
            channels.setdefault(found[1], []).append(path)
    if not channels:
        raise DatasetError(
            f"{folder}: no images named CASE_0000{ending}; file_ending in {source / 'dataset.json'} "
            f"{'is' if 'file_ending' in description else 'left out means'} {ending!r}"
        )
    cases = []
    for name, images in channels.items():
        label = source / "labelsTr" / f"{name}{ending}"
        cases.append(Case(name, tuple(images), label if label.is_file() else None, str(source)))
    return cases


def _decathlon(source: Path) -> list[Case]:
    """``"training"``: objects with ``image`` and ``label``, or plain strings; paths relative to the JSON."""
    description = source / "dataset.json" if source.is_dir() else source
    entries = read_json(description).get("training")
    if not isinstance(entries, list):
        raise DatasetError(f"{description}: no list 'training', which a Decathlon JSON has")
    cases = []
    for n, entry in enumerate(entries):
        image: Any
        label: Any
        image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (entry, None)
        images = image if isinstance(image, list) else [image]
        if not images or not all(isinstance(i, str) for i in images) or not isinstance(label, str | None):
            raise DatasetError(
                f"{description}: training[{n}] is {entry!r}, expected {{'image': path, 'label': path}}"
            )
        paths = tuple(description.parent / i for i in images)
        cases.append(
            Case(_stem(paths[0].name), paths, description.parent / label if label else None, str(source))
        )
    repeated = {name for name, count in Counter(case.id for case in cases).items() if count > 1}
    # ids of like-named files in different folders take their folder's name along
    return [
        Case(f"{c.images[0].parent.name}_{c.id}", c.images, c.label, c.source) if c.id in repeated else c
        for c in cases
    ]


def _folder(source: Path) -> list[Case]:
    """Every NIfTI below a folder; ``x_label`` beside ``x`` is a label; TotalSegmentator's ``segmentations``
    are not CTs.
    """
    if source.is_file():
        raise DatasetError(f"{source}: is a file, expected a folder of .nii or .nii.gz")
    stems: dict[str, Path] = {}
    for path in sorted(path.relative_to(source) for path in _below(source)):
        stem = path.with_name(_stem(path.name)).as_posix()
        if stem in stems:
            raise DatasetError(f"{source}: both {stems[stem]} and {path}; keep one of them")
        if "segmentations" not in path.parts[:-1]:
            stems[stem] = path
    labels = {stem + mark: stem for stem in stems for mark in LABEL_MARKS if stem + mark in stems}
    label_of: dict[str, Path] = {}
    for marked, stem in labels.items():
        if label_of.setdefault(stem, stems[marked]) != stems[marked]:
            both = f"both {label_of[stem]} and {stems[marked]} are labels of {stems[stem]}"
            raise DatasetError(f"{source}: {both}; keep one of them")
    return [
        Case(
            stem.replace("/", "_"),
            (source / path,),
            source / label_of[stem] if stem in label_of else None,
            str(source),
        )
        for stem, path in stems.items()
        if stem not in labels
    ]


def _below(source: Path) -> Iterator[Path]:
    """NIfTI files at any depth, but for hidden ones. A folder is entered once, by a link only if not otherwise."""
    folders, links, entered = [source], list[Path](), set[str]()
    while folders or links:
        folder = (folders or links).pop()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            raise DatasetError(f"{folder}: can't be read ({error.strerror})") from None
        for entry in (
            entry for entry in entries if not entry.name.startswith(".") and entry.name != REPAIRED
        ):
            path = folder / entry.name
            if path.is_dir() if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif entry.name.endswith(ENDINGS) and path.is_file():
                yield path
