"""Everything that can be set, as frozen dataclasses: the one place of a key, its default and its meaning.

The defaults are the paper's recipe. Whatever is wrong is a ``ConfigError``: one line that names the key, what
was found, what was expected and what to do, raised before any work.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mambamim_jax.types import Size3, Spacing

STRIDE = 16
PHANTOMS = "phantoms"


class ConfigError(ValueError):
    """A setting that cannot be used. ``exit_code`` is what the launch scripts end with."""

    exit_code = 2

    def __init__(self, key: str, found: str, expected: str, advice: str = ""):
        super().__init__(f"{key}: {found}; expected {expected}" + (f"; {advice}" if advice else ""))


def _require(ok: bool, key: str, found: object, expected: str, advice: str = "") -> None:
    if not ok:
        raise ConfigError(f"config.{key}", f"found {found!r}", expected, advice)


def _one_of(key: str, found: str, choices: Sequence[str]) -> None:
    _require(found in choices, key, found, "one of " + ", ".join(choices), did_you_mean(found, choices))


def did_you_mean(found: str, choices: Sequence[str]) -> str:
    """A hint at the choice nearest to what was found, or nothing."""
    close = difflib.get_close_matches(found, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else ""


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
            _require(self.source != "", f"{key}.source", self.source, "a folder with CT volumes", advice)
            for source in self.sources:
                found = Path(source).expanduser()
                usable = found.is_dir() or (found.is_file() and found.suffix == ".json")
                _require(usable, f"{key}.source", source, "an existing folder or Decathlon .json", advice)
        _require(self.phantoms > 0, f"{key}.phantoms", self.phantoms, "at least 1")
        _require(min(self.spacing) > 0, f"{key}.spacing", self.spacing, "three positive lengths in mm")
        _require(
            self.window[0] < self.window[1], f"{key}.window", self.window, "(low, high) in HU, low < high"
        )
        check_crop(self.crop, f"{key}.crop")
        for name in ("crops_per_volume", "volumes_per_batch"):
            _require(getattr(self, name) > 0, f"{key}.{name}", getattr(self, name), "at least 1")
        _require(0 <= self.max_lost <= 1, f"{key}.max_lost", self.max_lost, "a share in [0, 1]")
        for name in ("workers", "threads", "processes"):
            _require(getattr(self, name) >= 0, f"{key}.{name}", getattr(self, name), "0 or more")

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

        Raises: ConfigError if they are not written as they should be.
        """
        weights: dict[str, float] = {}
        for part in filter(str.strip, self.weights.split(",")):
            name, _, number = part.rpartition("=")
            try:
                weights[name.strip()] = float(number)
            except ValueError:
                name = ""
            _require(name.strip() != "", key, part, "NAME=NUMBER", "such as --config.data.weights=A=3,B=1")
        return weights or None


def check_flip(flip: tuple[float, float, float], key: str) -> None:
    """Raises ConfigError unless these are three probabilities."""
    _require(all(0 <= p <= 1 for p in flip), key, flip, "three probabilities in [0, 1]")


def check_crop(crop: Size3, key: str) -> None:
    """Raises ConfigError unless every side is a positive multiple of the stride."""
    near: tuple[int, ...] = tuple(max(1, round(side / STRIDE)) * STRIDE for side in crop)
    ok = all(side > 0 and side % STRIDE == 0 for side in crop)
    _require(ok, key, crop, f"sides divisible by the stride {STRIDE}", f"try {near}")


