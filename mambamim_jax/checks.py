"""Settings that cannot be used: one line that names the key, what was found, what was expected and what to do."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from typing import NoReturn

MOST_OVERLAP = 0.9
"""Share of a window that the next one may cover again: each voxel is then computed a thousand times."""


class ConfigError(ValueError):
    """A setting that cannot be used. ``exit_code`` is what the launch scripts end with."""

    exit_code = 2

    def __init__(self, key: str, found: str, expected: str, advice: str = ""):
        super().__init__(f"{key}: {found}; expected {expected}" + (f"; {advice}" if advice else ""))


def require(ok: bool, key: str, found: object, expected: str, advice: str = "") -> None:
    """Raises ConfigError unless ``ok``; ``key`` is what stands behind ``config.``."""
    if not ok:
        raise ConfigError(f"config.{key}", f"found {found!r}", expected, advice)


def one_of(key: str, found: str, choices: Sequence[str]) -> None:
    """Raises ConfigError unless ``found`` is one of ``choices``."""
    require(found in choices, key, found, "one of " + ", ".join(choices), did_you_mean(found, choices))


def hu_window(key: str, found: tuple[float, float]) -> None:
    """Raises ConfigError unless ``found`` is (low, high), and voxels, which are int16, can have both values."""
    low, high = found
    expected = "(low, high) in HU, low < high, both from -32768 to 32767"
    require(-(2**15) <= low < high < 2**15, key, found, expected)


def did_you_mean(found: str, choices: Sequence[str]) -> str:
    """A hint at the choice nearest to what was found, or nothing."""
    close = difflib.get_close_matches(found, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


def whole(least: int) -> Callable[[str], int]:
    """The type of a command line's option that takes a whole number, at least ``least``."""

    def parse(text: str) -> int:
        try:
            found = int(text)
        except ValueError:
            found = least - 1
        if found < least:
            raise argparse.ArgumentTypeError(f"found {text}, expected a whole number, at least {least}")
        return found

    return parse


def whole_numbers(least: int, count: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """The type of an option that takes whole numbers separated by commas, as many as ``count`` where that is given."""
    one = whole(least)

    def parse(text: str) -> tuple[int, ...]:
        found = tuple(one(item) for item in text.split(","))
        if count is not None and len(found) != count:
            raise argparse.ArgumentTypeError(
                f"found {text}, expected {count} whole numbers separated by commas"
            )
        return found

    return parse


def overlap(text: str) -> float:
    """The type of an option that takes the share of a window that the next one covers again."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= MOST_OVERLAP:
        raise argparse.ArgumentTypeError(f"found {text}, expected a share from 0 to {MOST_OVERLAP}")
    return found


class LineParser(argparse.ArgumentParser):
    """A command line whose errors are one line, too; the exit code is 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")
