"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mambamim_jax.data.store import Progress as Counter

QUIET_SECONDS = 10.0
Show: TypeAlias = Callable[[int, str], None]


class Terminal:
    """Prints to standard output, above the bar where there is one.

    Args:
      console: where to; tests pass their own.
      quiet: says nothing, as all processes of a run but the first.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False):
        options: dict[str, bool] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}
        self.console = console or Console(**options, quiet=quiet)  # type: ignore[arg-type]

    def say(self, line: str) -> None:
        """Prints a line that a person must see."""
        self.console.print(line)

    @contextmanager
    def counting(self, title: str) -> Iterator[Counter]:
        """A bar, or a line every ten seconds, for work on many things: (done, total, name) → None."""
        with self._bar("{task.fields[note]}") as bar:
            line = bar.add_task(title, total=None, note="")
            quiet = _Quiet()

            def count(done: int, total: int, name: str) -> None:
                bar.update(line, completed=done, total=total, note=name)
                if not self.console.is_terminal and quiet.over():
                    self.say(f"{title}: {done}/{total}")

            yield count

    @contextmanager
    def training(
        self, title: str, start: int, steps: int, every: int
    ) -> Iterator[Callable[[int, str], None]]:
        """A bar with time left, or a line every ``every`` steps, for training: (step, note) → None."""
        with self._bar("{task.fields[note]}") as bar:
            line = bar.add_task(title, total=steps, completed=start, note="compiling")
            began, done = time.monotonic(), start

            def update(step: int, note: str) -> None:
                nonlocal began, done
                bar.update(line, completed=step, note=note)
                left = (time.monotonic() - began) / max(step - done, 1) * (steps - step)
                if done == start:  # the first step also compiled: counted from here
                    began, done = time.monotonic(), step
                if not self.console.is_terminal and (step % every == 0 or step == steps):
                    self.say(f"step {step}/{steps}  {note}  {duration(left)} left")

            yield update

    def _bar(self, note: str) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = not self.console.is_terminal
        return Progress(*columns, TextColumn(note), console=self.console, disable=hidden, transient=True)


class _Quiet:
    """Tells whether ten seconds have passed since it last said so."""

    def __init__(self) -> None:
        self.since = time.monotonic()

    def over(self) -> bool:
        now = time.monotonic()
        if now - self.since < QUIET_SECONDS:
            return False
        self.since = now
        return True


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
