"""Which GPUs and inputs the kernels take."""

from __future__ import annotations

import jax.numpy as jnp

from mambamim_jax.ops.selective_scan.contract import ScanInputs

AMPERE, HOPPER = (8, 0), (9, 0)
NAMES = {AMPERE: "8.0 (Ampere)", HOPPER: "9.0 (Hopper)"}
LARGEST_STATE = 32
"""States a channel that the kernels can keep in registers."""


def refusal(
    inputs: ScanInputs, platform: str, capability: str, least: tuple[int, int] = AMPERE
) -> str | None:
    """Why kernels for ``least`` and newer cannot take these inputs on this device, or None where they can."""
    if (reason := device_refusal(platform, capability, least)) is not None:
        return reason
    if inputs.A.shape[1] > LARGEST_STATE:
        return f"found a state of {inputs.A.shape[1]}, expected {LARGEST_STATE} or less"
    if any(x is not None and x.dtype == jnp.float64 for x in inputs):
        return "found float64 inputs, expected float32 or narrower"
    return None


def device_refusal(platform: str, capability: str, least: tuple[int, int] = AMPERE) -> str | None:
    """Why kernels for ``least`` and newer cannot run on this device, or None where they can."""
    if platform not in ("gpu", "cuda"):
        return f"found platform {platform}, expected an NVIDIA GPU"
    if tuple(int(part) for part in capability.split(".") if part.isdigit()) < least:
        return f"found compute capability {capability or 'unknown'}, expected {NAMES[least]} or newer"
    return None
