"""Which classes are scored, and what their names are: from a data set's or a run's own table of labels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambamim_jax.data.labels import label_values
from mambamim_jax.evaluate.inputs import InputError


@dataclass(frozen=True)
class Table:
    """Classes to score.

    Attributes:
      classes: name → the label values that belong to it; regions such as BraTS's overlap.
      known: every value that a label map may hold.
      ignored: value of voxels that are not scored at all, or None.
      source: the file that says so, or "the labels themselves".
    """

    classes: dict[str, tuple[int, ...]]
    known: frozenset[int]
    ignored: int | None
    source: str


def read_table(path: Path) -> Table:
    """The table in nnU-Net's or Decathlon's ``dataset.json``, ``predictions.json`` or a model's ``config.json``.

    ``labels`` is {"0": name …} or {name: value or list of values}; ``regions`` a list of {"name", "labels"}, or null.

    Raises: InputError if there is none or it makes no sense.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = content["labels"]
        classes = {str(name): label_values(value) for name, value in _by_name(labels).items()}
        regions = {r["name"]: label_values(r["labels"]) for r in content.get("regions") or []}
        if len(classes.get("ignore", (0,))) != 1:
            raise ValueError(f"ignore {labels['ignore']!r}, expected one value")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = 'expected "labels": {"background": 0, "liver": 1, …}'
        raise InputError(
            f"{path}: no table of labels that can be used ({type(error).__name__} {error}); {expected}"
        ) from None
    known = frozenset(value for values in classes.values() for value in values)
    ignored = classes.pop("ignore", (None,))[0]
    scored = {name: values for name, values in (regions or classes).items() if values != (0,)}
    if not scored:
        raise InputError(f"{path}: the table of labels holds nothing but background")
    return Table(scored, known, ignored, str(path))


def table_of_values(values: Iterable[int]) -> Table:
    """A table for label maps that come without one: every value is a class."""
    known = frozenset(values) | {0}
    return Table({f"label {v}": (v,) for v in sorted(known - {0})}, known, None, "the labels themselves")


def find_table(labels: Path, predictions: Path) -> Table | None:
    """The table beside the labels (``dataset.json``), or the one the predictions were made with."""
    for path in (labels / "dataset.json", labels.parent / "dataset.json", predictions / "predictions.json"):
        if path.is_file():
            return read_table(path)
    return None


def _by_name(labels: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value}, from that or from {"value": name}."""
    if all(str(key).isdigit() for key in labels):
        return {name: int(value) for value, name in labels.items()}
    return dict(labels)
