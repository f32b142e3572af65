"""Does pre-training help? Fine-tune from it and from scratch, seeds and label shares, and compare on held-out cases.

    python launch/compare.py --source=DatasetNNN --workdir=runs/compare [--jobs=2]

See --help; the work is in mambamim_jax/bench/starts.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.program import CONTINUE, run


def main(argv: list[str]) -> int:
    """The exit code, see ``mambamim_jax.bench.starts.main``."""
    from mambamim_jax.bench import starts

    return starts.main(argv)


if __name__ == "__main__":
    run(main, CONTINUE)
