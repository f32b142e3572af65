"""Benchmarks: python launch/bench.py {step,toki,scan,mixer,loader,preprocess,predict,scaling,saving,space} [options].

NAME --help lists the options.

Every figure is a ratio of things run alternately in one run, said with hardware and versions.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.program import run

NAMES = ("step", "toki", "scan", "mixer", "loader", "preprocess", "predict", "scaling", "saving", "space")


def main(argv: list[str]) -> int:
    """Runs the benchmark that the first argument names."""
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    if not argv or argv[0] not in NAMES:
        found = argv[0] if argv else "nothing"
        print(f"bench.py: found {found}, expected one of {', '.join(NAMES)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"mambamim_jax.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    run(main)
