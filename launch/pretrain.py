"""Pre-train an encoder by masked image modelling.

    python launch/pretrain.py --config=configs/pretrain.py:PRESET --workdir=DIR [--config.a.b=value …]

Presets: demo (no data needed), openkbp, hymamba_b. --help with --config lists all keys and their values.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.program import CONTINUE, run

if TYPE_CHECKING:
    from mambamim_jax.settings import PretrainConfig


def main(arguments: list[str]) -> int:
    """The exit code, see ``mambamim_jax.command.run_training``."""
    from mambamim_jax.command import run_training
    from mambamim_jax.settings import PretrainConfig

    return run_training(arguments, PretrainConfig, __doc__ or "", _work)


def _work(config: PretrainConfig, workdir: Path) -> Any:
    from mambamim_jax.train.pretrain import pretrain

    return pretrain(config, workdir)


if __name__ == "__main__":
    run(main, CONTINUE)
