"""Everything that can be set of fine-tuning: the one place of a key, its default and its meaning.

The defaults are the published recipe (Tang et al. and MONAI's UNETR on BTCV): 1.5 mm, 96³ crops, pos:neg 1:1, four a
volume, Dice and cross-entropy, AdamW 1e-4 with decay 1e-5, 50 of 500 epochs of warm-up and a cosine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mambamim_jax.checks import MOST_OVERLAP, one_of, require
from mambamim_jax.data.augment import Augmentation
from mambamim_jax.paths import home
from mambamim_jax.settings import OptimConfig, RunConfig, VolumeConfig, check_flip, check_space
from mambamim_jax.settings_model import EncoderConfig


@dataclass(frozen=True)
class FinetuneDataConfig(VolumeConfig):
    """A labelled data set in nnU-Net's raw format, its split, and the crops drawn from it."""

    max_lost: float = 0.0
    """Cases that cannot be used stop a run; a share of the split may be given up."""
    volumes_per_batch: int = 1
    normalisation: str = "auto"
    """window (CT), zscore (MRI: over each channel's non-zero voxels), or auto: by the channels' names."""
    positive: float = 0.5
    """Share of crops centred on a class; the others are anywhere in the body."""
    splits: str = ""
    """A file like nnU-Net's splits_final.json; empty: the source's own if it has one, else a random split."""
    fold: int = 0
    held_out: float = 0.2
    """Share of the cases held out by a random split."""
    split_seed: int = 0
    label_fraction: float = 1.0
    """Share of the training cases that is used, drawn by split_seed; a smaller one is part of a larger one."""
    labels: tuple[str, ...] = ()
    """Names of the values 1, 2, … that dataset.json must have; empty for whatever it has."""

    def check(self, key: str) -> None:
        super().check(key)
        require(len(self.sources) == 1, f"{key}.source", self.source, "one data set")
        one_of(f"{key}.normalisation", self.normalisation, ("auto", "window", "zscore"))
        require(0 <= self.positive <= 1, f"{key}.positive", self.positive, "a share in [0, 1]")
        ok = not self.splits or home(self.splits).is_file()
        require(ok, f"{key}.splits", self.splits, "an existing file, or nothing")
        require(self.fold >= 0, f"{key}.fold", self.fold, "0 or more")
        require(0 < self.held_out < 1, f"{key}.held_out", self.held_out, "a share between 0 and 1")
        require(self.split_seed >= 0, f"{key}.split_seed", self.split_seed, "0 or more")
        share = self.label_fraction
        require(0 < share <= 1, f"{key}.label_fraction", share, "a share above 0, at most 1")


@dataclass(frozen=True)
class AugmentConfig(Augmentation):
    """Probabilities and ranges of augmentations, see ``data.augment``."""

    def check(self, key: str) -> None:
        check_flip(self.flip, f"{key}.flip")
        for name in (
            "rotate",
            "intensity_scale",
            "intensity_shift",
            "zoom",
            "noise",
            "blur",
            "low_resolution",
        ):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{key}.{name}", value, "a probability in [0, 1]")
        for name in ("zoom_range", "blur_sigma", "low_resolution_range"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"{key}.{name}", (low, high), "(low, high), above 0, low first")
        high = self.low_resolution_range[1]
        require(high <= 1, f"{key}.low_resolution_range", self.low_resolution_range, "shares of at most 1")
        require(self.noise_std >= 0, f"{key}.noise_std", self.noise_std, "zero or more")


@dataclass(frozen=True)
class SegmenterConfig(EncoderConfig):
    """The encoder and the UNETR decoder."""

    head_width: int = 0
    """Width of the last residual block; 0 for half the finest map of the encoder, as published."""
    deep_supervision: bool = False
    """Further losses on predictions at strides 2 and 4, weighted 1/2 and 1/4; they don't stay in the model."""

    def check(self, key: str) -> None:
        super().check(key)
        require(self.head_width >= 0, f"{key}.head_width", self.head_width, "a width, or 0")


@dataclass(frozen=True)
class LossConfig:
    """Dice and cross-entropy, added with these weights."""

    dice: float = 1.0
    cross_entropy: float = 1.0
    background: bool = False
    """Whether the Dice term counts the background as a class; the cross-entropy always does."""
    background_weight: float = 1.0
    """Of background voxels in the cross-entropy (labels, not regions): below 1, small organs are found sooner."""
    batch: bool = False
    """Dice of a whole (micro-)batch at once rather than of each crop: steadier where a crop holds few classes."""

    def check(self, key: str) -> None:
        ok = self.dice >= 0 and self.cross_entropy >= 0 and self.dice + self.cross_entropy > 0
        require(ok, f"{key}.dice", self.dice, "weights of zero or more, not both zero")
        weight = self.background_weight
        require(weight > 0, f"{key}.background_weight", weight, "a positive number")


@dataclass(frozen=True)
class ValidationConfig:
    """Sliding-window prediction of the whole held-out volumes, and its Dice."""

    every: int = 0
    """Steps; 0 for ten times in a run. The last step always counts."""
    cases: int = 0
    """The first so many held-out cases; 0 for all."""
    overlap: float = 0.5
    batch: int = 4
    """Windows at a time."""

    def check(self, key: str) -> None:
        for name in ("every", "cases"):
            require(getattr(self, name) >= 0, f"{key}.{name}", getattr(self, name), "0 or more")
        expected = f"a share of the window from 0 to {MOST_OVERLAP}"
        require(0 <= self.overlap <= MOST_OVERLAP, f"{key}.overlap", self.overlap, expected)
        require(self.batch > 0, f"{key}.batch", self.batch, "at least 1")


def _recipe() -> OptimConfig:
    return OptimConfig(learning_rate=1e-4, warmup=0.1, weight_decay=1e-5, weight_decay_end=1e-5)


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Everything that determines a fine-tuning run."""

    epochs: int = 500
    init: str = ""
    """What the network starts from: a pre-training workdir, weights of the released code (.pth, .npz,
    .safetensors), a model folder or fine-tuning workdir of ours; empty for random numbers."""
    init_partial: bool = False
    """Take what fits of weights of another network, where a misfit is otherwise an error."""
    freeze: tuple[str, ...] = ()
    """Parts of the network that stay as they are, such as encoder or encoder/stem."""
    layer_decay: float = 1.0
    """Learning rate of each layer of the encoder over that of the layer above it."""
    ema: float = 0.0
    """Decay of a moving average of the parameters, which is then what is validated and kept; 0 for none."""
    optim: OptimConfig = field(default_factory=_recipe)
    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: SegmenterConfig = field(default_factory=SegmenterConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    harmless: ClassVar[tuple[str, ...]] = (
        *RunConfig.harmless,
        *(
            f"data.{name}"
            for name in ("source", "format", "store", "splits", "max_lost", "workers", "threads", "processes")
        ),
        "init",
        "init_partial",
        "model.scan",
        "validation.batch",
    )

    def check(self, key: str) -> None:
        super().check(key)
        ok = not self.init or home(self.init).exists()
        advice = "or leave it empty to train from scratch"
        require(ok, "init", self.init, "an existing file or folder of weights", advice)
        require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "a factor above 0, at most 1")
        require(0 <= self.ema < 1, "ema", self.ema, "a decay in [0, 1)")
        advice = f"a batch is data.crops_per_volume x data.volumes_per_batch = {self.data.batch} crops"
        ok = self.data.batch % self.optim.accumulate == 0
        require(ok, "optim.accumulate", self.optim.accumulate, "a divisor of the batch", advice)
        check_space(self.mesh, self.data.crop)
