"""The folder of a run, or of predictions, which one run at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax

from mambamim_jax.checks import ConfigError
from mambamim_jax.train.processes import first_alone

LOCK = ".lock"
PATIENCE = 150.0
"""Seconds to wait for a run of another host: a file server gives up the locks of one that is gone after 90 or so."""


@contextmanager
def claimed(
    workdir: Path, say: Callable[[str], None], patience: float = PATIENCE, option: str = "--workdir"
) -> Iterator[None]:
    """Meanwhile no other run writes to the folder, which is made if need be; ``option`` is what named it.

    The lock ends with the process, however that ends. Of several processes the first one holds it.

    Raises: ConfigError if the folder can't be written, or another run has it.
    """
    file = first_alone(
        "workdir", lambda: _claim(workdir, say, patience, option) if jax.process_index() == 0 else None
    )
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _claim(workdir: Path, say: Callable[[str], None], patience: float, option: str) -> IO[str]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise unwritable(workdir, error, option) from error
    end = None
    while not _locked(file, say):
        holder = _holder(file)
        if end is None:
            end = time.monotonic() + (0 if _is_alive_here(holder) else patience)
            if end > time.monotonic():
                say(f"Waiting for {_name(holder)} to leave {workdir}, {patience:.0f} s at most")
        if time.monotonic() >= end:
            file.close()
            found = f"{workdir} is in use by {_name(holder)}"
            advice = "end that run first, or name another folder"
            raise ConfigError(option, found, "a folder with one run at a time", advice)
        time.sleep(min(1.0, max(end - time.monotonic(), 0.0)))
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    except OSError as error:
        file.close()
        raise unwritable(workdir, error, option) from error
    return file


def unwritable(folder: Path, error: OSError, option: str = "--workdir") -> ConfigError:
    """The error of a folder that a run cannot write to; ``option`` is what named it."""
    found = f"{folder} can't be written ({error.strerror})"
    return ConfigError(option, found, "a folder you may write to, on a disk with room")


def _locked(file: IO[str], say: Callable[[str], None]) -> bool:
    """Takes the lock, which unlike flock's a forked child does not keep; whether that went, or there are no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        say(
            f"{file.name}: the file system has no locks ({error.strerror}); see that no other run uses this folder"
        )
    return True


def _holder(file: IO[str]) -> dict[str, Any]:
    """Host and process number that the lock's holder has written, nothing where it has not yet."""
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive_here(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)  # sends nothing
    except PermissionError:
        return True
    except (OSError, KeyError, TypeError):
        return False
    return True


def _name(holder: dict[str, Any]) -> str:
    return "process {pid} on {host}".format(**holder) if {"pid", "host"} <= holder.keys() else "another run"