@dataclass(frozen=True)
class HyMambaConfig:
    """MedNeXt stages, then Mamba layers on the kept tokens."""

    channels: tuple[int, ...] = (32, 64, 128, 192, 384)
    depths: tuple[int, ...] = (2, 2, 2, 1)
    expansion: tuple[int, ...] = (2, 4, 4, 4)
    mamba_depth: int = 4
    state: int = 16

    def check(self, key: str) -> None:
        for name, length in (("channels", 5), ("depths", 4), ("expansion", 4)):
            value = getattr(self, name)
            ok = len(value) == length and all(item > 0 for item in value)
            _require(ok, f"{key}.{name}", value, f"{length} positive integers")
        check_width(self.channels[-1], f"{key}.channels", self.channels, "the last width")
        _require(self.mamba_depth > 0, f"{key}.mamba_depth", self.mamba_depth, "at least 1")
        _require(self.state > 0, f"{key}.state", self.state, "at least 1")


@dataclass(frozen=True)
class VisionMambaConfig:
    """A 16³ patch embedding, Mamba layers only, features of several depths lifted to a pyramid."""

    channels: tuple[int, ...] = (64, 128, 192, 384, 384)
    """Widths of the maps at strides 1, 2, 4, 8, 16; the last is the width of the tokens."""
    mamba_depth: int = 12
    feature_depths: tuple[int, ...] = (3, 6, 9, 12)
    """After which layers the maps at strides 2, 4, 8, 16 are taken."""
    state: int = 16

    def check(self, key: str) -> None:
        ok = len(self.channels) == 5 and all(item > 0 for item in self.channels)
        _require(ok, f"{key}.channels", self.channels, "5 positive integers")
        check_width(self.channels[-1], f"{key}.channels", self.channels, "the last width")
        taken, last = self.feature_depths, self.mamba_depth
        ok = len(taken) == 4 and sorted({*taken}) == [*taken] and taken[0] > 0 and taken[-1] == last
        expected = f"four increasing layers, the last of them mamba_depth, {last}"
        _require(ok, f"{key}.feature_depths", taken, expected)
        _require(self.state > 0, f"{key}.state", self.state, "at least 1")


def check_width(width: int, key: str, found: object, what: str) -> None:
    """Raises ConfigError unless a token width suits the 3D sine-cosine position embedding."""
    expected = f"{what} divisible by 6 (3D sine-cosine position embedding)"
    _require(width > 0 and width % 6 == 0, key, found, expected, f"try {max(1, round(width / 6)) * 6}")


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder, which pre-training and fine-tuning share."""

    encoder: str = "hymamba"
    hymamba: HyMambaConfig = field(default_factory=HyMambaConfig)
    vision_mamba: VisionMambaConfig = field(default_factory=VisionMambaConfig)
    dtype: str = "float32"
    """Compute type; the scan, the statistics of norms and the loss are always in float32."""
    scan: str = "auto"

    def check(self, key: str) -> None:
        _one_of(f"{key}.encoder", self.encoder, ("hymamba", "vision_mamba"))
        _one_of(f"{key}.dtype", self.dtype, ("float32", "bfloat16"))
        scans = ("auto", "reference", "associative", "sequential", "pallas_triton", "pallas_mosaic")
        _one_of(f"{key}.scan", self.scan, scans)


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The encoder, and the decoder that reconstructs hidden patches."""

    filler: str = "toki"
    """What stands in for hidden tokens at the deepest scale."""
    decoder_width: int = 768
    mask_ratio: float = 0.75

    def check(self, key: str) -> None:
        super().check(key)
        fillers = ("toki", "toki_paper", "toki_scrambled", "linear", "learned_token")
        _one_of(f"{key}.filler", self.filler, fillers)
        width, advice = self.decoder_width, f"try {max(1, round(self.decoder_width / 16)) * 16}"
        ok = width > 0 and width % 16 == 0
        _require(ok, f"{key}.decoder_width", width, "a width divisible by 16 (halved four times)", advice)


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
        _require(self.learning_rate > 0, f"{key}.learning_rate", self.learning_rate, "a positive number")
        _require(0 <= self.warmup < 1, f"{key}.warmup", self.warmup, "a share of the run in [0, 1)")
        for name in ("weight_decay", "weight_decay_end"):
            _require(getattr(self, name) >= 0, f"{key}.{name}", getattr(self, name), "zero or more")
        _require(
            all(0 <= beta < 1 for beta in self.betas), f"{key}.betas", self.betas, "two numbers in [0, 1)"
        )
        _require(self.eps > 0, f"{key}.eps", self.eps, "a positive number")
        _require(self.clip_norm > 0, f"{key}.clip_norm", self.clip_norm, "a positive number or inf")
        _require(self.accumulate > 0, f"{key}.accumulate", self.accumulate, "at least 1")


