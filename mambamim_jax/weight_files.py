"""Files of named arrays: ``.npz``, ``.safetensors`` and PyTorch's ``.pth``; our names are "a/0/b" paths."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mambamim_jax.paths import home
from mambamim_jax.types import NumpyArray

TORCH = (".pth", ".pt", ".bin")
SUFFIXES = (".npz", ".safetensors", *TORCH)


class WeightFileError(ValueError):
    """A file that cannot be read or written, in one line."""

    exit_code = 2


def read_arrays(path: str | Path) -> dict[str, Any]:
    """The content of a file by name; a ``.pth`` is read with ``weights_only``, so it cannot run code.

    Args:
      path: a file, or the workdir of a run of ours, whose newest checkpoint is read.

    Raises: WeightFileError if the file is missing or damaged, or the library it needs is.
    """
    if home(path).is_dir():
        return _read_run(home(path))
    path = _checked(path)
    if not path.is_file():
        raise WeightFileError(f"{path}: no such file")
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if path.suffix == ".safetensors":
            return _safetensors(path).load_file(path)
        return _torch(path).load(path, map_location="cpu", weights_only=True)
    except WeightFileError:
        raise
    except Exception as error:  # each library has its own errors for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightFileError(f"{path}: not a readable {path.suffix} file of weights ({reason})") from None


def _read_run(workdir: Path) -> dict[str, NumpyArray]:
    """Parameters and batch statistics of a run's newest checkpoint, "params/…" and "batch_stats/…"."""
    import jax
    import orbax.checkpoint as ocp

    saved = [path for path in workdir.glob("checkpoints/*/state") if path.parent.name.isdigit()]
    if not saved:
        raise WeightFileError(
            f"{workdir}: found no checkpoints in it; expected the workdir of a run, or a file"
        )
    newest = max(saved, key=lambda path: int(path.parent.name)).absolute()
    log, level = logging.getLogger("absl"), logging.getLogger("absl").level
    log.setLevel(logging.ERROR)  # Orbax misses a file that belongs to the folder above
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(newest).item_metadata.tree
            wanted = {name: tree[name] for name in ("params", "batch_stats") if name in tree}
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            options = {"item": jax.tree.map(lambda _: 0, wanted), "restore_args": kinds}
            trees = checkpointer.restore(newest, args=ocp.args.PyTreeRestore(**options, partial_restore=True))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightFileError(f"{newest}: this checkpoint cannot be read ({reason})") from None
    finally:
        log.setLevel(level)
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def write_arrays(path: str | Path, arrays: Mapping[str, NumpyArray]) -> None:
    """Writes named arrays whole or not at all, in the format of the suffix.

    Raises: WeightFileError if the format is unknown, its library is missing or the place cannot be written.
    """
    path = _checked(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            np.savez(partial, allow_pickle=False, **arrays)
        elif path.suffix == ".safetensors":
            _safetensors(path).save_file(dict(arrays), partial)
        else:
            torch = _torch(path)
            torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, partial)
        os.replace(partial, path)
    except WeightFileError:
        raise
    except Exception as error:  # each library has its own errors for a full disk
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightFileError(f"{path}: cannot be written ({reason})") from None
    finally:
        partial.unlink(missing_ok=True)


def nest(arrays: Mapping[str, NumpyArray]) -> dict[str, Any]:
    """{"a/0/b": array} → {"a": {0: {"b": array}}}: names that are numbers are places in a list.

    Raises: WeightFileError where one name goes on from another, such as "a" and "a/0".
    """
    tree: dict[Any, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = [int(part) if part.isdigit() else part for part in name.split("/")]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise WeightFileError(
                    f"{name}: found an array of the name before {leaf}, too; expected one of them"
                )
        node[leaf] = array
    return tree


def _checked(path: str | Path) -> Path:
    path = home(path)
    if path.suffix not in SUFFIXES:
        raise WeightFileError(f"{path}: found suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    return path


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise WeightFileError(f"{path}: {path.suffix} files need PyTorch: pip install torch") from None
    return torch


def _safetensors(path: Path) -> Any:
    try:
        from safetensors import numpy
    except ImportError:
        raise WeightFileError(f"{path}: this format needs a package: pip install safetensors") from None
    return numpy
