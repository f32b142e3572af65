"""The README of a model folder: what a network takes, what it gives, how it was trained, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER = "https://arxiv.org/abs/2408.08070"
PURPOSE = {
    "segment": "3D segmentation network: an encoder and a UNETR decoder",
    "encoder": "Encoder alone, pre-trained by masked image modelling, for fine-tuning",
    "pretrain": "Encoder and reconstruction decoder of masked-image-modelling pre-training",
}
USE = {
    "segment": "python launch/predict.py --model=FOLDER --input=IMAGES --output=PREDICTIONS",
    "encoder": "python launch/finetune.py --config=configs/finetune.py --workdir=RUN --config.init=FOLDER",
    "pretrain": "python launch/finetune.py --config=configs/finetune.py --workdir=RUN --config.init=FOLDER",
}


def write(description: Mapping[str, Any]) -> str:
    """Markdown with the front matter that Hugging Face reads; see ``model_files.save_model`` for the keys."""
    task = description["task"]
    title = f"{description['encoder']}, {task}"
    tags = ["medical-imaging", "3d", "mamba", "jax", *(["image-segmentation"] if task == "segment" else [])]
    lines = [
        "---",
        "library_name: mambamim_jax",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {title}",
        "",
    ]
    lines += [
        f"{PURPOSE[task]} (mambamim_jax {description['library_version']}, after MambaMIM, {PAPER}).",
        "",
    ]
    lines += ["## Input", "", *_input(description), ""]
    if task == "segment":
        lines += ["## Output", "", *_output(description), ""]
    for key in ("results", "training"):
        if description.get(key):
            lines += [f"## {key.capitalize()}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {_number(value)} |" for name, value in description[key].items()] + [""]
    lines += ["## Use", "", "```bash", USE[task], "```", ""]
    lines += ["Not a medical device; not for clinical decisions.", ""]
    return "\n".join(lines)


def _input(description: Mapping[str, Any]) -> list[str]:
    spacing = " × ".join(f"{mm:g}" for mm in description["spacing"])
    crop = " × ".join(map(str, description["crop"]))
    lines = ["| channel | intensities |", "|---|---|"]
    for name, rule in zip(description["channel_names"], description["normalisation"]):
        window = f"{rule.get('low', 0):g} to {rule.get('high', 0):g} scaled to 0 to 1"
        lines.append(f"| {name} | {window if rule['kind'] == 'window' else 'z-score of non-zero voxels'} |")
    return [*lines, "", f"RAS grid of {spacing} mm, windows of {crop} voxels. `predict` sees to all of it."]


def _output(description: Mapping[str, Any]) -> list[str]:
    lines = ["| value | label |", "|---|---|"]
    lines += [f"| {value} | {name} |" for value, name in description["labels"].items()]
    if description.get("regions"):
        lines += ["", "One sigmoid per region, written in this order:", ""]
        for region in description["regions"]:
            inside = ", ".join(map(str, region["labels"]))
            lines.append(f"- {region['name']}: labels {inside}; writes {region['writes']}")
    return lines


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
