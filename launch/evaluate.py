"""Score predictions against labels: Dice, IoU, HD95 and NSD per case and class.

python launch/evaluate.py --predictions=FOLDER --labels=FOLDER --output=FOLDER [--compare=OTHER_PREDICTIONS]

Files match by name. Writes scores.csv, summary.json and report.png (box plots and the worst cases). The names of the
classes come from --labels-json, from a dataset.json beside the labels, or from the predictions' own settings.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.checks import LineParser
from mambamim_jax.paths import home
from mambamim_jax.program import run


def main(argv: list[str] | None = None) -> int:
    """0, or 2 with one line on what is wrong."""
    options = _parser().parse_args(argv)

    from mambamim_jax.data.volume import VolumeError
    from mambamim_jax.evaluate.inputs import InputError
    from mambamim_jax.evaluate.report import Request, evaluate

    try:
        evaluate(Request(**vars(options)))
    except (InputError, VolumeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> LineParser:
    description, _, usage = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = LineParser(description=description, epilog=usage, formatter_class=formatter)
    parser.add_argument("--predictions", type=home, required=True, metavar="FOLDER")
    parser.add_argument("--labels", type=home, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=home, required=True, metavar="FOLDER")
    parser.add_argument(
        "--labels-json", type=home, metavar="FILE", help="dataset.json with the table of labels"
    )
    parser.add_argument(
        "--compare", type=home, metavar="FOLDER", help="predictions of another run, same cases"
    )
    help_images = "scans to show; nnU-Net's images folder beside the labels if left out"
    parser.add_argument("--images", type=home, metavar="FOLDER", help=help_images)
    parser.add_argument("--tolerance", type=float, default=2.0, help="of NSD, in mm (2)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    return parser


if __name__ == "__main__":
    run(main)
