"""Does pre-training help? Fine-tune from it and from scratch, seeds and label shares, and compare on held-out cases.

    python launch/compare.py --source=DatasetNNN --workdir=runs/compare [--jobs=2]

See --help; the work is in mambamim_jax/bench/starts.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.bench.starts import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
