"""mamba_ssm's CUDA code as sides of ``launch/bench.py scan`` and ``mixer``; needs PyTorch and its extensions."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mambamim_jax.bench.repeat import Run
from mambamim_jax.ops.selective_scan.contract import ScanInputs


def mamba_ssm(inputs: ScanInputs, mode: str, iterations: int) -> Run:
    """A function that times ``iterations`` runs of the scan, captured in one graph, and returns seconds a run.

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

    return _captured(torch, once, iterations)


class MambaInner:
    """mamba_ssm's mixer as its ``Mamba`` module runs it: the first projection, then ``mamba_inner_fn``.

    Args:
        weights: those of our ``Mamba``, by name ("in_proj/kernel"), float32.
        x: tokens (b, l, c). g: the gradient of the result, of the same shape.

    Raises: ImportError if PyTorch, einops or one of the extensions is missing.
    """

    def __init__(self, weights: Mapping[str, Any], x: Any, g: Any):
        self.torch: Any = importlib.import_module("torch")
        interface: Any = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        importlib.import_module("causal_conv1d_cuda")
        self.function = interface.mamba_inner_fn
        self.torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does by itself

        def tensor(name: str, *, turn: bool = False) -> Any:
            array = np.array(weights[name], np.float32)
            made = self.torch.from_numpy(np.ascontiguousarray(array.T if turn else array))
            return made.cuda().requires_grad_()

        self.projections = {
            name: tensor(f"{name}/kernel", turn=True) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")
        }
        self.taps = tensor("conv_kernel", turn=True)
        self.rest = [tensor(name) for name in ("conv_bias", "A_log", "D", "dt_bias")]
        self.x, self.g = (self.torch.from_numpy(np.array(a, np.float32)).cuda() for a in (x, g))
        self.x.requires_grad_()

    def once(self, mode: str, dtype: str) -> Any:
        """The result (b, l, c), and with the backward pass the gradients of everything."""
        conv_bias, A_log, D, dt_bias = self.rest
        with self._precision(dtype):
            b, l, c = self.x.shape
            flat = self.x.reshape(b * l, c).t()
            xz = (self.projections["in_proj"] @ flat).reshape(-1, b, l).transpose(0, 1)
            out = self.function(
                xz,
                self.taps[:, None],
                conv_bias,
                *(self.projections[name] for name in ("x_proj", "dt_proj", "out_proj")),
                None,
                -self.torch.exp(A_log),
                D=D,
                delta_bias=dt_bias,
            )
        if mode == "forward":
            return out
        wanted = [self.x, self.taps, *self.projections.values(), *self.rest]
        return out, self.torch.autograd.grad(out, wanted, self.g.to(out.dtype))

    def run(self, mode: str, dtype: str, iterations: int) -> Run:
        """What times ``iterations`` runs, captured in one graph; seconds a run."""

        def once() -> None:
            with self.torch.no_grad() if mode == "forward" else contextlib.nullcontext():
                self.once(mode, dtype)

        return _captured(self.torch, once, iterations)

    def _precision(self, dtype: str) -> Any:
        if dtype == "float32":
            return contextlib.nullcontext()
        return self.torch.autocast("cuda", getattr(self.torch, dtype), cache_enabled=False)


def _captured(torch: Any, once: Callable[[], None], iterations: int) -> Run:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # relaxed, since JAX's own threads may call CUDA meanwhile, which would end a capture
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
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
