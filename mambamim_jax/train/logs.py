"""What a run leaves on disk besides checkpoints: metrics.jsonl, validation.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from mambamim_jax.types import NumpyArray


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order of their steps; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


METRICS = "metrics.jsonl"


class RowFile:
    """A file of one JSON line per row, appended to as a run goes.

    Args:
      path: the file; made if missing.
      step: updates done so far; what was written beyond, by a process that was killed after its last save, is
        taken out.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.kept = [row for row in read_rows(path) if row["step"] <= step]
        aside = path.with_suffix(".jsonl.part")
        aside.write_text("".join(f"{json.dumps(row)}\n" for row in self.kept))
        os.replace(aside, path)
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row, in one write."""
        os.write(self.file, f"{json.dumps(dict(row))}\n".encode())


class RunLog:
    """Rows of every step in WORKDIR/metrics.jsonl and of validations in validation.jsonl; TensorBoard.

    Args:
      workdir: the run's folder.
      step: updates done so far, see ``RowFile``.
      validated: whether there is validation.
    """

    def __init__(self, workdir: Path, step: int, validated: bool = False):
        self.path = workdir / METRICS
        self.steps = RowFile(self.path, step)
        self.validation = RowFile(workdir / "validation.jsonl", step) if validated else None
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def row(self, row: Mapping[str, Any]) -> None:
        """Appends a step's metrics."""
        self.steps.append(row)

    def scalars(self, row: Mapping[str, Any], prefix: str = "") -> None:
        """The numbers of a row for TensorBoard; those of a mapping in it below the mapping's name."""
        for name, value in row.items():
            if isinstance(value, Mapping):
                self.scalars({"step": row["step"], **value}, f"{prefix}{name}/")
            elif name != "step" and isinstance(value, (int, float)):
                self.board.add_scalar(f"{prefix}{name}", value, row["step"])

    def picture(self, name: str, image: NumpyArray, step: int) -> None:
        """A picture (rows, columns, 3) uint8 for TensorBoard."""
        self.board.add_image(name, image, step, dataformats="HWC")

    def sync(self) -> None:
        """Everything logged so far is on disk when this returns."""
        for rows in self._files():
            os.fsync(rows.file)
        self.board.flush()

    def close(self) -> None:
        """Ends the files."""
        for rows in self._files():
            os.close(rows.file)
        self.board.close()

    def _files(self) -> list[RowFile]:
        return [self.steps, *([self.validation] if self.validation else [])]


class SilentLog:
    """In place of a ``RunLog`` where another process writes."""

    validation = None

    def row(self, row: Mapping[str, Any]) -> None: ...
    def scalars(self, row: Mapping[str, Any]) -> None: ...
    def picture(self, name: str, image: NumpyArray, step: int) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...
