"""Signals that end a run early, and the exit code that asks for it to be started again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
TRY_AGAIN = 75
"""Exit code of a run that has saved and wants to be continued (EX_TEMPFAIL); the batch files requeue on it."""
TICK = 0.5
"""Seconds between two looks at what has been caught."""
PREEMPTIONS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""


def exit_code(number: int) -> int:
    """Of a run that a signal ended: 75 where a scheduler wants the machine back, else 128 + the signal."""
    return TRY_AGAIN if number in PREEMPTIONS else 128 + number if number else 0


def end_at_once() -> None:
    """A scheduler's signal ends the process with ``TRY_AGAIN``, as long as nothing is there to be saved."""
    for number in PREEMPTIONS:
        signal.signal(number, lambda *_: os._exit(TRY_AGAIN))


class Stopped(Exception):
    """Work is given up for the signal of this number."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


def interruptible(wait: Callable[[], T], meanwhile: Callable[[], object] | None = None) -> T:
    """wait(), in a thread of its own; ``meanwhile`` is called every half second until that returns.

    Python acts on a signal in the main thread alone, and there not before a call into a library has returned: one that
    waits for other processes would leave a scheduler's signal lying for minutes.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(wait())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while meanwhile and not wait_for([outcome], TICK).done:
        meanwhile()
    return outcome.result()


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGUSR1 fill the list, so that the loop can save and end; a second one acts as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, *PREEMPTIONS)}

    def handle(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, usual[signal.Signals(number)])

    for number in usual:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, before in usual.items():
            signal.signal(number, before)
