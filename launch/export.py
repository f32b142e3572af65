"""Export a run's weights: a model folder, or a file with the authors' names for PyTorch.

python launch/export.py runs/organs MODEL              # config.json, model.safetensors, README.md
python launch/export.py --part=encoder runs/ct MODEL   # the encoder alone
python launch/export.py runs/organs weights.pth        # the authors' names; also .safetensors, .npz

RUN is a fine-tuning workdir (its best), a pre-training workdir (its newest checkpoint) or a model folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.checks import LineParser
from mambamim_jax.program import run


def main(argv: list[str] | None = None) -> int:
    """0, or 2 with one line on what is wrong."""
    description, _, usage = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = LineParser(description=description, epilog=usage, formatter_class=formatter)
    parser.add_argument("--part", choices=("whole", "encoder"), default="whole")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("output", metavar="OUT", help="a folder, or a .pth, .safetensors or .npz file")
    options = parser.parse_args(argv)

    from mambamim_jax.export import export
    from mambamim_jax.model_files import ModelFileError
    from mambamim_jax.official_sizes import ConversionError
    from mambamim_jax.weight_files import WeightFileError

    try:
        print(export(options.run, options.output, options.part))
    except (ConversionError, ModelFileError, WeightFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    run(main)
