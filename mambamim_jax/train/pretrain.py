"""Masked-image-modelling pre-training: settings in, a trained encoder out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from mambamim_jax.checks import ConfigError
from mambamim_jax.data import phantom, store
from mambamim_jax.data.loader import PretrainLoader
from mambamim_jax.data.mix import Mix
from mambamim_jax.model.mask import draw_mask, patchify, unpatchify
from mambamim_jax.model.mim import MaskedImageModel
from mambamim_jax.model.rngs import Rngs
from mambamim_jax.paths import home
from mambamim_jax.settings import PHANTOMS, STRIDE, PretrainConfig
from mambamim_jax.settings_model import ModelConfig
from mambamim_jax.train.build import batch_stats, build_mim, check_scan, to_dicts
from mambamim_jax.train.checkpoint import open_checkpoints
from mambamim_jax.train.feed import window
from mambamim_jax.train.loop import train
from mambamim_jax.train.losses import patch_statistics, reconstruction_loss
from mambamim_jax.train.processes import first_alone
from mambamim_jax.train.progress import Terminal
from mambamim_jax.train.sharding import make_placement
from mambamim_jax.train.step import Batch, Task
from mambamim_jax.train.summary import Outcome
from mambamim_jax.train.volumes import same_volumes
from mambamim_jax.train.workdir import claimed
from mambamim_jax.types import Array, Tree

TITLES = ("input", "masked", "reconstruction", "absolute error")


def pretrain(config: PretrainConfig, workdir: Path, terminal: Terminal | None = None) -> Outcome:
    """Prepares the data, trains, and leaves everything in the workdir; continues a run that is there.

    Raises:
      ConfigError, DatasetError, DataLossError, StoreError: one line on what is wrong, before any training.
      NonFiniteError: the run broke; the last good checkpoint stays.
    """
    terminal = terminal or Terminal(quiet=jax.process_index() > 0)
    check_scan(config.model)
    placement = make_placement(config.mesh, config.data.batch // config.optim.accumulate)
    task = mim_task(config)
    placement.shardings(jax.eval_shape(task.init, jax.random.key(0))[0])  # refuses what does not divide
    with claimed(workdir, terminal.say), open_checkpoints(workdir, config, terminal.say) as checkpoints:
        rows = placement.rows(config.data.batch)
        loader = first_alone("data", lambda: prepare_data(config, workdir, terminal, rows))
        same_volumes(loader, workdir, checkpoints)
        return train(task, loader, config, workdir, checkpoints, terminal, placement)


def prepare_data(
    config: PretrainConfig, workdir: Path, terminal: Terminal, rows: range | None = None
) -> PretrainLoader:
    """Volumes found or made, preprocessed into the store, and the loader of some rows of its batches."""
    data = config.data
    sources = [home(source) for source in data.sources]
    if data.source == PHANTOMS:
        sources = [phantom.write_phantoms(workdir / "phantoms", seed=config.seed, count=data.phantoms)]
    check_weights(sources, data.mixture())
    with terminal.counting("Preparing volumes") as progress:
        prepared = store.open_or_prepare(
            sources,
            home(data.store) if data.store else workdir / "store",
            format=data.format,
            spacing=data.spacing,
            window=data.window,
            report_path=None if jax.process_index() else workdir / "data_report.jsonl",
            max_lost=data.max_lost,
            old_labels=True,
            workers=data.workers or None,
            progress=progress,
        )
    terminal.say(prepared.summary)
    try:
        return PretrainLoader(
            prepared,
            crop=data.crop,
            crops_per_volume=data.crops_per_volume,
            volumes_per_batch=data.volumes_per_batch,
            flip=data.flip,
            window=data.window,
            seed=config.seed,
            rows=rows,
            threads=data.threads,
            workers=data.processes,
            weights=data.mixture(),
            dtype="int16",  # windowed on the device, see mim_task
        )
    except ValueError as error:
        raise ConfigError("config.data", str(error), "settings that fit the data") from error


def check_weights(sources: Sequence[Path], weights: Mapping[str, float] | None) -> None:
    """Raises ConfigError unless every source has a weight, and every weight a source; a store's are known later."""
    if not any(store.is_store(source) for source in sources):
        try:
            Mix.of([str(source) for source in sources], weights)
        except ValueError as error:
            expected = "NAME=NUMBER for each source, NAME its path or the last part of it"
            raise ConfigError("config.data.weights", str(error), expected) from error


def mim_task(config: PretrainConfig) -> Task:
    """Reconstruction of hidden patches."""
    model = config.model
    h, w, d = config.data.crop
    grid = (h // STRIDE, w // STRIDE, d // STRIDE)
    abstract = nnx.eval_shape(lambda: build_mim(model, Rngs(0)))
    graph, *_ = nnx.split(abstract, nnx.Param, nnx.BatchStat)

    def init(key: Array) -> tuple[Tree, Tree]:
        return to_dicts(build_mim(model, Rngs(key)))

    def prepare(batch: Batch, key: Array) -> Batch:
        image = window(batch["image"], config.data.window)
        return batch | {"image": image, "mask": draw_mask(key, len(image), grid, model.mask_ratio)}

    def reconstruct(params: Tree, stats: Tree, batch: Batch) -> tuple[Array, MaskedImageModel]:
        network = nnx.merge(graph, params, stats)
        return network(batch["image"], batch["mask"], train=True), network

    def loss(params: Tree, stats: Tree, batch: Batch, key: Array) -> tuple[Array, Tree]:
        reconstruction, network = reconstruct(params, stats, batch)
        return reconstruction_loss(reconstruction, batch["image"], batch["mask"]), batch_stats(network)

    def panel(params: Tree, stats: Tree, batch: Batch, key: Array) -> dict[str, Array]:
        batch = prepare(batch, key)
        return pictures(reconstruct(params, stats, batch)[0], batch)

    unused = abstract.unused_parameters
    return Task("Pre-training", init, loss, prepare, panel, TITLES, unused, description=describe(model))


def pictures(reconstruction: Array, batch: Batch) -> dict[str, Array]:
    """What a panel shows of each crop, all (b, h, w, d) in [0, 1].

    Returns:
      The input; the input with hidden patches NaN; the visible patches with the predicted ones beside, which
      get back the mean and deviation of the patch that they stand for; the absolute difference to the input.
    """
    image, mask = batch["image"], batch["mask"]
    mean, deviation = patch_statistics(patchify(image, STRIDE))
    predicted = unpatchify(patchify(reconstruction, STRIDE) * deviation + mean, mask.grid, STRIDE)
    visible = mask.upsampled(STRIDE)[..., None]
    shown = jnp.where(visible, image, jnp.clip(predicted, 0.0, 1.0))
    parts = (image, jnp.where(visible, image, jnp.nan), shown, jnp.abs(shown - image))
    return {title: part[..., 0] for title, part in zip(TITLES, parts)}


def describe(model: ModelConfig) -> tuple[str, ...]:
    """Lines for the summary."""
    hidden = f"{model.mask_ratio:.0%} of the patches hidden, filled by {model.filler}"
    return (f"{model.encoder} encoder, {model.dtype}; {hidden}",)
