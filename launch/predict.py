"""Predict label maps, on the scans' own grids.

python launch/predict.py --model=runs/organs --input=FOLDER --output=PREDICTIONS

--model is a model folder or a fine-tuning workdir (its best is used); give it several times for an ensemble. --input
is a NIfTI file or a folder of them, such as nnU-Net's imagesTs (CASE_0000.nii.gz, CASE_0001.nii.gz for channels).
Writes CASE.nii.gz; cases that are there already are kept, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.checks import ConfigError, LineParser
from mambamim_jax.program import run

AXES = "hwd"


def main(argv: list[str] | None = None) -> int:
    """0; 1 where some cases failed; 2 with one line on what is wrong before any work, or a full disk."""
    options = _parser().parse_args(argv)

    from mambamim_jax.evaluate.inputs import InputError
    from mambamim_jax.evaluate.predict import Options, predict
    from mambamim_jax.model_files import ModelFileError

    try:
        how = Options(
            options.overlap,
            tuple(AXES.index(letter) for letter in sorted(set(options.flips), key=AXES.index)),
            options.batch,
            options.window,
            options.probabilities,
            options.dtype,
        )
        failures = predict(options.model, options.input, options.output, how, options.overwrite)
    except (ConfigError, InputError, ModelFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if failures:
        print(f"error: {len(failures)} cases could not be predicted", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> LineParser:
    description, _, usage = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = LineParser(description=description, epilog=usage, formatter_class=formatter)
    parser.add_argument("--model", action="append", required=True, metavar="FOLDER")
    parser.add_argument("--input", required=True, metavar="FILE|FOLDER")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument("--overlap", type=float, default=0.5, help="of neighbouring windows, 0 to 0.9")
    parser.add_argument(
        "--flips", type=_axes, default="", help="axes to flip and average over: any of h (left-right), w, d"
    )
    parser.add_argument("--batch", type=int, default=1, help="windows computed together")
    parser.add_argument(
        "--window", type=_size, metavar="H,W,D", help="in voxels; the training crop if left out"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="the model's own if left out")
    help_probabilities = "also write CASE_probabilities.nii (i, j, k, class), 16 bits"
    parser.add_argument("--probabilities", action="store_true", help=help_probabilities)
    parser.add_argument("--overwrite", action="store_true", help="predict what is there already again")
    return parser


def _axes(text: str) -> str:
    if not set(text) <= set(AXES):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected some of the letters {AXES}")
    return text


def _size(text: str) -> tuple[int, ...]:
    try:
        h, w, d = (int(side) for side in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected three numbers such as 96,96,96") from None
    return h, w, d


if __name__ == "__main__":
    run(main, "run the same command again, without --overwrite, to continue")
