"""The authors' released PyTorch code on a CPU: the other side of our benchmarks and of the conversion tests.

Nothing of that code is in this package: it is imported from a checkout the user names
(https://github.com/FengheTan9/MambaMIM). What it needs and a CPU cannot have is replaced, while it is being
imported, by the small stand-ins below: ``timm`` (an initialiser and an identity), ``monai`` (one up-sampling
block), ``mamba_ssm`` (the selective scan, here a plain loop over time) and ``causal_conv1d`` (absent, so that
its own fallback runs). PyTorch is imported only when something here is called.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAPER: dict[str, Any] = {
    "size": 96,
    "channels": [32, 64, 128, 192, 384],
    "depths": [1, 2, 2, 2, 1],
    "expansion": [2, 2, 4, 4, 4],
    "mamba_depth": 4,
    "decoder_width": 768,
    "mask_ratio": 0.75,
}
"""The size of the released pre-training model (METHOD: HyMamba at 96 voxels a side)."""


class BaselineError(RuntimeError):
    """The released code or PyTorch is not there, in one line that says what to do."""


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, **_):
    """Mamba's scan as a loop over time in plain PyTorch, arrays (b, e, l) and (b, n, l), float32 state.

    Stands in for the CUDA kernel of ``mamba_ssm``; autograd gives its backward.
    """
    import torch
    import torch.nn.functional as F

    dtype = u.dtype
    u, delta, B, C = u.float(), delta.float(), B.float(), C.float()
    if delta_bias is not None:
        delta = delta + delta_bias[:, None].float()
    if delta_softplus:
        delta = F.softplus(delta)
    state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = []
    for t in range(u.shape[-1]):
        step = delta[:, :, t, None]
        state = (step * A).exp() * state + step * u[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + u * D[:, None]
    return (y if z is None else y * F.silu(z.float())).to(dtype)


def _up_block() -> type:
    """A class with the parameter names and the arithmetic of MONAI's UNETR up-block; the lines are ours."""
    import torch
    from torch import nn

    class Holder(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x)

    def convolution(inputs: int, outputs: int, size: int) -> Holder:
        return Holder(nn.Conv3d(inputs, outputs, size, padding=size // 2, bias=False))

    class Residual(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.conv1, self.conv2 = convolution(inputs, outputs, 3), convolution(outputs, outputs, 3)
            self.conv3 = convolution(inputs, outputs, 1)
            self.norm, self.act = nn.InstanceNorm3d(outputs), nn.LeakyReLU(0.01)

        def forward(self, x):
            y = self.norm(self.conv2(self.act(self.norm(self.conv1(x)))))
            return self.act(y + self.norm(self.conv3(x)))

    class UnetrUpBlock(nn.Module):
        def __init__(self, in_channels: int, out_channels: int, **_: Any) -> None:
            super().__init__()
            self.transp_conv = Holder(nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2, bias=False))
            self.conv_block = Residual(2 * out_channels, out_channels)

        def forward(self, x, skip):
            return self.conv_block(torch.cat([self.transp_conv(x), skip], dim=1))

    return UnetrUpBlock


def _stand_ins() -> dict[str, Any]:
    """Modules to place in ``sys.modules``; None makes an import fail as if not installed."""
    from torch import nn

    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(members, __path__=[])
        return made

    identity = type("DropPath", (nn.Identity,), {})  # stochastic depth 0 is all the released model asks for
    drop = module("timm.models.layers.drop", DropPath=identity)
    initialiser = nn.init.trunc_normal_
    made = [
        *map(module, ("timm", "timm.models", "monai", "monai.networks", "monai.networks.blocks")),
        *map(module, ("mamba_ssm", "mamba_ssm.ops")),
        module("timm.models.layers", trunc_normal_=initialiser, DropPath=identity, drop=drop),
        drop,
        module("timm.loss", SoftTargetCrossEntropy=nn.CrossEntropyLoss),
        module("monai.networks.blocks.unetr_block", UnetrUpBlock=_up_block()),
        module(
            "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan, mamba_inner_fn=None
        ),
    ]
    return {m.__name__: m for m in made} | {"causal_conv1d": None, "mamba_ssm.ops.triton": None}


def checkout(text: str) -> str:
    """The type of a command line's option that takes a checkout of the released code."""
    if not _is_checkout(Path(text)):
        raise argparse.ArgumentTypeError(
            f"found {text}, without models/MambaMIM.py, expected a checkout of FengheTan9/MambaMIM"
        )
    return text


def _is_checkout(path: Path) -> bool:
    return (path / "models" / "MambaMIM.py").is_file()


@contextlib.contextmanager
def released_code(path: str | Path) -> Iterator[Callable[[str], Any]]:
    """Yields ``load(name)``, which imports a module of the released code in ``path``; undoes all it injects.

    Raises: BaselineError if PyTorch is missing or ``path`` is no checkout of the released code.
    """
    path = Path(path)
    if not _is_checkout(path):
        raise BaselineError(f"{path}: no models/MambaMIM.py there; give a checkout of FengheTan9/MambaMIM")
    try:
        stand_ins = _stand_ins()
    except ImportError as error:
        raise BaselineError(f"the baseline needs PyTorch ({error}): pip install torch einops") from error
    ours = (*stand_ins, "timm", "monai", "mamba_ssm", "causal_conv1d", "models")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ours}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(path))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(path))
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
        sys.modules.update(before)


