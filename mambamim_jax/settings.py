"""Everything that can be set, as frozen dataclasses: the one place of a key, its default and its meaning.

Those of the networks are in ``settings_model``, those of fine-tuning in ``settings_finetune``. The defaults are the
paper's recipe. Whatever is wrong is a ``ConfigError``: one line that names the key, what was found, what was expected
and what to do, raised before any work.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

from mambamim_jax.checks import hu_window, one_of, require
from mambamim_jax.paths import home
from mambamim_jax.settings_model import ModelConfig
from mambamim_jax.types import Size3, Spacing

STRIDE = 16
PHANTOMS = "phantoms"


@dataclass(frozen=True)
class VolumeConfig:
    """Volumes, their preparation and how many crops are drawn from them, for pre-training and fine-tuning."""

    source: str = ""
    """A store, or folders (nnU-Net raw, Decathlon JSON or plain NIfTI files) with commas between; or "phantoms"."""
    format: str = "auto"
    store: str = ""
    """Where prepared volumes are kept, to be shared between runs; empty means WORKDIR/store."""
    phantoms: int = 12
    """How many phantom volumes to write where the source is "phantoms"."""
    spacing: Spacing = (1.5, 1.5, 1.5)
    """mm"""
    window: tuple[float, float] = (-175.0, 250.0)
    """HU, scaled to [0, 1]."""
    crop: Size3 = (96, 96, 96)
    """Voxels, each side divisible by the encoder's stride."""
    crops_per_volume: int = 4
    volumes_per_batch: int = 4
    max_lost: float = 0.1
    """The run stops where more than this share of the volumes cannot be used."""
    workers: int = 0
    """Processes that prepare volumes; 0 for one per core, at most eight."""
    threads: int = 2
    """Threads that read crops during training."""
    processes: int = 0
    """Processes that read crops in place of threads; of use with a compact store."""

    def check(self, key: str) -> None:
        if self.source != PHANTOMS:
            advice = f'pass --config.{key}.source=FOLDER, or "{PHANTOMS}" for generated volumes'
            require(self.sources != [], f"{key}.source", self.source, "a folder with CT volumes", advice)
            for source in self.sources:
                found = home(source)
                usable = found.is_dir() or (found.is_file() and found.suffix == ".json")
                require(usable, f"{key}.source", source, "an existing folder or Decathlon .json", advice)
        require(self.phantoms > 0, f"{key}.phantoms", self.phantoms, "at least 1")
        require(min(self.spacing) > 0, f"{key}.spacing", self.spacing, "three positive lengths in mm")
        hu_window(f"{key}.window", self.window)
        check_crop(self.crop, f"{key}.crop")
        for name in ("crops_per_volume", "volumes_per_batch"):
            require(getattr(self, name) > 0, f"{key}.{name}", getattr(self, name), "at least 1")
        require(0 <= self.max_lost <= 1, f"{key}.max_lost", self.max_lost, "a share in [0, 1]")
        for name in ("workers", "threads", "processes"):
            require(getattr(self, name) >= 0, f"{key}.{name}", getattr(self, name), "0 or more")

    @property
    def sources(self) -> list[str]:
        """The parts of ``source``."""
        return [part.strip() for part in self.source.split(",") if part.strip()]

    @property
    def batch(self) -> int:
        """Crops in a global batch."""
        return self.crops_per_volume * self.volumes_per_batch


@dataclass(frozen=True)
class DataConfig(VolumeConfig):
    """The data of pre-training."""

    flip: tuple[float, float, float] = (0.2, 0.2, 0.1)
    """Probability of a flip along each axis."""
    weights: str = ""
    """How often each source is drawn from, as NAME=NUMBER with commas between, NAME being its path or the last
    part of it; empty: every volume equally often."""

    def check(self, key: str) -> None:
        super().check(key)
        check_flip(self.flip, f"{key}.flip")
        self.mixture(f"{key}.weights")

    def mixture(self, key: str = "data.weights") -> dict[str, float] | None:
        """``weights`` as a mapping, None where there are none.

        Raises: ConfigError if they are not written as they should be, or not numbers to draw by.
        """
        weights: dict[str, float] = {}
        for part in filter(str.strip, self.weights.split(",")):
            name, _, number = (text.strip() for text in part.rpartition("="))
            require(name not in weights, key, part, "each name once", "leave one of its weights out")
            try:
                weights[name] = float(number)
            except ValueError:
                name = ""
            require(name != "", key, part, "NAME=NUMBER", "such as --config.data.weights=A=3,B=1")
            require(0 <= weights[name] < math.inf, key, part, "a finite number, zero or more")
        require(not weights or any(weights.values()), key, self.weights, "at least one above zero")
        return weights or None


