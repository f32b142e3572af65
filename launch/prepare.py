"""A benchmark's download → nnU-Net's raw format, which fine-tuning reads.

    python launch/prepare.py NAME --source=DOWNLOAD --output=FOLDER [--copy]

NAME: amos22, brats21, btcv, ct_org, kits23, msd_hepatic_vessel, msd_lung, msd_pancreas, msd_spleen. Files are
linked unless --copy is given. docs/FINETUNE.md says what each download looks like and which cases are held out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.checks import LineParser
from mambamim_jax.program import run


def main(argv: list[str] | None = None) -> int:
    """Prepares one benchmark; 0, or 2 with one line on what is wrong."""
    from mambamim_jax.data.benchmarks import BENCHMARKS
    from mambamim_jax.data.datasets import DatasetError
    from mambamim_jax.data.prepare import prepare
    from mambamim_jax.train.progress import Terminal

    description, _, usage = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = LineParser(description=description, epilog=usage, formatter_class=formatter)
    parser.add_argument("name", metavar="NAME", choices=sorted(BENCHMARKS))
    parser.add_argument("--source", required=True, help="the extracted download")
    parser.add_argument("--output", required=True, help="a new folder")
    parser.add_argument("--copy", action="store_true", help="copy files rather than link them")
    options = parser.parse_args(argv)
    terminal = Terminal()
    try:
        with terminal.counting("Preparing") as progress:
            made = prepare(options.name, options.source, options.output, copy=options.copy, progress=progress)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    terminal.say(made)
    return 0


if __name__ == "__main__":
    run(main)
