"""Launches of the scan's GPU kernels for ``launch/bench.py scan``: those of the sweep, and others by name."""

from __future__ import annotations

import argparse

from mambamim_jax.ops.selective_scan import tuning


def sweep_launches(base: tuning.Launch, channels: int, mode: str) -> list[tuning.Launch]:
    """The launches worth trying for so many channels, those of all samples together."""
    inference = mode == "forward"
    quads = channels // (base.inference_channels if inference else base.channels)
    if quads // 8 < base.fill // 2:
        halves = (0, base.halve_below) if inference else (base.halve_below,)
        launches = [
            base._replace(
                fill=int(base.fill * scale),
                backward_fill=int(base.backward_fill * scale),
                few=int(base.few * scale),
                halve_below=tokens,
            )
            for scale in (0.5, 1, 2)
            for tokens in halves
        ]
        launches += [base._replace(ends_chunk=chunk) for chunk in (8, 14)]
        below = (0, 10**6) if inference else ()
        return launches + [base._replace(abreast_below=tokens) for tokens in below]
    if inference:
        tried = [(chunk, k) for k in (2, 4) for chunk in (4, 8)]
        return [base._replace(inference_chunk=chunk, inference_channels=k) for chunk, k in tried]
    chunks = [chunk for chunk in (4, 8, 12) if chunk % (8 // base.channels) == 0]
    return [base._replace(chunk=chunk, backward_warps=w) for chunk in chunks for w in (1, 2, 4)]


def changed(text: str) -> dict[str, int]:
    """The fields of a launch in "abreast_below=0,few=528".

    Raises: ArgumentTypeError if the text is no such list.
    """
    try:
        found = {key: int(value) for key, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        found = {}
    if not found or not found.keys() <= set(tuning.Launch._fields) or min(found.values()) < 0:
        expected = "FIELD=NUMBER,... with fields of " + ", ".join(tuning.Launch._fields)
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
    return found
