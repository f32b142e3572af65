"""The one table between the names of the released PyTorch state dicts and the paths of our parameters.

Three networks share it: pre-training ("pretrain": sparse_encoder.*, dense_decoder.*, densify_projs.* …),
the encoder alone ("encoder", the released ``…timm_style.pth``) and fine-tuning ("segment": embeddings.*,
mae.*, decoder.*). A row is an official name, our path, and the einops pattern that turns the one array into
the other; read backwards it turns ours into theirs. Patterns only move axes and drop axes of length 1.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mambamim_jax.model.mamba import position_embedding
from mambamim_jax.official_sizes import Sizes
from mambamim_jax.types import NumpyArray

CONV3 = "o i h w d -> h w d i o"
DEPTHWISE = "c 1 h w d -> h w d c"
POINTWISE = "o i 1 1 1 -> i o"
TRANSPOSED = "i o p q r -> p q r i o"
LINEAR = "o i -> i o"
CAUSAL = "e 1 k -> k e"
VECTOR = "c -> c"
MATRIX = "e n -> e n"

BACKWARD = "Mamba's backward direction"
FINEST = "finest map, which no decoder reads"
TOKENS = "learned token that nothing reads"
POSITION = "position embedding, computed here"
COUNTER = "BatchNorm's step counter"
FILLER = "parameter of another filler"
FIRST_FUSION = "fusion at the deepest map, where nothing is fused"


@dataclass(frozen=True)
class Row:
    """One array: official name, our path ("" where ``unused`` says why there is none), pattern between."""

    official: str
    ours: str = ""
    pattern: str = VECTOR
    unused: str = ""
    shape: tuple[int, ...] = ()
    """Of the official array, where it is unused."""
    statistic: bool = False
    """A BatchNorm running statistic: it goes to the batch_stats tree."""

    @property
    def backwards(self) -> str:
        left, right = self.pattern.split(" -> ")
        return f"{right} -> {left}"


def rows(sizes: Sizes) -> list[Row]:
    """The table at these sizes."""
    if sizes.task == "pretrain":
        return [*_encoder(sizes, "sparse_encoder.", "encoder/"), *_pretraining(sizes)]
    if sizes.task == "segment":
        return [*_encoder(sizes, "", "encoder/"), *_segmenter()]
    return list(_encoder(sizes, "", ""))


def _module(official: str, ours: str, pattern: str, *, bias: bool = True) -> Iterator[Row]:
    """A layer with a kernel and a bias."""
    yield Row(f"{official}.weight", f"{ours}/kernel", pattern)
    if bias:
        yield Row(f"{official}.bias", f"{ours}/bias")


def _norm(official: str, ours: str) -> Iterator[Row]:
    yield Row(f"{official}.weight", f"{ours}/scale")
    yield Row(f"{official}.bias", f"{ours}/bias")


def _residual(official: str, ours: str, *, shortcut: bool = False) -> Iterator[Row]:
    for n in (1, 2):
        yield from _module(f"{official}.conv{n}", f"{ours}/conv{n}", CONV3)
        yield from _norm(f"{official}.norm{n}", f"{ours}/norm{n}")
    if shortcut:
        yield from _module(f"{official}.conv3", f"{ours}/shortcut", POINTWISE)
        yield from _norm(f"{official}.norm3", f"{ours}/norm3")


def _encoder(sizes: Sizes, official: str, ours: str) -> Iterator[Row]:
    theirs = f"{official}embeddings."
    yield from _module(f"{theirs}stem", f"{ours}stem", CONV3)
    for n in range(4):
        yield from _module(f"{theirs}expend{n + 1}", f"{ours}expand/{n}", CONV3)
        for i in range(sizes.depths[n]):
            block, mine = f"{theirs}layer{n + 2}.{i}.", f"{ours}stages/{n}/{i}/"
            yield from _module(f"{block}conv1", f"{mine}depthwise", DEPTHWISE)
            yield from _norm(f"{block}norm", f"{mine}norm")
            yield from _module(f"{block}conv2", f"{mine}expand", POINTWISE)
            yield from _module(f"{block}conv3", f"{mine}project", POINTWISE)
        yield from _residual(f"{theirs}encoder{n + 1}", f"{ours}skips/{n}")
    tokens = (1, math.prod(sizes.grid), sizes.width)
    yield Row(f"{official}mae.pos_embed", unused=POSITION, shape=tokens)
    if sizes.task != "segment":
        yield Row(f"{official}mae.mask_token", f"{ours}mamba/mask_token", "1 1 c -> c")
    for i in range(sizes.mamba_depth):
        yield from _mamba_layer(sizes, f"{official}mae.blocks.{i}.", f"{ours}mamba/layers/{i}/")


def _mamba_layer(sizes: Sizes, official: str, ours: str) -> Iterator[Row]:
    for n in (1, 2):
        yield from _norm(f"{official}norm{n}", f"{ours}norm{n}")
        yield from _module(f"{official}mlp.fc{n}", f"{ours}fc{n}", LINEAR)
    theirs, mine = f"{official}mamba.", f"{ours}mamba/"
    yield Row(f"{theirs}A_log", f"{mine}A_log", MATRIX)
    yield Row(f"{theirs}D", f"{mine}D")
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        yield from _module(f"{theirs}{name}", f"{mine}{name}", LINEAR, bias=False)
    yield Row(f"{theirs}dt_proj.bias", f"{mine}dt_bias")
    yield Row(f"{theirs}conv1d.weight", f"{mine}conv_kernel", CAUSAL)
    yield Row(f"{theirs}conv1d.bias", f"{mine}conv_bias")
    e, n, rank = 2 * sizes.width, sizes.state, math.ceil(sizes.width / 16)
    backward: dict[str, tuple[int, ...]] = {
        "A_b_log": (e, n),
        "D_b": (e,),
        "conv1d_b.weight": (e, 1, 4),
        "conv1d_b.bias": (e,),
        "x_proj_b.weight": (rank + 2 * n, e),
        "dt_proj_b.weight": (e, rank),
        "dt_proj_b.bias": (e,),
    }
    for name, shape in backward.items():
        yield Row(f"{theirs}{name}", unused=BACKWARD, shape=shape)


def _conv_pair(official: str, ours: str) -> Iterator[Row]:
    """2 × [convolution, BatchNorm, ReLU], a Sequential with the ReLUs at 2 and 5."""
    for n in (1, 2):
        conv, norm, mine = f"{official}.conv.{3 * n - 3}", f"{official}.conv.{3 * n - 2}", f"{ours}/norm{n}"
        yield from _module(conv, f"{ours}/conv{n}", CONV3)
        yield from _norm(norm, mine)
        yield Row(f"{norm}.running_mean", f"{mine}/mean", statistic=True)
        yield Row(f"{norm}.running_var", f"{mine}/var", statistic=True)
        yield Row(f"{norm}.num_batches_tracked", unused=COUNTER)


def _pretraining(sizes: Sizes) -> Iterator[Row]:
    """What surrounds the encoder in the pre-training network: filler, tokens, projections, decoder."""
    width, c = sizes.decoder_width, sizes.width
    if sizes.filler == "learned_token":
        yield Row("A_interpolation", unused=FILLER, shape=(1, c, c))
        yield Row("mask_tokens.0", "transition", "1 c 1 1 1 -> c")
    else:
        needed = sizes.filler != "linear"
        matrix = Row("A_interpolation", "transition", "1 o i -> o i")
        yield matrix if needed else Row("A_interpolation", unused=FILLER, shape=(1, c, c))
        yield Row("mask_tokens.0", unused=TOKENS, shape=(1, c, 1, 1, 1))
    if c != width:
        yield from _module("densify_projs.0", "project_deepest", POINTWISE)
    for i in range(3):
        yield Row(f"mask_tokens.{i + 1}", f"mask_tokens/{i}", "1 c 1 1 1 -> c")
        yield from _module(f"densify_projs.{i + 1}", f"projections/{i}", CONV3)
        yield from _conv_pair(f"dense_decoder.fuse.{i + 1}", f"decoder/fuse/{i}")
    for i in range(4):
        yield from _module(f"dense_decoder.dec.{i}.up_sample", f"decoder/upsample/{i}", TRANSPOSED)
        yield from _conv_pair(f"dense_decoder.dec.{i}", f"decoder/refine/{i}")
    yield from _module("dense_decoder.proj", "decoder", POINTWISE)
    finest = sizes.channels[1]
    yield Row("mask_tokens.4", unused=TOKENS, shape=(1, finest, 1, 1, 1))
    yield Row("densify_projs.4.weight", unused=FINEST, shape=(width // 16, finest, 3, 3, 3))
    yield Row("densify_projs.4.bias", unused=FINEST, shape=(width // 16,))
    for row in _conv_pair("dense_decoder.fuse.0", ""):
        kernel = {"0.weight": (width, 2 * width, 3, 3, 3), "3.weight": (width, width, 3, 3, 3)}
        counter = row.official.endswith("num_batches_tracked")
        shape = kernel.get(row.official[-8:], () if counter else (width,))
        yield Row(row.official, unused=FIRST_FUSION, shape=shape)


def _segmenter() -> Iterator[Row]:
    """The fine-tuning network's decoder: four UNETR up-blocks, a residual block, the classes."""
    for i in range(4):
        theirs, mine = f"decoder.decoder{5 - i}.", f"ups/{i}/"
        yield from _module(f"{theirs}transp_conv.conv", f"{mine}upsample", TRANSPOSED, bias=False)
        for n, pattern in ((1, CONV3), (2, CONV3), (3, POINTWISE)):
            name = "shortcut" if n == 3 else f"conv{n}"
            yield from _module(f"{theirs}conv_block.conv{n}.conv", f"{mine}{name}", pattern, bias=False)
    yield from _residual("decoder.decoder1", "head", shortcut=True)
    yield from _module("decoder.out.conv", "classify", POINTWISE)


