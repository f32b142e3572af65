"""Which volumes a run was started with: where one goes on with others, they are named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from mambamim_jax.checks import ConfigError
from mambamim_jax.data.preprocess import dump_json, write_atomic
from mambamim_jax.data.stream import Loader
from mambamim_jax.train.checkpoint import Checkpoints

VOLUMES = "volumes.json"
SHOWN = 3


def same_volumes(loader: Loader, workdir: Path, checkpoints: Checkpoints) -> None:
    """Remembers in WORKDIR/volumes.json what a run reads; what it read before is compared where it goes on.

    Where nothing is remembered it is left to the loader's own state, which knows only that something differs.

    Raises: ConfigError that says how many volumes are new, gone and changed, with the names of some.
    """
    steps, identity = checkpoints.steps(), json.loads(json.dumps(loader.identity))
    # A folder's name holds a digest of its labels, too.
    now = {entry.id: entry.folder if entry.has_label else entry.digest for entry in loader.store.entries}
    try:
        saved = checkpoints.meta(steps[-1])["data"] if steps else identity
        if identity.items() <= saved.items():
            if jax.process_index() == 0:
                write_atomic(workdir / VOLUMES, dump_json({"identity": identity, "volumes": now}))
            return
        before = json.loads((workdir / VOLUMES).read_bytes())
        known = before["identity"].items() <= saved.items()
        differs = _differences(before["volumes"], now)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or without room
        return
    if known and differs:
        expected, advice = f"the volumes of the run in {workdir}", "use those, or another --workdir"
        raise ConfigError("config.data", f"found {differs}", expected, advice)


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    parts = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "changed": [name for name in now if name in before and now[name] != before[name]],
    }
    return ", ".join(f"{len(names)} {what} ({_some(names)})" for what, names in parts.items() if names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
