"""How tests have XLA compile for a CPU: as fast as it can, since what they run takes moments.

`conftest` sets it for all tests and the processes that they start; those of `test_kill` compile as users' runs do.
"""

import os
import shutil

import jax


def quick() -> str:
    """XLA's flags: half of the time goes; empty where there is a GPU, whose kernels are to be compiled as ever."""
    if os.environ.get("JAX_PLATFORMS") != "cpu" and shutil.which("nvidia-smi"):
        return ""
    flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    # in one part: the workers of pytest-xdist keep the cores busy
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
    if jax.__version_info__ >= (0, 11):
        return " ".join([*flags, "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"])
    return " ".join([*flags, "--xla_cpu_use_fusion_emitters=false"])


def devices(count: int) -> str:
    """XLA's flags for a CPU divided into so many devices, besides those set."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