def initial_value(row: Row, sizes: Sizes) -> NumpyArray:
    """What the released constructor puts into an unused array; random draws depend on its name alone."""
    name, shape = row.official, row.shape
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros((), np.int64)
    if row.unused == POSITION:
        return position_embedding(sizes.grid, sizes.width)[None]
    if row.unused == TOKENS:
        return _cut_normal(draw, shape, 0.02, 0.02)
    if row.unused == FINEST:  # PyTorch's default for convolutions
        return _uniform(draw, shape, (27 * sizes.channels[1]) ** -0.5)
    if row.unused == FIRST_FUSION:
        if len(shape) > 1:
            return _cut_normal(draw, shape, 0.02, 2.0)
        one = name.endswith((".running_var", ".1.weight", ".4.weight"))
        return np.full(shape, float(one), np.float32)
    if row.unused == BACKWARD:
        return _backward_value(name.rpartition(".mamba.")[2], shape, draw)
    return np.zeros(shape, np.float32)


def _backward_value(name: str, shape: tuple[int, ...], draw: np.random.Generator) -> NumpyArray:
    if name == "A_b_log":
        return np.broadcast_to(np.log(np.arange(1, shape[1] + 1, dtype=np.float32)), shape).copy()
    if name == "D_b":
        return np.ones(shape, np.float32)
    if name == "dt_proj_b.bias":
        return np.zeros(shape, np.float32)
    return _uniform(draw, shape, 0.5 if name.startswith("conv1d_b") else math.sqrt(6 / sum(shape)))


def _uniform(draw: np.random.Generator, shape: tuple[int, ...], bound: float) -> NumpyArray:
    return draw.uniform(-bound, bound, shape).astype(np.float32)


def _cut_normal(draw: np.random.Generator, shape: tuple[int, ...], std: float, bound: float) -> NumpyArray:
    """Normal numbers of deviation std, redrawn until they lie within ±bound."""
    value = std * draw.standard_normal(shape, np.float32)
    while (outside := np.abs(value) > bound).any():
        value[outside] = std * draw.standard_normal(int(outside.sum()), np.float32)
    return value
