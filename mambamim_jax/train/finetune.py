"""Fine-tuning for segmentation: settings in; the best and the last network out, as model folders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mambamim_jax import visualise
from mambamim_jax.checks import ConfigError
from mambamim_jax.data.labels import LabelTable
from mambamim_jax.evaluate.labels import probabilities
from mambamim_jax.model.rngs import Rngs
from mambamim_jax.model.segmenter import Segmenter
from mambamim_jax.settings_finetune import FinetuneConfig
from mambamim_jax.settings_model import EncoderConfig
from mambamim_jax.train.build import build_segmenter, check_scan, to_dicts
from mambamim_jax.train.checkpoint import open_checkpoints
from mambamim_jax.train.labelled_data import LabelledData, make_loader, prepare_labelled, read_labels
from mambamim_jax.train.loop import train
from mambamim_jax.train.losses import segmentation_loss, targets_of
from mambamim_jax.train.optim import paths, under
from mambamim_jax.train.processes import first_alone
from mambamim_jax.train.progress import Terminal
from mambamim_jax.train.resume import planned
from mambamim_jax.train.sharding import make_placement
from mambamim_jax.train.step import Batch, Task
from mambamim_jax.train.summary import Outcome
from mambamim_jax.train.validation import HeldOut, without_heads
from mambamim_jax.train.volumes import same_volumes
from mambamim_jax.train.weights import load_start
from mambamim_jax.train.workdir import claimed
from mambamim_jax.types import Array, NumpyArray, Tree

TITLES = ("input", "label", "prediction", "error")
UNREAD = ("encoder/mamba/mask_token",)
"""Parameters that nothing reads where nothing is masked."""
VALIDATIONS = 10
"""In a run, unless the settings give an interval."""


def finetune(config: FinetuneConfig, workdir: Path, terminal: Terminal | None = None) -> Outcome:
    """Prepares the data, trains, validates, and leaves everything in the workdir; continues a run that is there.

    Raises:
      ConfigError, DatasetError, DataLossError, StoreError: one line on what is wrong, before any training.
      NonFiniteError: the run broke; the last good checkpoint stays.
    """
    terminal = terminal or Terminal(quiet=jax.process_index() > 0)
    check_scan(config.model)
    placement = make_placement(config.mesh, config.data.batch // config.optim.accumulate)
    with claimed(workdir, terminal.say), open_checkpoints(workdir, config, terminal.say) as checkpoints:
        new = not checkpoints.steps()

        def read() -> tuple[dict[str, NumpyArray], LabelledData]:
            table = read_labels(config, workdir)
            weights = start(config, table, terminal) if new else {}
            return weights, prepare_labelled(config, table, workdir, terminal, goes_on=not new)

        loaded, data = first_alone("data", read)
        loader = make_loader(config, data, placement.rows(config.data.batch))
        same_volumes(loader, workdir, checkpoints)
        steps, _ = planned(config, loader.batches_per_epoch, checkpoints.newest())
        task = segment_task(config, data, workdir, terminal, steps)
        task = dataclasses.replace(task, loaded=loaded)
        return train(task, loader, config, workdir, checkpoints, terminal, placement)


def start(config: FinetuneConfig, table: LabelTable, terminal: Terminal) -> dict[str, NumpyArray]:
    """The parameters that ``config.init`` gives, with a report; none without it.

    Raises: ConfigError if they don't fit, or if what is to stay frozen isn't there or is everything.
    """
    build = lambda: build_segmenter(config.model, table.classes, Rngs(0), len(table.channels))  # noqa: E731
    shapes = {name: leaf.shape for name, leaf in paths(to_dicts(nnx.eval_shape(build))[0]).items()}
    for prefix in config.freeze:
        if not any(under(name, (prefix,)) for name in shapes):
            tops = ", ".join(sorted({name.split("/")[0] for name in shapes}))
            raise ConfigError(
                "config.freeze", f"no part {prefix!r}", f"a path that begins with one of {tops}"
            )
    if all(under(name, (*UNREAD, *config.freeze)) for name in shapes):
        expected = "a part of the network that is left to be trained"
        raise ConfigError("config.freeze", f"found {config.freeze}, which is all of it", expected)
    if not config.init:
        return {}
    loaded, report = load_start(config.init, shapes, partial=config.init_partial)
    terminal.say(str(report))
    return loaded


def segment_task(
    config: FinetuneConfig, data: LabelledData, workdir: Path, terminal: Terminal, steps: int
) -> Task:
    """Segmentation of the data set's labels, or of its regions."""
    table, channels = data.table, len(data.table.channels)
    regions = [region.labels for region in table.regions]
    build = partial(build_segmenter, config.model, table.classes, in_channels=channels)
    graph, plain = (graph_of(partial(build, deep=deep)) for deep in (None, False))

    def init(key: Array) -> tuple[Tree, Tree]:
        return to_dicts(build(Rngs(key)))

    def loss(params: Tree, stats: Tree, batch: Batch, key: Array) -> tuple[Array, Tree]:
        target = targets_of(batch["label"], table.classes, regions)
        outputs: tuple[Array, ...] = nnx.merge(graph, params).supervised(batch["image"])
        options = {"overlapping": bool(regions), **dataclasses.asdict(config.loss)}
        terms = [
            0.5**n * segmentation_loss(output, target[:, :: 2**n, :: 2**n, :: 2**n], **options)
            for n, output in enumerate(outputs)
        ]
        return sum(terms, jnp.zeros(())) / sum(0.5**n for n in range(len(outputs))), stats

    def predict(params: Tree, x: Array) -> Array:
        return probabilities(nnx.merge(plain, params)(x), regions)  # type: ignore[arg-type]

    def panel(params: Tree, stats: Tree, batch: Batch, key: Array) -> dict[str, Array]:
        logits = nnx.merge(plain, without_heads(params))(batch["image"])
        return pictures(batch["image"], batch["label"], decided(logits, table), data)

    validation = HeldOut(
        data, predict, config.data.crop, config.validation, interval(config, steps),
        describe(config, data), workdir, terminal.say,
    )  # fmt: skip
    return Task(
        "Fine-tuning",
        init,
        loss,
        panel=panel,
        titles=TITLES,
        inputs=("image", "label"),
        unused_parameters=(*UNREAD, *config.freeze),
        rate_scales=layer_scales(config.model, config.layer_decay),
        ema=config.ema,
        validation=validation,
        description=summary(config, data),
    )


