"""Going on from a checkpoint: what is refused, what is told, and settings of another version of the library."""

from dataclasses import replace

import pytest

from mambamim_jax.checks import ConfigError
from mambamim_jax.settings import LogConfig, PretrainConfig, flat
from mambamim_jax.train.checkpoint import compare
from tests.train.test_loop import Killed, die_at
from tests.train.tiny_run import CONFIG, TinyLoader, run


def test_resume_policies_and_mismatches(tmp_path):
    with pytest.raises(ConfigError, match="resume: found no checkpoint"):
        run(tmp_path, replace(CONFIG, resume="must"))
    with pytest.raises(Killed):
        run(tmp_path, loader=TinyLoader(die_at(5)))
    with pytest.raises(ConfigError, match=r"found a run in .* at step 3"):
        run(tmp_path, replace(CONFIG, resume="never"))
    with pytest.raises(ConfigError, match=r"config.seed, config.optim.clip_norm: found seed 7 \(was 0\)"):
        run(tmp_path, replace(CONFIG, seed=7, optim=replace(CONFIG.optim, clip_norm=1.0)))
    with pytest.raises(ConfigError, match=r"config.data: saved with 'set', this run has 'other'"):
        run(tmp_path, loader=TinyLoader(name="other"))
    outcome, printed = run(tmp_path, replace(CONFIG, steps=4, log=LogConfig(every=1, panel_every=9)))
    assert outcome.step == 4
    assert "config.steps: now 4, was 9" in printed
    assert "the weight decay follow the schedule of the new length" in printed
    assert "config.log.every: now 1, was 2" in printed


def changed(workdir, **changes):
    """What is said of a run whose saved settings differ so; None removes a key."""
    said = []
    saved = {**flat(PretrainConfig()), **{key.replace("__", "."): value for key, value in changes.items()}}
    saved = {key: value for key, value in saved.items() if value is not None}
    compare(saved, PretrainConfig(), workdir, said.append)
    return said


def test_a_key_that_is_newer_than_the_run_had_its_default(tmp_path):
    assert changed(tmp_path, model__scan=None, optim__eps=None, epochs=None) == []
    with pytest.raises(ConfigError, match=r"found seed 0 \(was 3\)"):
        changed(tmp_path, optim__eps=None, seed=3)


def test_keys_of_the_encoder_that_is_not_in_use_may_differ(tmp_path):
    said = changed(tmp_path, model__vision_mamba__state=8)
    assert said == ["config.model.vision_mamba.state: now 16, was 8 when the run was saved"]
    with pytest.raises(ConfigError, match=r"found model.hymamba.state 16 \(was 8\)"):
        changed(tmp_path, model__hymamba__state=8)
    with pytest.raises(ConfigError, match=r"found model.encoder 'hymamba' \(was 'vision_mamba'\)"):
        changed(tmp_path, model__encoder="vision_mamba")


def test_never_refuses_the_models_of_a_run_without_checkpoints(tmp_path):
    (tmp_path / "last").mkdir()
    with pytest.raises(ConfigError, match=r"config.resume: found models of a run in .*: last; expected"):
        run(tmp_path, replace(CONFIG, resume="never"))
