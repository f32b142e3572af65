"""Gradients of the released PyTorch code in float64, for the goldens whose float32 is too coarse to compare with.

    pip install torch einops
    python -m tests.model.double CHECKOUT    # of https://github.com/FengheTan9/MambaMIM

writes ``NAME_double.npz`` to ``tests/goldens``: weights, input and mask are those of ``NAME.npz``; what is kept is the
loss or the logits' mean and every gradient, as float32 (6e-8 relative, where the golden is off by up to 3e-3).
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

import numpy as np

from mambamim_jax.bench.torch_baseline import build_pretraining, build_segmenter, on_this_device, quiet

from .goldens import GOLDENS, part, read


@contextmanager
def all_double():
    """The released code asks for float32 here and there by ``.float()``."""
    import torch

    kept = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = kept


def gradients(model, scalar) -> dict[str, np.ndarray]:
    """Of every parameter that takes part in ``scalar``, by its official name."""
    scalar.backward()
    found = {f"grad.{name}": p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"value": scalar.detach().numpy()}


def load(model, arrays):
    """The model in float64 with the golden's weights."""
    import torch

    model = model.double().train()
    state = {name: torch.from_numpy(np.array(a)) for name, a in part(arrays, "weight.").items()}
    report = model.load_state_dict(state, strict=False)
    assert not report.missing_keys, report
    return model


def segment(path: str) -> dict[str, np.ndarray]:
    """Gradients of mean(logits * cotangent)."""
    import torch

    arrays, config = read("segment")
    model = load(build_segmenter(path, config), arrays)
    logits = model(torch.from_numpy(arrays["input"]).double())
    return gradients(model, (logits * torch.from_numpy(arrays["cotangent"]).double()).mean())


def pretrain(path: str) -> dict[str, np.ndarray]:
    """Gradients of the loss with the golden's mask."""
    import torch

    arrays, config = read("pretrain_released")
    model = load(build_pretraining(path, config), arrays)
    return gradients(
        model, model(torch.from_numpy(arrays["input"]).double(), torch.from_numpy(arrays["active"]))
    )


def main() -> None:
    """Writes both files."""
    for name, run in (("segment", segment), ("pretrain_released", pretrain)):
        with all_double(), on_this_device(), quiet():
            found = run(sys.argv[1])
        golden, _ = read(name)
        worst = max(
            np.max(np.abs(found[key] - golden[key])) / np.max(np.abs(golden[key]))
            for key in golden
            if key.startswith("grad.") and key in found and np.max(np.abs(golden[key])) > 1e-7
        )
        print(f"{name}: value {found['value']:.9f}, golden's gradients off by at most {worst:.1e}")
        np.savez_compressed(
            GOLDENS / f"{name}_double.npz", **{k: a.astype(np.float32) for k, a in found.items()}
        )


if __name__ == "__main__":
    main()
