"""Released PyTorch weights ↔ ours.

python launch/convert.py --to=ours hymamba_ct_pretrained.pth weights.npz
python launch/convert.py --to=official weights.npz hymamba.pth

Files are .pth, .npz or .safetensors; IN may also be the workdir of a run of ours. Our files name parameters
"params/…" and BatchNorm's running statistics "batch_stats/…".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.checks import LineParser
from mambamim_jax.program import run


def main(argv: list[str] | None = None) -> int:
    """Converts one file; 0, or 2 with one line on what is wrong."""
    description, _, usage = (__doc__ or "").partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = LineParser(description=description, epilog=usage, formatter_class=formatter)
    parser.add_argument("--to", choices=("ours", "official"), required=True)
    parser.add_argument(
        "--partial", action="store_true", help="keep what fits where some arrays do not (to ours)"
    )
    help_size = "voxels a side of the crops that the official network is for (to official)"
    parser.add_argument("--size", type=int, default=96, help=help_size)
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT")
    options = parser.parse_args(argv)

    from mambamim_jax.convert import ConversionError, flatten, from_official, to_official
    from mambamim_jax.weight_files import WeightFileError, nest, read_arrays, write_arrays

    try:
        arrays = read_arrays(options.input)
        if options.to == "ours":
            weights = from_official(arrays, strict=not options.partial)
            print(weights.report)
            trees = {"params": weights.params, "batch_stats": weights.batch_stats}
            write_arrays(options.output, flatten(trees))
        else:
            trees = nest(arrays)
            official = to_official(
                trees.get("params", trees), trees.get("batch_stats"), {"size": options.size}
            )
            write_arrays(options.output, official)
            print(f"{len(official)} arrays of the official network")
    except (ConversionError, WeightFileError) as error:
        if report := getattr(error, "report", None):
            print(report)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    run(main)