def build_pretraining(path: str | Path, config: Mapping[str, Any] = PAPER) -> Any:
    """The released ``MambaMIM`` module (random weights) at the sizes of ``config`` (see PAPER)."""
    with released_code(path) as load, quiet():
        encoder_module = load("models.encoder")
        encoder = load("models.network.hymamba").Encoder(
            depth=config["mamba_depth"], sparse=True, **_sizes(config)
        )
        sparse = encoder_module.SparseEncoder(encoder=encoder, input_size=config["size"])
        decoder = load("models.decoder").LightDecoder(sparse.downsample_raito, width=config["decoder_width"])
        return load("models.MambaMIM").MambaMIM(sparse, decoder, mask_ratio=config.get("mask_ratio", 0.75))


def build_segmenter(path: str | Path, config: Mapping[str, Any]) -> Any:
    """The released fine-tuning network (random weights) at the sizes of ``config`` (also its ``classes``)."""
    with released_code(path) as load, quiet():
        network = load("models.network.hymamba").Hybird
        return network(depth=config["mamba_depth"], n_classes=config["classes"], **_sizes(config))


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"channels": "channels", "depths": "depths", "exp_r": "expansion"}
    sizes = {theirs: tuple(config[mine]) for theirs, mine in names.items()}
    return sizes | {"in_channel": config.get("in_channels", 1), "img_size": config["size"]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The released constructors print, and rely on deprecated calls."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def on_this_device() -> Iterator[None]:
    """``.cuda()`` without a GPU leaves a tensor where it is."""
    import torch

    original = torch.Tensor.cuda
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.cuda = original  # type: ignore[method-assign]


@dataclass
class PretrainStep:
    """One step of the released recipe at a time: forward, backward, gradient norm clipped at 5, AdamW."""

    path: str
    config: Mapping[str, Any]
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        import torch

        torch.manual_seed(self.seed)
        self.model = build_pretraining(self.path, self.config).train()
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.04)
        side = self.config["size"]
        self.crops = torch.rand(self.batch, 1, side, side, side)

    def __call__(self) -> float:
        """Does one step and returns its loss."""
        import torch

        with on_this_device(), quiet():
            loss = self.model(self.crops)
            self.optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            self.optimiser.step()
        return loss.item()


@dataclass
class TokiStep:
    """Forward and backward of the released token interpolation alone on one sample, of a mask (l,) a call, in turn."""

    path: str
    active: Sequence[Sequence[bool]]
    channels: int
    seed: int = 0

    def __post_init__(self) -> None:
        import torch

        torch.manual_seed(self.seed)
        side = round(len(self.active[0]) ** (1 / 3))
        with released_code(self.path) as load:
            self.interpolate = load("models.MambaMIM").MambaMIM.mask_token_every_batch
        self.holder = types.SimpleNamespace(A_interpolation=None)
        self.A = (0.05 * torch.randn(1, self.channels, self.channels)).requires_grad_()
        self.features = torch.randn(1, self.channels, side, side, side).requires_grad_()
        masks = [torch.tensor(list(mask)).reshape(1, 1, side, side, side) for mask in self.active]
        self.masks = itertools.cycle(masks)

    def __call__(self) -> float:
        """Does forward and backward once and returns the sum of squares of the tokens."""
        self.A.grad = self.features.grad = None
        self.holder.A_interpolation = self.A
        with on_this_device():
            tokens = self.interpolate(self.holder, self.features, next(self.masks))
        loss = (tokens * tokens).sum()
        loss.backward()
        return loss.item()
