"""What all launch scripts do the same way: output that cannot be printed, Ctrl-C, a package that is missing.

Imports little but Python's own, so that all of it holds while the rest is imported.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from mambamim_jax.paths import PathError

GONE = (errno.EPIPE, errno.EIO)
"""Errors of a pipe that nobody reads any more, and of a terminal that has been closed."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk without room."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as a shell has it."""
CONTINUE = "run the same command again to continue"
START_OVER = "run the same command again to start over"


def run(main: Callable[[list[str]], int], again: str = START_OVER) -> NoReturn:
    """Ends the process with the exit code of main(arguments).

    Characters that the output's encoding lacks are printed as "?". Where the reader of the output goes away
    (``| head``) or its disk is full, the work goes on without printing and keeps its exit code. Ctrl-C is one line and
    exit code 130, a package that is missing or a ``PathError`` one line and exit code 2: main imports what is not
    Python's own.

    Args:
      main: arguments → exit code. again: what to do after Ctrl-C.
    """
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    sys.unraisablehook = _interrupt_again
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        line, code = f"interrupted; {again}", INTERRUPTED
    except PathError as error:
        line, code = f"error: {error}", error.exit_code
    except ModuleNotFoundError as error:
        name = error.name or ""
        if "." in name or name in ("", "mambamim_jax"):
            raise
        line, code = f"error: no module named {name}; install what pyproject.toml lists: pip install -e .", 2
    _leave(line, code)  # here, where nothing is held any more by the error


def _interrupt_again(lost: Any) -> None:
    """Repeats a Ctrl-C that came while Python ran what cannot fail, such as JAX's part of a garbage collection."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
        return
    later = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    later.daemon = True
    later.start()


def _leave(line: str, code: int) -> NoReturn:
    """Ends with a line on the error output, and without waiting for what other processes and threads do."""
    for child in multiprocessing.active_children():
        child.kill()
    print(line, file=sys.stderr)
    if "jax" not in sys.modules:
        sys.exit(code)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    os._exit(code)  # Python's own way of ending crashes where a thread of XLA's still compiles


def _lasting(stream: Any) -> Any:
    """Standard output or error output that outlives its reader and takes any character."""
    if not isinstance(stream, io.TextIOWrapper):  # there is none
        return stream
    stream.flush()
    raw = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors="replace" if stream.errors in ("strict", "surrogateescape") else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Output(io.FileIO):
    """A file of the system that takes everything, also when nobody reads it any more or its disk is full."""

    said = False

    def write(self, data: Any) -> int:
        """As ``io.FileIO``; what finds no room is lost. Of standard output the error output says either, once."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in FULL:
                if self.fileno() == 1 and not self.said:
                    self.said = True
                    print("no room for the output; going on, some of its lines are lost", file=sys.stderr)
                return memoryview(data).nbytes
            if error.errno not in GONE:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        if self.fileno() == 1 and bytes(data).strip():  # else the end of a line that has been read
            print("nobody reads the output any more; going on without it", file=sys.stderr)
        return super().write(data)
