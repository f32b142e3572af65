"""Presets of preprocessing CT volumes into a store; the keys are in ``mambamim_jax/settings_data.py``."""

from mambamim_jax.config import ConfigDict, defaults, unknown_preset
from mambamim_jax.settings_data import PreprocessConfig


def get_config(preset: str = "fast") -> ConfigDict:
    """Preprocess every CT of one or several sources once, into a store that pretrain.py takes as its source.

    fast: NumPy files, for sets that fit the page cache.

        python launch/preprocess.py --config=configs/data.py --source=FOLDER[,FOLDER…] --store=STORE

    compact: Blosc2 files (pip install blosc2), about half of the size, for everything larger.

        python launch/preprocess.py --config=configs/data.py:compact --source=FOLDER --store=STORE

    Run a command again to continue where it was stopped, or with another source to add to the store.
    STORE/report holds one line per volume, and a page to judge the set by.
    """
    config = defaults(PreprocessConfig)
    if preset == "compact":
        config.encoding = "blosc2"
    elif preset != "fast":
        raise unknown_preset(preset, ("fast", "compact"))
    return config
