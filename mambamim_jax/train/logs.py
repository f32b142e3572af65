"""What a run leaves on disk besides checkpoints: metrics.jsonl, and TensorBoard events."""

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


class RunLog:
    """Appends one line per step to WORKDIR/metrics.jsonl, and writes scalars and pictures for TensorBoard.

    Args:
      workdir: the run's folder.
      step: updates done so far; what was logged beyond, by a process that was killed after its last save, is
        taken out.
    """

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / "metrics.jsonl"
        rows = read_rows(self.path)
        kept = [row for row in rows if row["step"] <= step]
        aside = self.path.with_suffix(".jsonl.part")
        aside.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
        os.replace(aside, self.path)
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def row(self, row: Mapping[str, Any]) -> None:
        """Appends a step's metrics, in one write."""
        os.write(self.file, f"{json.dumps(dict(row))}\n".encode())

    def scalars(self, row: Mapping[str, Any]) -> None:
        """The same for TensorBoard."""
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, row["step"])

    def picture(self, name: str, image: NumpyArray, step: int) -> None:
        """A picture (rows, columns, 3) uint8 for TensorBoard."""
        self.board.add_image(name, image, step, dataformats="HWC")

    def sync(self) -> None:
        """Everything logged so far is on disk when this returns."""
        os.fsync(self.file)
        self.board.flush()

    def close(self) -> None:
        """Ends the files."""
        os.close(self.file)
        self.board.close()