def graph_of(build: Callable[[nnx.Rngs], Segmenter]) -> nnx.GraphDef:
    """The network without its parameters."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(Rngs(0))), nnx.Param)
    return graph


def interval(config: FinetuneConfig, steps: int) -> int:
    """Steps between two validations."""
    return config.validation.every or max(1, math.ceil(steps / VALIDATIONS))


def layer_scales(model: EncoderConfig, decay: float) -> tuple[tuple[str, float], ...]:
    """(path prefix, factor) of each layer of the encoder: ``decay`` to the number of layers above it, the decoder
    being the last; a skip or a lift counts as the layer that it is computed from."""
    if decay == 1:
        return ()
    mamba = model.hymamba.mamba_depth if model.encoder == "hymamba" else model.vision_mamba.mamba_depth
    if model.encoder == "hymamba":
        layers = {"stem": 0} | {
            f"{part}/{n}": n + 1 for n in range(4) for part in ("expand", "skips", "stages")
        }
        layers |= {f"mamba/layers/{n}": n + 5 for n in range(mamba)}
    else:
        layers = {"embed": 0, "skips": 0} | {f"mamba/layers/{n}": n + 1 for n in range(mamba)}
        taps = model.vision_mamba.feature_depths
        layers |= {f"lifts/{n}": taps[2 - n] for n in range(3)}
    top = max(layers.values()) + 1
    return tuple((f"encoder/{name}", decay ** (top - layer)) for name, layer in layers.items())


def decided(logits: Array, table: LabelTable) -> Array:
    """Label values (b, h, w, d) as ``evaluate.labels.decide`` gives them, within a jitted function."""
    if not table.regions:
        return jnp.argmax(logits, axis=-1)
    values = jnp.zeros(logits.shape[:-1], jnp.int32)
    for channel, region in enumerate(table.regions):
        values = jnp.where(logits[..., channel] >= 0, region.writes, values)
    return values


def pictures(image: Array, label: Array, found: Array, data: LabelledData) -> dict[str, Array]:
    """What a panel shows: the first channel, label and prediction over it, wrong voxels."""
    grey = image[..., 0]
    if data.normalisation[0]["kind"] == "zscore":
        grey = (grey + 2.0) / 4.0
    grey = jnp.clip(grey, 0.0, 1.0)
    colours = jnp.asarray(visualise.label_colours(len(data.table.names)))

    def over(values: Array) -> Array:
        mixed = 0.5 * grey[..., None] + 0.5 * colours[values.astype(jnp.int32)]
        return jnp.where((values > 0)[..., None], mixed, grey[..., None])

    wrong = (found != label).astype(jnp.float32)
    return dict(zip(TITLES, (grey, over(label), over(found), wrong)))


def describe(config: FinetuneConfig, data: LabelledData) -> dict[str, Any]:
    """The description of the model that this run makes, see ``model_files.save_model``."""
    model, table = config.model, data.table
    own = getattr(model, model.encoder)
    finest = own.channels[1] if model.encoder == "hymamba" else own.channels[0]
    return {
        "task": "segment",
        "encoder": model.encoder,
        "encoder_config": dataclasses.asdict(own),
        "in_channels": len(table.channels),
        "channel_names": table.channels,
        "normalisation": data.normalisation,
        "spacing": config.data.spacing,
        "crop": config.data.crop,
        "classes": table.classes,
        "head_width": model.head_width or finest // 2,
        "labels": {str(value): name for value, name in enumerate(table.names)},
        "regions": [dataclasses.asdict(region) for region in table.regions] or None,
        "dtype": model.dtype,
        "training": {
            "data": Path(config.data.source).name,
            "cases": len(data.train),
            "held-out cases": len(data.held_out),
            "start": Path(config.init).name if config.init else "random numbers",
        },
    }


def summary(config: FinetuneConfig, data: LabelledData) -> tuple[str, ...]:
    """Lines for the summary."""
    began = f"from {config.init}" if config.init else "from scratch"
    return (
        f"{config.model.encoder} encoder, {config.model.dtype}, {began}; {len(data.train)} cases",
        f"{len(data.table.foreground)} classes: {', '.join(data.table.foreground)}",
        f"held out: {len(data.held_out)} cases, see validation.jsonl; models in best and last",
    )
