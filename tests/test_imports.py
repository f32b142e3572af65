"""Imports point one way: file -> volume -> crop -> mask -> encoder -> decoder -> loss -> step -> loop."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mambamim_jax"

SETTINGS = ("checks", "settings", "settings_model", "config", "command")


def parts(*names: str) -> tuple[str, ...]:
    return tuple(f"mambamim_jax.{name}" for name in (*names, *SETTINGS, "evaluate", "bench"))


FORBIDDEN = {
    "types.py": ("mambamim_jax.",),
    "data": ("jax", "flax", *parts("ops", "model", "train")),
    "ops": parts("model", "train", "data"),
    "model": parts("train", "data"),
    "train": ("mambamim_jax.config", "mambamim_jax.command", "mambamim_jax.bench", "ml_collections"),
    "evaluate": ("mambamim_jax.bench", "ml_collections"),
    "visualise.py": ("mambamim_jax.model", "mambamim_jax.train", "mambamim_jax.data"),
}


def imported(path: Path) -> set[str]:
    """Every module that a file names in an import, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_point_one_way(part: str):
    root = PACKAGE / part
    files = [root] if root.is_file() else sorted(root.rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            for banned in FORBIDDEN[part]:
                within = name == banned or name.startswith(banned if banned.endswith(".") else f"{banned}.")
                assert not within, f"{path.relative_to(PACKAGE)} imports {name}"


def test_one_file_knows_ml_collections():
    knowing = {
        p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "ml_collections" in imported(p)
    }
    assert knowing <= {"config.py"}


def test_no_torch_or_tensorflow_at_import():
    """The base install is free of them: only functions may import torch, and nothing TensorFlow."""
    for path in PACKAGE.rglob("*.py"):
        top = {
            name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
        }
        if path.parent.name != "bench":
            assert not any(name.split(".")[0] in ("torch", "monai") for name in top), path
        assert not any(name.split(".")[0] in ("tensorflow", "clu") for name in imported(path)), path
