"""Plain text tables for benchmarks, and the line that says where they were measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, so that it can go into a document as it is."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}\n{environment()}\n")
    for line in [header, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(str(cell).ljust(width) for cell, width in zip(line, widths)) + " |")
    print(flush=True)


def environment() -> str:
    """Processor, cores and the versions of the libraries, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = []
    for name in ("jax", "flax", "torch"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{_processor()}, {cores} cores; Python {platform.python_version()}, {', '.join(versions)}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
            return named[0] if named else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()
