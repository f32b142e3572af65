"""Presets of fine-tuning; the keys and the recipe's values are in ``mambamim_jax/settings_finetune.py``."""

from typing import NamedTuple

from mambamim_jax.config import ConfigDict, defaults, small_widths, unknown_preset
from mambamim_jax.data.benchmarks import BENCHMARKS
from mambamim_jax.settings import PHANTOMS
from mambamim_jax.settings_finetune import FinetuneConfig


class Setting(NamedTuple):
    """Where a benchmark leaves the recipe. Its labels, channels and split are in ``data.benchmarks``."""

    window: tuple[float, float] = (-175.0, 250.0)
    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5)
    normalisation: str = "window"
    sided: bool = False
    """Whether labels tell left from right: then crops are not flipped along that axis."""


SETTINGS = {
    "btcv": Setting(sided=True),
    "amos22": Setting(sided=True),
    "ct_org": Setting(),
    "kits23": Setting(),
    "brats21": Setting(spacing=(1.0, 1.0, 1.0), normalisation="zscore"),
    "msd_lung": Setting(window=(-1000.0, 400.0)),
    "msd_spleen": Setting(),
    "msd_hepatic_vessel": Setting(),
    "msd_pancreas": Setting(),
}
OPENKBP = ("brainstem", "spinal_cord", "right_parotid", "left_parotid", "esophagus", "larynx", "mandible")


def get_config(preset: str = "recipe") -> ConfigDict:
    """Segmentation over an encoder: from pre-training, from the authors' weights or from scratch.

    demo: a small HyMamba on generated, labelled CT phantoms; no data needed.

        python launch/finetune.py --config=configs/finetune.py:demo --workdir=runs/demo_finetune

    recipe: the published recipe on any nnU-Net raw data set; 96³ crops at 1.5 mm, 500 epochs; one GPU.

        python launch/finetune.py --config=configs/finetune.py:recipe --workdir=runs/mine \\
            --config.data.source=FOLDER --config.init=WEIGHTS

    openkbp: head and neck, 7 organs, 100 cases train and 20 are held out (the set's own split), at 3 mm, with the
    network of configs/pretrain.py:openkbp; minutes on one GPU. openkbp_cpu: the same at a size for two CPU cores, of
    configs/pretrain.py:openkbp_cpu.

    Benchmarks, prepared by ``python launch/prepare.py NAME``; the recipe but for what is said here. Dice (%) in
    brackets: from scratch → MambaMIM pre-training. These figures come from secondary notes on Tang et al., arXiv
    2408.08070, whose splits they leave open: leads, not results of this code, which has not been run on these sets.

        btcv                 13 abdominal organs, 24 train, 6 held out [77.56 → 80.16; plain Vision Mamba 70.94]
        amos22               15 abdominal organs, CT part, 200 train, 100 held out [no figure in the notes]
        ct_org               6 organs, 119 train, 21 held out [89.42]
        kits23               kidney, tumour, cyst, five folds [67.19]
        brats21              4 MRI sequences, z-score, 1 mm, 3 nested regions, five folds [89.91]
        msd_lung             cancer, five folds; window -1000 to 400 HU, ours [no figure]
        msd_spleen           spleen, five folds [no figure]
        msd_hepatic_vessel   vessel, tumour, five folds [no figure]
        msd_pancreas         pancreas, cancer, five folds [no figure]

    Ours, too: no flips between left and right in btcv, amos22 and openkbp, whose labels tell them apart. A half turn
    and a flip along another axis still make a mirror image of 0.7% of the crops; --config.augment.rotate=0 of none.
    --config.data.fold=N picks a fold. Every preset takes --config.model.encoder=vision_mamba. Run a command
    again to continue where it stopped.
    """
    config = defaults(FinetuneConfig)
    if preset in SETTINGS:
        setting = SETTINGS[preset]
        config.data.labels = BENCHMARKS[preset].foreground
        config.data.window, config.data.spacing = setting.window, setting.spacing
        config.data.normalisation = setting.normalisation
        config.augment.flip = (0.0 if setting.sided else 0.2, 0.2, 0.2)
    elif preset in ("openkbp", "openkbp_cpu"):
        config.data.labels = OPENKBP
        config.augment.flip = (0.0, 0.2, 0.2)
        _openkbp(config, small=preset == "openkbp_cpu")
    elif preset == "demo":
        _demo(config)
    elif preset != "recipe":
        raise unknown_preset(preset, ("recipe", "demo", "openkbp", "openkbp_cpu", *SETTINGS))
    return config


def _openkbp(config: ConfigDict, small: bool) -> None:
    config.epochs = 0
    if small:
        config.data.crop, config.data.spacing = (32, 32, 32), (6.0, 6.0, 6.0)
        config.data.crops_per_volume, config.data.volumes_per_batch, config.data.positive = 1, 4, 1.0
        config.steps, config.optim.learning_rate, config.optim.warmup = 150, 4e-3, 0.05
        # Organs are 2% of a crop: in so few steps an even-handed loss finds nothing but background.
        config.loss.background_weight, config.loss.batch = 0.05, True
        config.validation.every, config.validation.overlap, config.validation.cases = 150, 0.25, 4
        config.log.panel_every = config.checkpoint.every = 150
        small_widths(config)
        config.model.hymamba.channels, config.model.head_width = (4, 8, 16, 32, 48), 8
        return
    config.data.crop, config.data.spacing = (64, 64, 64), (3.0, 3.0, 3.0)
    config.data.crops_per_volume, config.data.volumes_per_batch, config.data.positive = 1, 4, 0.7
    config.steps, config.optim.learning_rate, config.optim.warmup = 1500, 1e-3, 0.05
    config.loss.background_weight, config.loss.batch = 0.2, True
    config.validation.every, config.validation.overlap, config.validation.cases = 500, 0.25, 5
    config.model.hymamba.channels = (16, 32, 64, 96, 192)
    config.log.panel_every = config.checkpoint.every = 500


def _demo(config: ConfigDict) -> None:
    config.data.source, config.data.phantoms = PHANTOMS, 8
    config.data.crop, config.data.spacing = (32, 32, 32), (6.0, 6.0, 6.0)
    config.data.crops_per_volume, config.data.volumes_per_batch = 2, 2
    config.augment.flip = (0.0, 0.0, 0.0)
    config.augment.rotate = 0.0
    config.epochs, config.steps = 0, 100
    config.optim.learning_rate = 3e-3
    config.loss.batch = True
    config.log.panel_every = config.checkpoint.every = config.validation.every = 50
    small_widths(config)
