"""Presets of MambaMIM pre-training; the keys and the paper's values: ``mambamim_jax/settings.py``."""

from mambamim_jax.config import ConfigDict, defaults, small_widths, unknown_preset
from mambamim_jax.settings import PHANTOMS, PretrainConfig


def get_config(preset: str = "hymamba_b") -> ConfigDict:
    """Pre-training of an encoder by masked image modelling (Tang et al., arXiv 2408.08070).

    demo: a small HyMamba on generated CT phantoms, no data needed; under 3 minutes on two CPU cores.

        python launch/pretrain.py --config=configs/pretrain.py:demo --workdir=runs/demo

    openkbp: a mid-sized HyMamba on head-and-neck CT in 64³ crops of 3 mm voxels; minutes on one GPU.
    FOLDER: NIfTI files or an nnU-Net raw set.

        python launch/pretrain.py --config=configs/pretrain.py:openkbp --workdir=runs/openkbp \\
            --config.data.source=FOLDER

    openkbp_cpu: the same at a size for two CPU cores, in 32³ crops of 6 mm voxels.

    hymamba_b: the paper's recipe: 96³ crops, 16 a batch, 100 epochs (6,814 CT volumes in the paper); one GPU.
    Add --config.model.dtype=bfloat16 for mixed precision, --config.optim.accumulate=4 for less memory.

        python launch/pretrain.py --config=configs/pretrain.py:hymamba_b --workdir=runs/hymamba_b \\
            --config.data.source=FOLDER

    Every preset takes --config.model.encoder=vision_mamba. Run a command again to continue where it stopped.
    """
    config = defaults(PretrainConfig)
    if preset == "demo":
        config.data.source = PHANTOMS
        # Coarse voxels: a patch then holds anatomy rather than texture, and the loss falls within the demo's minutes.
        config.data.crop, config.data.spacing = (48, 48, 48), (4.0, 4.0, 4.0)
        config.data.crops_per_volume, config.data.volumes_per_batch = 1, 2
        config.epochs, config.steps = 0, 120
        small_widths(config)
        config.model.decoder_width = 64
        # Fast enough to see the loss fall, and slow enough that bfloat16 keeps to within 1% of its losses.
        config.optim.learning_rate, config.optim.warmup = 7e-4, 0.1
        config.log.panel_every = config.checkpoint.every = 60
    elif preset == "openkbp_cpu":
        config.data.crop, config.data.spacing = (32, 32, 32), (6.0, 6.0, 6.0)
        config.data.crops_per_volume, config.data.volumes_per_batch = 1, 4
        config.epochs, config.steps = 0, 600
        small_widths(config)
        config.model.decoder_width = 64
        config.model.hymamba.channels = (4, 8, 16, 32, 48)
        config.optim.learning_rate, config.optim.warmup = 2e-3, 0.1
        config.log.panel_every = config.checkpoint.every = 200
    elif preset == "openkbp":
        config.data.crop, config.data.spacing = (64, 64, 64), (3.0, 3.0, 3.0)
        config.data.crops_per_volume, config.data.volumes_per_batch = 1, 16
        config.epochs, config.steps = 0, 5000
        config.model.hymamba.channels = (16, 32, 64, 96, 192)
        config.model.decoder_width = 256
        config.optim.learning_rate, config.optim.warmup = 1e-3, 0.05
        config.log.panel_every = config.checkpoint.every = 500
    elif preset != "hymamba_b":
        raise unknown_preset(preset, ("demo", "openkbp", "openkbp_cpu", "hymamba_b"))
    return config