def check_flip(flip: tuple[float, float, float], key: str) -> None:
    """Raises ConfigError unless these are three probabilities."""
    require(all(0 <= p <= 1 for p in flip), key, flip, "three probabilities in [0, 1]")


def check_crop(crop: Size3, key: str) -> None:
    """Raises ConfigError unless every side is a positive multiple of the stride."""
    near: tuple[int, ...] = tuple(max(1, round(side / STRIDE)) * STRIDE for side in crop)
    ok = all(side > 0 and side % STRIDE == 0 for side in crop)
    require(ok, key, crop, f"sides divisible by the stride {STRIDE}", f"try {near}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and gradient clipping (the paper's recipe)."""

    learning_rate: float = 1e-4
    """Peak; not scaled by the batch."""
    warmup: float = 0.4
    """Share of the run, from 0.5% of the peak up to it; then a cosine down to 0.1%."""
    weight_decay: float = 0.04
    weight_decay_end: float = 0.2
    """Reached by a cosine over the whole run."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 5.0
    accumulate: int = 1
    """Micro-batches per update."""

    def check(self, key: str) -> None:
        require(self.learning_rate > 0, f"{key}.learning_rate", self.learning_rate, "a positive number")
        require(0 <= self.warmup < 1, f"{key}.warmup", self.warmup, "a share of the run in [0, 1)")
        for name in ("weight_decay", "weight_decay_end"):
            require(getattr(self, name) >= 0, f"{key}.{name}", getattr(self, name), "zero or more")
        ok = all(0 <= beta < 1 for beta in self.betas)
        require(ok, f"{key}.betas", self.betas, "two numbers in [0, 1)")
        require(self.eps > 0, f"{key}.eps", self.eps, "a positive number")
        require(self.clip_norm > 0, f"{key}.clip_norm", self.clip_norm, "a positive number or inf")
        require(self.accumulate > 0, f"{key}.accumulate", self.accumulate, "at least 1")


@dataclass(frozen=True)
class LogConfig:
    """What a person sees, and how often (in steps)."""

    every: int = 10
    """A line on the terminal (where it is no TTY) and TensorBoard scalars; metrics.jsonl has every step."""
    panel_every: int = 500
    """A picture of the network's work; and one at the end. 0: none."""

    def check(self, key: str) -> None:
        require(self.every > 0, f"{key}.every", self.every, "at least 1")
        require(self.panel_every >= 0, f"{key}.panel_every", self.panel_every, "at least 1, or 0 for none")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved (in steps) and which of the saves are kept."""

    every: int = 500
    keep: int = 3
    """The newest ones kept."""
    keep_every: int = 0
    """Besides, every checkpoint whose step is a multiple of this; 0 for none."""

    def check(self, key: str) -> None:
        require(self.every > 0, f"{key}.every", self.every, "at least 1")
        require(self.keep > 1, f"{key}.keep", self.keep, "at least 2, so that a damaged one can be replaced")
        require(self.keep_every >= 0, f"{key}.keep_every", self.keep_every, "zero or more")


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged. Their number is the product; data, fsdp or model may be -1: what is left."""

    data: int = -1
    """Divides the batch."""
    fsdp: int = 1
    """Divides the batch, and the parameters and their moments."""
    model: int = 1
    """Divides the widths of convolutions and Mamba layers."""
    space: int = 1
    """Divides every crop along its first axis, for crops too large for one device."""

    def check(self, key: str) -> None:
        sizes = (self.data, self.fsdp, self.model)
        require(self.space > 0, f"{key}.space", self.space, "at least 1")
        apart = f"1 where config.{key}.model is {self.model}: widths and space are not divided together"
        require(1 in (self.model, self.space), f"{key}.space", self.space, apart)
        for name, size in zip(("data", "fsdp", "model"), sizes):
            require(size > 0 or size == -1, f"{key}.{name}", size, "at least 1, or -1 for what is left")
        require(sizes.count(-1) < 2, key, sizes, "at most one -1")


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run. Found by themselves under SLURM, Open MPI and a JobSet (docs/CLUSTER.md)."""

    coordinator: str = ""
    """HOST:PORT of the first process, where no scheduler tells."""
    processes: int = 0
    process: int = -1
    join: int = 300
    """Seconds in which all processes must have found each other."""
    heartbeat: int = 100
    """Seconds after which a process that does not answer counts as dead."""
    patience: float = 3600.0
    """Seconds without a finished step after which a process ends itself, to be started again; 0 for never."""

    def check(self, key: str) -> None:
        for name in ("join", "heartbeat"):
            require(getattr(self, name) > 0, f"{key}.{name}", getattr(self, name), "at least 1 second")
        require(self.patience >= 0, f"{key}.patience", self.patience, "seconds, or 0 for never")


@dataclass(frozen=True)
class RunConfig:
    """What the training loop needs to know, whatever it trains."""

    seed: int = 0
    epochs: int = 100
    """Passes over the volumes, to the end of a batch; 0 where ``steps`` is given."""
    steps: int = 0
    """Updates of the whole run. Where it goes on with another length, the schedules are those of that length."""
    resume: str = "auto"
    """auto: continue the workdir's run if there is one; must; never: refuse a workdir with a run in it."""
    remat: str = "none"
    """What is computed again in the backward pass to save memory: none, or dots: all but convolutions and products."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    harmless: ClassVar[tuple[str, ...]] = (
        *("epochs", "steps", "resume", "remat"),
        *("log", "checkpoint", "mesh", "distributed"),
    )
    """Keys and sections that may differ when a run is continued."""

    def check(self, key: str) -> None:
        require(0 <= self.seed < 2**31, "seed", self.seed, "an integer in [0, 2^31)")
        ok = (self.steps > 0) != (self.epochs > 0) and min(self.steps, self.epochs) == 0
        expected = "one of config.steps and config.epochs positive, the other 0"
        require(ok, "steps", self.steps, expected, f"config.epochs is {self.epochs}, set one to 0")
        one_of("resume", self.resume, ("auto", "never", "must"))
        one_of("remat", self.remat, ("none", "dots"))

    def total_steps(self, batches_per_epoch: Fraction | int) -> int:
        """Updates of the whole run. A batch may end one epoch and begin the next: only the last one is rounded up."""
        return self.steps or math.ceil(self.epochs * batches_per_epoch)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything that determines a pre-training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    harmless: ClassVar[tuple[str, ...]] = (
        *RunConfig.harmless,
        *(
            f"data.{name}"
            for name in ("source", "format", "store", "max_lost", "workers", "threads", "processes")
        ),
        "model.scan",
    )

    def check(self, key: str) -> None:
        super().check(key)
        tokens = math.prod(side // STRIDE for side in self.data.crop)
        kept = round(tokens * (1 - self.model.mask_ratio))
        expected = f"a ratio that hides some but not all of the {tokens} patches of a {self.data.crop} crop"
        ratio = self.model.mask_ratio
        require(0 < kept < tokens, "model.mask_ratio", ratio, expected, "the paper uses 0.75")
        advice = f"a batch is data.crops_per_volume x data.volumes_per_batch = {self.data.batch} crops"
        ok = self.data.batch % self.optim.accumulate == 0
        require(ok, "optim.accumulate", self.optim.accumulate, "a divisor of the batch", advice)
        check_space(self.mesh, self.data.crop)


def check_space(mesh: MeshConfig, crop: Size3) -> None:
    """Refuses a mesh that cannot divide the crops."""
    ok = crop[0] % mesh.space == 0
    require(ok, "mesh.space", mesh.space, f"a divisor of {crop[0]}, data.crop's first side")


def flat(config: RunConfig) -> dict[str, Any]:
    """Settings → {"a.b.c": value}, tuples as lists (as JSON gives them back)."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in flat_items(dataclasses.asdict(config))}


def flat_items(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping with their dotted keys."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
