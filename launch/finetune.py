"""Fine-tune an encoder for segmentation.

    python launch/finetune.py --config=configs/finetune.py:PRESET --workdir=DIR --config.data.source=FOLDER
        [--config.init=WEIGHTS] [--config.a.b=value …]

Presets: demo (no data needed), openkbp, btcv, amos22 and more. --help with --config lists all keys and values.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.config import HelpRequested, parse_command_line
from mambamim_jax.settings import ConfigError
from mambamim_jax.settings_finetune import FinetuneConfig


def main(arguments: list[str]) -> int:
    """The exit code: 0; 2 settings or data that cannot work; 3 a loss that is not finite; 128 + a signal."""
    try:
        config, workdir = parse_command_line(arguments, FinetuneConfig, __doc__ or "")
    except HelpRequested as help_text:
        print(help_text)
        return 0
    except ConfigError as error:
        return fail(error)

    import jax

    from mambamim_jax.data.datasets import DatasetError
    from mambamim_jax.data.store import DataLossError, StoreError
    from mambamim_jax.train.checkpoint import DamagedError
    from mambamim_jax.train.finetune import finetune
    from mambamim_jax.train.step import NonFiniteError

    jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))
    try:
        outcome = finetune(config, workdir)
    except (ConfigError, DatasetError, DataLossError, StoreError, DamagedError, NonFiniteError) as error:
        return fail(error)
    return 128 + outcome.signal if outcome.signal else 0


def fail(error: Exception) -> int:
    """Prints the one line and gives the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return getattr(error, "exit_code", 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
