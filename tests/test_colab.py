"""The notebook's code parses, and its commands name scripts, presets and keys that there are."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mambamim_jax.config import parse_command_line
from mambamim_jax.settings import PretrainConfig
from mambamim_jax.settings_finetune import FinetuneConfig

ROOT = Path(__file__).parents[1]
CELLS = [
    "".join(cell["source"])
    for cell in json.loads((ROOT / "launch" / "colab" / "mambamim_jax.ipynb").read_text())["cells"]
    if cell["cell_type"] == "code"
]
COMMANDS = [
    shlex.split(command)
    for cell in CELLS
    for command in re.findall(r"^!python (launch/.*)$", cell.replace("\\\n", ""), re.MULTILINE)
]


def test_python_cells_parse():
    for cell in CELLS:
        lines = cell.replace("\\\n", "").splitlines()
        compile("\n".join(line for line in lines if not line.startswith(("!", "%"))), "cell", "exec")


def test_the_kernel_leaves_the_gpu_to_the_commands():
    """An open process of JAX keeps most of a GPU's memory."""
    assert not any(re.search(r"^\s*(import|from) (jax|mambamim_jax)", cell, re.MULTILINE) for cell in CELLS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_commands_are_those_of_the_project(command, monkeypatch, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs" / "demo").mkdir(parents=True)  # what fine-tuning starts from
    monkeypatch.chdir(tmp_path)
    assert (ROOT / command[0]).is_file()
    kind = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}.get(Path(command[0]).stem)
    if kind:
        config, _ = parse_command_line(command[1:], kind, "usage")
        assert config


def test_both_trainings_are_shown():
    assert {Path(command[0]).stem for command in COMMANDS} >= {"pretrain", "finetune"}
