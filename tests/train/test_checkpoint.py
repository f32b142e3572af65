"""Going on from a checkpoint: what is refused, what is told, and settings of another version of the library."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest

from mambamim_jax.checks import ConfigError
from mambamim_jax.settings import LogConfig, PretrainConfig, flat
from mambamim_jax.train.checkpoint import _crc
from mambamim_jax.train.resume import compare
from tests.train.test_loop import Killed, die_at
from tests.train.tiny_run import CONFIG, TinyLoader, run


class PartLoader(TinyLoader):
    """A batch ends one epoch and begins the next."""

    batches_per_epoch = Fraction(7, 4)


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
    assert "the weight decay follow the schedule of the new length: 4 steps, was 9" in printed
    assert "config.log.every: now 1, was 2" in printed


def forget_length(workdir, step):
    """Takes the run's length out of a checkpoint, as a version of the library wrote it that did not record it."""
    path = workdir / "checkpoints" / str(step) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["steps"], meta["crc"]
    path.write_text(json.dumps(meta | {"crc": _crc(meta)}))


@pytest.mark.parametrize(("recorded", "steps"), [(True, 7), (False, 8)])
def test_a_run_of_epochs_ends_as_it_was_begun(tmp_path, recorded, steps):
    """Without a record its epochs were whole batches each; from then on there is one."""
    config = replace(CONFIG, steps=0, epochs=4)
    assert config.total_steps(PartLoader.batches_per_epoch) == 7
    with pytest.raises(Killed):
        run(tmp_path, config, PartLoader(die_at(5)))
    if not recorded:
        forget_length(tmp_path, 3)
    for line in (
        f"continuing at step 3 of {steps} from",
        f"nothing is left to train: {tmp_path}/checkpoints/{steps}",
    ):
        outcome, printed = run(tmp_path, config, PartLoader())
        assert (outcome.step, outcome.steps) == (steps, steps)
        assert line in printed
        assert "schedule" not in printed


def test_another_length_is_told_where_it_is_another_and_something_is_left(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, replace(CONFIG, steps=0, epochs=4), PartLoader(die_at(5)))
    for other in ({"steps": 7, "epochs": 0}, {"steps": 2, "epochs": 0}):
        outcome, printed = run(tmp_path, replace(CONFIG, **other), PartLoader())
        assert outcome.step == 7
        assert "schedule" not in printed
    assert "and step 2 is the last" in printed
    _, printed = run(tmp_path, replace(CONFIG, steps=0, epochs=5), PartLoader())
    assert "of the new length: 9 steps, was 7" in printed


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


def test_a_file_in_the_place_of_the_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"--workdir: .*/checkpoints can't be written \(File exists\); expected a"
    ):
        run(tmp_path)
    assert (tmp_path / "checkpoints").read_text() == "mine"