@dataclass(frozen=True)
class LogConfig:
    """What a person sees, and how often (in steps)."""

    every: int = 10
    """A line on the terminal (where it is no TTY) and TensorBoard scalars; metrics.jsonl has every step."""
    panel_every: int = 500

    def check(self, key: str) -> None:
        _require(self.every > 0, f"{key}.every", self.every, "at least 1")
        _require(self.panel_every > 0, f"{key}.panel_every", self.panel_every, "at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved (in steps) and which of the saves are kept."""

    every: int = 500
    keep: int = 3
    """The newest ones kept."""
    keep_every: int = 0
    """Besides, every checkpoint whose step is a multiple of this; 0 for none."""

    def check(self, key: str) -> None:
        _require(self.every > 0, f"{key}.every", self.every, "at least 1")
        _require(self.keep > 1, f"{key}.keep", self.keep, "at least 2, so that a damaged one can be replaced")
        _require(self.keep_every >= 0, f"{key}.keep_every", self.keep_every, "zero or more")


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged. Their number is the product; one of the sizes may be -1: what is left."""

    data: int = -1
    """Divides the batch."""
    fsdp: int = 1
    """Divides the batch, and the parameters and their moments."""
    model: int = 1
    """Divides the widths of convolutions and Mamba layers."""

    def check(self, key: str) -> None:
        sizes = (self.data, self.fsdp, self.model)
        for name, size in zip(("data", "fsdp", "model"), sizes):
            _require(size > 0 or size == -1, f"{key}.{name}", size, "at least 1, or -1 for what is left")
        _require(sizes.count(-1) < 2, key, sizes, "at most one -1")


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
            _require(getattr(self, name) > 0, f"{key}.{name}", getattr(self, name), "at least 1 second")
        _require(self.patience >= 0, f"{key}.patience", self.patience, "seconds, or 0 for never")


@dataclass(frozen=True)
class RunConfig:
    """What the training loop needs to know, whatever it trains."""

    seed: int = 0
    epochs: int = 100
    """Passes over the volumes; 0 where ``steps`` is given."""
    steps: int = 0
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
        "epochs",
        "steps",
        "resume",
        "remat",
        "log",
        "checkpoint",
        "mesh",
        "distributed",
    )
    """Keys and sections that may differ when a run is continued."""

    def check(self, key: str) -> None:
        _require(0 <= self.seed < 2**31, "seed", self.seed, "an integer in [0, 2^31)")
        ok = (self.steps > 0) != (self.epochs > 0) and min(self.steps, self.epochs) == 0
        expected = "one of config.steps and config.epochs positive, the other 0"
        _require(ok, "steps", self.steps, expected, f"config.epochs is {self.epochs}, set one to 0")
        _one_of("resume", self.resume, ("auto", "never", "must"))
        _one_of("remat", self.remat, ("none", "dots"))

    def total_steps(self, batches_per_epoch: int) -> int:
        """Updates of the whole run."""
        return self.steps or self.epochs * batches_per_epoch


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
        _require(0 < kept < tokens, "model.mask_ratio", ratio, expected, "the paper uses 0.75")
        advice = f"a batch is data.crops_per_volume x data.volumes_per_batch = {self.data.batch} crops"
        ok = self.data.batch % self.optim.accumulate == 0
        _require(ok, "optim.accumulate", self.optim.accumulate, "a divisor of the batch", advice)


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
