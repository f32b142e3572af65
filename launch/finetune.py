"""Fine-tune an encoder for segmentation.

    python launch/finetune.py --config=configs/finetune.py:PRESET --workdir=DIR --config.data.source=FOLDER
        [--config.init=WEIGHTS] [--config.a.b=value …]

Presets: demo (no data needed), openkbp, btcv, amos22 and more. --help with --config lists all keys and values.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.program import CONTINUE, run

if TYPE_CHECKING:
    from mambamim_jax.settings_finetune import FinetuneConfig


def main(arguments: list[str]) -> int:
    """The exit code, see ``mambamim_jax.command.run_training``."""
    from mambamim_jax.command import run_training
    from mambamim_jax.settings_finetune import FinetuneConfig

    return run_training(arguments, FinetuneConfig, __doc__ or "", _work)


def _work(config: FinetuneConfig, workdir: Path) -> Any:
    from mambamim_jax.train.finetune import finetune

    return finetune(config, workdir)


if __name__ == "__main__":
    run(main, CONTINUE)
