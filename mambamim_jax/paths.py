"""Paths as a person writes them."""

from __future__ import annotations

from pathlib import Path


class PathError(RuntimeError):
    """A path that cannot be meant. ``program.run`` prints the one line and ends with ``exit_code``."""

    exit_code = 2


def home(path: str | Path) -> Path:
    """The path with a leading ~ or ~USER replaced by that user's folder.

    Raises: PathError where there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise PathError(f"{path}: no home folder for {user} here; write the whole path") from None
