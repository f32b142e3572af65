"""Compiling a large program so that it runs faster and in less memory on a CPU; elsewhere it is compiled as ever."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import jax

_ON_CPU: dict[str, str | bool] = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_experimental_ynn_fusion_type": "",
}
"""The order of operations that keeps least alive, where the default one keeps more for the sake of running two at
once; and matrix products by Eigen, which runs a batched one on all cores if each of the batch is large enough
(`winograd`), where YNNPACK, which XLA prefers, runs it on one."""

OLDER_EMITTERS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"


def with_older_emitters() -> None:
    """Sets XLA_FLAGS so that jax 0.11 and newer compile for a CPU in the time that 0.10 takes.

    Their way of emitting loops can take minutes for index arithmetic (a small Vision Mamba: over 200 s instead of 35),
    and what it emits is no faster.
    To be called before anything is computed; flags that the user has set stay, and other devices are not concerned.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.__version_info__ >= (0, 11) and "xla_backend_extra_options" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {OLDER_EMITTERS}".strip()


def compile_lean(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The compiled program, memory that compiling took given back before it runs."""
    if jax.default_backend() != "cpu":
        return lowered.compile()
    compiled = lowered.compile(compiler_options=_ON_CPU)
    _give_back()
    return compiled


def _give_back() -> None:
    """Asks the C library to return what it holds unused: gigabytes after XLA has compiled a training step."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # GNU's alone
    if trim is not None:
        trim(0)
