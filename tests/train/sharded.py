"""Run in a process of its own with fake devices: a small network's first steps on many meshes, compared and checked.

    python -m tests.train.sharded mini 1 2,1,1 1,2,1 nudged …

mini: one layer of every kind that the rules know, quick to compile; hymamba: the pre-training network, made small, its
widths still divided by eight; narrow: the same with a decoder that two divide, for float64, in which XLA's convolutions
are plain loops; demo: the network of the preset demo, its decoder twice as wide so that eight devices divide it.
Then micro-batches, or 0 to only compile and look at what is gathered; then meshes (data, fsdp, model), or ``nudged``
for one device and first parameters changed in the seventh digit: how far rounding alone carries. Prints one line of
JSON a mesh. Adam's epsilon is large, as with the usual one it makes full-sized steps of gradients that are zero but for
rounding, such as those of a bias before BatchNorm. With JAX_ENABLE_X64=1 all of it is in float64, where rounding can't
be mistaken for a mesh that computes something else.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mambamim_jax.bench.collectives import Program
from mambamim_jax.bench.scaling import Compilations
from mambamim_jax.bench.step import settings
from mambamim_jax.model.decoder import BatchNormReLU, DecoderConv3
from mambamim_jax.model.mamba import MambaLayer
from mambamim_jax.model.mask import draw_mask
from mambamim_jax.model.masked_layers import MedNeXtBlock, Pointwise
from mambamim_jax.model.packed import pack, unpack
from mambamim_jax.model.rngs import Rngs
from mambamim_jax.model.upsample import Upsample2
from mambamim_jax.settings import DataConfig, MeshConfig, OptimConfig, PretrainConfig
from mambamim_jax.settings_model import HyMambaConfig, ModelConfig
from mambamim_jax.train.build import batch_stats, to_dicts
from mambamim_jax.train.losses import reconstruction_loss
from mambamim_jax.train.optim import make_optimiser, paths
from mambamim_jax.train.pretrain import mim_task
from mambamim_jax.train.sharding import divide, make_placement
from mambamim_jax.train.step import RUN_SELDOM, STOP, Task, abstract_state, initial_state, make_step

PRESET = f"{Path(__file__).parents[2] / 'configs' / 'pretrain.py'}:demo"
STEPS, BATCH = 20, 8
DTYPE = jnp.dtype(jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
FEW = 64
SIZES = HyMambaConfig((8, 8, 16, 16, 48), depths=(1, 1, 1, 1), expansion=(2, 2, 2, 2), mamba_depth=1, state=4)
OPTIM = OptimConfig(learning_rate=1e-2, warmup=0.2, eps=1e-4)


class Mini(nnx.Module):
    """Convolution and BatchNorm, a MedNeXt block, a Mamba layer over the patches, upsampling, one output channel."""

    def __init__(self, rngs: nnx.Rngs):
        dtype = DTYPE
        self.conv = DecoderConv3(1, 8, dtype=dtype, rngs=rngs)
        self.norm = BatchNormReLU(8, dtype=dtype)
        self.block = MedNeXtBlock(8, 2, dtype=dtype, rngs=rngs)
        self.layer = MambaLayer(64, state=4, dtype=dtype, rngs=rngs)
        self.upsample = Upsample2(8, 8, dtype=dtype, rngs=rngs)
        self.classify = Pointwise(8, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x, mask):
        x = self.norm(self.conv(x), self.conv.bias[...], True)
        packed = self.block(pack(x, mask), mask)
        b, k, *rest = packed.shape
        packed = self.layer(packed.reshape(b, k, -1)).reshape(b, k, *rest)
        coarse = unpack(packed, mask)[:, ::2, ::2, ::2]
        return self.classify(self.upsample(coarse))


def mini_task() -> Task:
    """Reconstruction of hidden patches of 2³ voxels by ``Mini``."""
    graph, *_ = nnx.split(nnx.eval_shape(lambda: Mini(Rngs(0))), nnx.Param, nnx.BatchStat)

    def loss(params, stats, batch, key):
        module = nnx.merge(graph, params, stats)
        rebuilt = module(batch["image"], batch["mask"])
        return reconstruction_loss(rebuilt, batch["image"], batch["mask"]), batch_stats(module)

    def prepare(batch, key):
        return batch | {"mask": draw_mask(key, BATCH, (2, 2, 2), 0.5)}

    return Task("mini", lambda key: to_dicts(Mini(Rngs(key))), loss, prepare)


def hymamba_task(name: str, decoder_width: int) -> Task:
    """Pre-training of a HyMamba."""
    data = DataConfig(source="phantoms", crop=CROPS[name], crops_per_volume=1, volumes_per_batch=BATCH)
    model = ModelConfig(hymamba=SIZES, decoder_width=decoder_width, mask_ratio=0.5, dtype=DTYPE.name)
    return mim_task(PretrainConfig(data=data, model=model))


def demo_task() -> Task:
    """Pre-training by ``configs/pretrain.py:demo``, in smaller crops."""
    config = settings(
        [f"--config={PRESET}", "--config.data.crop=(32,32,32)", "--config.model.decoder_width=128"]
    )
    return mim_task(replace(config, model=replace(config.model, dtype=DTYPE.name)))


CROPS = {"mini": (4, 4, 4), "hymamba": (32, 32, 16), "narrow": (32, 16, 16), "demo": (32, 32, 32)}
TASKS = {
    "mini": mini_task,
    "hymamba": partial(hymamba_task, "hymamba", 128),
    "narrow": partial(hymamba_task, "narrow", 32),
    "demo": demo_task,
}


def make_task(name: str) -> Task:
    """The task, its parameters and statistics drawn in float32 and kept in ``DTYPE``."""
    task = TASKS[name]()
    return replace(task, init=lambda key: jax.tree.map(lambda leaf: leaf.astype(DTYPE), task.init(key)))


def batch(step: int, crop: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A global batch that is a function of the step."""
    return {"image": np.random.default_rng(step).uniform(size=(BATCH, *crop, 1)).astype(DTYPE)}


