"""What launch/pretrain.py and launch/finetune.py have in common: arguments in, a run, an exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mambamim_jax.checks import ConfigError
from mambamim_jax.config import HelpRequested, parse_command_line
from mambamim_jax.device_memory import DeviceMemoryError, exhausted
from mambamim_jax.paths import PathError
from mambamim_jax.settings import RunConfig

C = TypeVar("C", bound=RunConfig)


def run_training(arguments: list[str], kind: type[C], usage: str, work: Callable[[C, Path], Any]) -> int:
    """Parses the arguments and does the work, alone or as one of several processes.

    Args:
      kind: the settings' class. usage: what --help prints first. work: (settings, workdir) → ``train.summary.Outcome``;
        what takes long to import it imports itself, so that a wrong argument is told at once.

    Returns:
      the exit code: 0; 2 settings or data that cannot work, or need more memory than a device has; 3 a loss that is not
      finite; 4 no readable checkpoint; 75 saved and to be started again (SIGTERM, SIGUSR1, or another process or a
      device is gone); 130 Ctrl-C.
    """
    try:
        config, workdir = parse_command_line(arguments, kind, usage)
    except HelpRequested as help_text:
        print(help_text)
        return 0
    except ConfigError as error:
        return _fail(error)

    import jax

    from mambamim_jax.data.datasets import DatasetError
    from mambamim_jax.data.store import DataLossError, StoreError
    from mambamim_jax.train import processes, signals
    from mambamim_jax.train.checkpoint import DamagedError
    from mambamim_jax.train.step import NonFiniteError

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))
    signals.end_at_once()  # until there is something to save
    told = (
        ConfigError,
        PathError,
        DatasetError,
        DataLossError,
        StoreError,
        DamagedError,
        NonFiniteError,
        DeviceMemoryError,
        processes.PeerError,
    )
    try:
        processes.start(config.distributed)
        outcome = work(config, workdir)
    except told as error:
        return processes.leave(_fail(error))
    except jax.errors.JaxRuntimeError as error:
        if wanted := exhausted(error):
            return processes.leave(_fail(_too_large(config, wanted)))
        if not processes.several():
            raise
        return processes.leave(_fail(processes.lost_peer(error)))
    return signals.exit_code(outcome.signal)


def _too_large(config: Any, wanted: str) -> DeviceMemoryError:
    """The error of a device's memory, with the settings that need less of it."""
    accumulate = config.optim.accumulate
    crops = f"{config.data.batch // accumulate} crops of {' × '.join(map(str, config.data.crop))} voxels"
    less = ["config.model.dtype=bfloat16"] if config.model.dtype != "bfloat16" else []
    less += ["config.remat=dots"] if config.remat == "none" else []
    less += [f"a larger config.optim.accumulate than {accumulate}", "more devices"]
    return DeviceMemoryError(f"{wanted} on a device, for {crops} at once; what needs less: {', '.join(less)}")


def _fail(error: Exception) -> int:
    """Prints the one line and gives the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return getattr(error, "exit_code", 2)
