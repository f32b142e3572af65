"""Compiling a large program so that it runs faster, and in less memory on a CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import jax

_ON_CPU: dict[str, str | bool] = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_experimental_ynn_fusion_type": "",
}
"""The order of operations that keeps least alive, where the default one keeps more for the sake of running two at
once; and matrix products by Eigen, which runs a batched one on all cores if each of the batch is large enough
(`winograd`), where YNNPACK, which XLA prefers, runs it on one."""

_ON_GPU: dict[str, str | bool] = {"xla_gpu_force_conv_nhwc": True}
"""Convolutions channels last, as our arrays are and cuDNN's fastest kernels want them. XLA lays those of volumes out
channels first by default, which transposes what goes in and out, twice over."""


def compile_lean(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The compiled program, memory that compiling took given back before it runs."""
    backend = jax.default_backend()
    compiled = lowered.compile(compiler_options={"cpu": _ON_CPU, "gpu": _ON_GPU}.get(backend))
    if backend == "cpu":
        _give_back()
    return compiled


def _give_back() -> None:
    """Asks the C library to return what it holds unused: gigabytes after XLA has compiled a training step."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # GNU's alone
    if trim is not None:
        trim(0)