def devices(sizes: tuple[int, ...]) -> list[jax.Device]:
    return jax.devices()[: int(np.prod(sizes))]


def gathered(name: str, sizes: tuple[int, ...]) -> list[str]:
    """Shapes that the compiled step gathers from other devices and that are no parameter's, but for a few numbers."""
    placement, task = make_placement(MeshConfig(*sizes), BATCH, devices(sizes)), make_task(name)
    optimiser, schedule = make_optimiser(OPTIM, STEPS, task.unused_parameters)
    state = placement.like(abstract_state(task, optimiser))
    step = make_step(task, optimiser, schedule, seed=0, placement=placement)
    image = jax.ShapeDtypeStruct((BATCH, *CROPS[name], 1), DTYPE, sharding=placement.of_batch(5))
    lowered = step.trace(state, {"image": image}).lower()
    text = lowered.compile(compiler_options=RUN_SELDOM).as_text()
    known = {squeezed(leaf.shape) for leaf in jax.tree.leaves(state["params"])}
    found = [c for c in Program(text).collectives if c.kind in ("all-gather", "all-to-all")]
    return [
        f"{c.kind} {shape}"
        for c in found
        for shape in c.shapes
        if squeezed(shape) not in known and np.prod(shape) > FEW
    ]


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """In whatever order, as the compiler transposes."""
    return tuple(sorted(size for size in shape if size > 1))


def nudge(leaf: jax.Array) -> jax.Array:
    """Changed in the seventh digit."""
    noise = np.random.default_rng(1).standard_normal(leaf.shape).astype(leaf.dtype)
    return jax.device_put(np.asarray(leaf) * (1 + leaf.dtype.type(1e-7) * noise), leaf.sharding)


def train(name: str, accumulate: int, sizes: tuple[int, ...], nudged: bool = False) -> dict:
    """The state and the losses after ``STEPS`` steps, the placement, and what was compiled after the first step."""
    placement, task = make_placement(MeshConfig(*sizes), BATCH // accumulate, devices(sizes)), make_task(name)
    optimiser, schedule = make_optimiser(OPTIM, STEPS, task.unused_parameters)
    state = initial_state(task, optimiser, 0, placement)
    if nudged:
        state |= {"params": jax.tree.map(nudge, state["params"])}
    step = make_step(task, optimiser, schedule, seed=0, accumulate=accumulate, placement=placement)
    quiet, losses, late = placement.flag(0), [], None
    for number in range(STEPS):
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, placement.put(batch(number, CROPS[name])) | {STOP: quiet})
        losses.append(float(jax.device_get(metrics["loss"])))
        late = late or Compilations()
    return {"state": state, "losses": losses, "placement": placement, "late": late.count}


def not_divided(run: dict) -> list[str]:
    """Tensors that the rules divide and that are not divided so on the devices, or lie elsewhere twice."""
    wrong, sizes = [], dict(run["placement"].mesh.shape)
    for path, leaf in paths(run["state"]).items():
        spec = divide(path, leaf.shape, sizes)
        used = [axis for axes in spec for axis in ([axes] if isinstance(axes, str) else axes or ())]
        parts = int(np.prod([sizes[axis] for axis in used])) if used else 1
        shards = {str(shard.index) for shard in leaf.addressable_shards}
        held = {shard.data.size for shard in leaf.addressable_shards}
        if len(shards) != parts or held != {leaf.size // parts}:
            wrong.append(f"{path} {leaf.shape} {spec}: {leaf.sharding}")
    return wrong


def divided_share(run: dict) -> float:
    """Share of the parameters and moments that no device holds whole."""
    leaves = jax.tree.leaves({name: run["state"][name] for name in ("params", "opt_state")})
    return sum(a.size for a in leaves if not a.sharding.is_fully_replicated) / sum(a.size for a in leaves)


def difference(run: dict, one: dict) -> dict[str, float]:
    """The largest relative difference of losses, and of parameters, moments and statistics (absolute below 1)."""
    far = lambda a, b: float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1.0)))  # noqa: E731
    mine, theirs = (jax.device_get(paths(r["state"])) for r in (run, one))
    losses = [np.asarray(r["losses"]) for r in (run, one)]
    return {"loss": far(*losses), "state": max(far(mine[path], theirs[path]) for path in theirs)}


def main(name: str, accumulate: str, *meshes: str) -> None:
    if accumulate == "0":
        for mesh in meshes:
            print(json.dumps({"mesh": mesh, "gathered": gathered(name, tuple(map(int, mesh.split(","))))}))
        return
    one = train(name, int(accumulate), (1, 1, 1))
    for mesh in meshes:
        nudged = mesh == "nudged"
        run = train(name, int(accumulate), (1, 1, 1) if nudged else tuple(map(int, mesh.split(","))), nudged)
        report = {
            "mesh": mesh,
            "late": run["late"],
            "not_divided": not_divided(run),
            "share": divided_share(run),
        }
        print(
            json.dumps(report | difference(run, one) | {"fell": one["losses"][0] - one["losses"][-1]}),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
