"""mamba_ssm's CUDA kernel as a side of ``launch/bench.py scan``; needs PyTorch and ``selective_scan_cuda``."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mambamim_jax.ops.selective_scan.contract import ScanInputs


def mamba_ssm(inputs: ScanInputs, mode: str, iterations: int) -> Callable[[], float]:
    """A function that times ``iterations`` runs, captured in one graph, and returns seconds a run.

    Raises: ImportError if PyTorch or the extension is missing.
    """
    torch: Any = importlib.import_module("torch")  # first, since it loads what the extension links to
    kernels: Any = importlib.import_module("selective_scan_cuda")

    def tensor(x: Any, turn: bool = False) -> Any:
        t = torch.from_numpy(np.array(x, np.float32)).cuda()
        return t.transpose(1, 2).contiguous() if turn else t

    u, delta, z = (tensor(x, True) for x in (inputs.u, inputs.delta, inputs.z))
    B, C = (tensor(x, True)[:, None] for x in (inputs.B, inputs.C))
    A, D, bias = (tensor(x) for x in (inputs.A, inputs.D, inputs.delta_bias))

    def once() -> None:
        out, x, gated = kernels.fwd(u, delta, A, B, C, D, z, bias, True)
        if mode != "forward":
            kernels.bwd(u, delta, A, B, C, D, z, bias, gated, x, out, None, True, False)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(iterations):
            once()

    def run() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / iterations

    run()
    return run
