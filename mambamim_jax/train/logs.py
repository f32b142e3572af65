"""What a run leaves on disk besides checkpoints: metrics.jsonl, validation.jsonl and TensorBoard events.

A run never ends for want of space for them: what finds no room waits in memory until there is some.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import jax
from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory

from mambamim_jax import visualise
from mambamim_jax.train.workdir import unwritable
from mambamim_jax.types import NumpyArray

METRICS = "metrics.jsonl"
EVENTS = "whole"
"""Stands before the path of TensorBoard's folder where ``EventFiles`` open its files."""
Failed: TypeAlias = Callable[[Path, OSError], None]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order of their steps; a line cut short by a kill, or no row, is left out."""
    return _rows(path.read_bytes()) if path.exists() else []


def _rows(lines: bytes) -> list[dict[str, Any]]:
    rows = []
    for line in lines.splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and is_number(row.get("step")) and row["step"] % 1 == 0:
                rows.append({**row, "step": int(row["step"])})
    return sorted(rows, key=lambda row: row["step"])


def complete(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of a metrics.jsonl that have what the end of a run reads of them."""
    return [row for row in rows if all(is_number(row.get(name)) for name in ("loss", "lr", "seconds"))]


def is_number(value: object) -> bool:
    """Whether what JSON gave is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class LogFile:
    """A file that grows by whole pieces. One that finds no room waits for the next, or for ``sync``.

    Args:
      path: the file; made if missing. failed: told of each time that it could not be written.

    Raises: OSError where it cannot be opened.
    """

    def __init__(self, path: Path, failed: Failed):
        self.path, self.failed, self.waiting = path, failed, b""
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def add(self, piece: bytes) -> None:
        """Writes what waits and the piece, all of it or nothing."""
        self.waiting += piece
        end = os.fstat(self.file).st_size
        try:
            left = memoryview(self.waiting)
            while left:  # on a full disk a part may be written before the error
                left = left[os.write(self.file, left) :]
            self.waiting = b""
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.file, end)
            self.failed(self.path, error)

    def sync(self) -> None:
        """What there is room for is on disk when this returns."""
        self.add(b"")
        try:
            os.fsync(self.file)
        except OSError as error:
            self.failed(self.path, error)

    def close(self) -> None:
        """Ends the file."""
        self.add(b"")
        os.close(self.file)


class RowFile(LogFile):
    """A file of one JSON line per row, appended to as a run goes.

    Args:
      path: the file; made if missing.
      step: updates done so far; what was written beyond, by a process that was killed after its last save, is
        taken out.
      failed: see ``LogFile``.
    """

    def __init__(self, path: Path, step: int, failed: Failed):
        aside = path.with_suffix(".jsonl.part")
        try:
            aside.write_text("".join(f"{json.dumps(r)}\n" for r in read_rows(path) if r["step"] <= step))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        super().__init__(path, failed)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row."""
        self.add(f"{json.dumps(dict(row))}\n".encode())

    def rows(self) -> list[dict[str, Any]]:
        """All rows, also those that wait."""
        return read_rows(self.path) + _rows(self.waiting)


class EventFiles:
    """Opens TensorBoard's files, as tensorboardX wants it: its own ones end its thread where the disk is full.

    Args: failed: see ``LogFile``.
    """

    def __init__(self, failed: Failed):
        self.failed = failed

    def directory_check(self, folder: str) -> None:
        """Makes the folder."""
        _real(folder).mkdir(parents=True, exist_ok=True)

    def open(self, path: str) -> _Events:
        """A file to be written to."""
        return _Events(LogFile(_real(path), self.failed))


class _Events:
    """Writes whole records alone: tensorboardX passes the parts of one before it flushes."""

    def __init__(self, file: LogFile):
        self.file, self.parts = file, bytearray()

    def write(self, part: bytes) -> None:
        self.parts += part

    def flush(self) -> None:
        self.file.add(bytes(self.parts))
        self.parts.clear()
        self.file.sync()

    def close(self) -> None:
        self.file.close()


def _real(path: str) -> Path:
    return Path(path.removeprefix(f"{EVENTS}:"))


class RunLog:
    """Rows of every step in WORKDIR/metrics.jsonl and of validations in validation.jsonl; TensorBoard; pictures.

    Args:
      workdir: the run's folder.
      step: updates done so far, see ``RowFile``.
      validated: whether there is validation.
      say: prints a line that a person must see.

    Raises: OSError where the files cannot be opened.
    """

    def __init__(self, workdir: Path, step: int, validated: bool = False, say: Callable[[str], None] = print):
        self.say, self.warned = say, False
        self.steps = RowFile(workdir / METRICS, step, self.failed)
        self.validation = RowFile(workdir / "validation.jsonl", step, self.failed) if validated else None
        register_writer_factory(EVENTS, EventFiles(self.failed))
        board = f"{EVENTS}:{workdir / 'tensorboard'}"
        self.board = SummaryWriter(board, purge_step=step + 1)

    def failed(self, path: Path, error: OSError) -> None:
        """Says, once a run, that something cannot be written."""
        if not self.warned:
            self.warned = True
            self.say(f"WARNING: {path} cannot be written ({error.strerror or error}); the run goes on")

    def row(self, row: Mapping[str, Any]) -> None:
        """Appends a step's metrics."""
        self.steps.append(row)

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of all steps."""
        return self.steps.rows()

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

    def png(self, image: NumpyArray, path: Path) -> None:
        """A picture (rows, columns, 3) uint8 as a file."""
        try:
            visualise.write_png(image, path)
        except OSError as error:
            self.failed(path, error)

    def sync(self) -> None:
        """Everything logged so far is on disk when this returns, if there is room."""
        for rows in self._files():
            rows.sync()
        self.board.flush()

    def close(self) -> None:
        """Ends the files; says which rows found no room."""
        for rows in self._files():
            rows.close()
            if missing := rows.waiting.count(b"\n"):
                self.say(
                    f"WARNING: {rows.path}: the last {missing} rows are missing, there was no room for them"
                )
        self.board.close()

    def _files(self) -> list[RowFile]:
        return [self.steps, *([self.validation] if self.validation else [])]


def open_log(workdir: Path, step: int, validated: bool, say: Callable[[str], None]) -> RunLog | SilentLog:
    """The log of this process: the first one writes. See ``RunLog`` for what is given.

    Raises: ConfigError where the workdir cannot be written to.
    """
    if jax.process_index():
        return SilentLog(workdir)
    try:
        return RunLog(workdir, step, validated, say)
    except OSError as error:
        raise unwritable(workdir, error) from error


class SilentLog:
    """In place of a ``RunLog`` where another process writes; ``rows`` are those that it has written."""

    validation = None

    def __init__(self, workdir: Path):
        self.path = workdir / METRICS

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.path)

    def row(self, row: Mapping[str, Any]) -> None: ...
    def scalars(self, row: Mapping[str, Any]) -> None: ...
    def picture(self, name: str, image: NumpyArray, step: int) -> None: ...
    def png(self, image: NumpyArray, path: Path) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...
