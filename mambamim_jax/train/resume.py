"""Going on with a run that was saved: what may differ, and how long it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from mambamim_jax.checks import ConfigError
from mambamim_jax.settings import RunConfig, flat
from mambamim_jax.settings_model import ENCODERS


def compare(saved: dict[str, Any], config: RunConfig, workdir: Path, say: Callable[[str], None]) -> None:
    """Tells harmless differences to the saved configuration and refuses the others.

    A key that the library did not have when the run was saved had what is its default; those of an encoder that is not
    in use are harmless.

    Raises: ConfigError that names every key that would change what is trained.
    """
    now, saved = flat(config), flat(type(config)()) | saved
    unused = [f"model.{name}" for name in ENCODERS if name != now.get("model.encoder")]
    changed = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    free = [key for key in changed if any(f"{key}.".startswith(f"{n}.") for n in (*config.harmless, *unused))]
    for key in [key for key in free if key != "resume"]:
        say(f"config.{key}: now {now.get(key)!r}, was {saved.get(key)!r} when the run was saved")
    fatal = [key for key in changed if key not in free]
    if fatal:
        differences = ", ".join(f"{key} {now.get(key)!r} (was {saved.get(key)!r})" for key in fatal)
        keys = "config." + ", config.".join(fatal)
        advice = "take those, or another --workdir for a new run"
        raise ConfigError(keys, f"found {differences}", f"the values of the run in {workdir}", advice)


def planned(
    config: RunConfig, batches_per_epoch: Fraction | int, saved: Mapping[str, Any] | None
) -> tuple[int, int]:
    """Updates of the whole run, and how many they were when it was saved; both the same for a new run.

    A run that goes on with the same settings keeps its length. Where that is not recorded, each of its epochs was
    rounded up to whole batches.

    Args: saved: ``Checkpoints.newest``.
    """
    steps = config.total_steps(batches_per_epoch)
    if saved is None:
        return steps, steps
    now, then = flat(config), flat(type(config)()) | saved["config"]
    before = saved.get("steps") or then["steps"] or then["epochs"] * math.ceil(batches_per_epoch)
    return (before if _length(now) == _length(then) else steps), before


def _length(record: Mapping[str, Any]) -> tuple[int, int]:
    """What decides how long a run is: its steps, or else its epochs."""
    return record["steps"], 0 if record["steps"] else record["epochs"]
