import pytest

from mambamim_jax.checks import ConfigError
from mambamim_jax.config import HelpRequested, parse_command_line
from mambamim_jax.settings import PretrainConfig, flat
from mambamim_jax.settings_data import PreprocessConfig

DEMO = "--config=configs/pretrain.py:demo"


def parse(*arguments, config=DEMO, workdir="unused"):
    return parse_command_line([config, f"--workdir={workdir}", *arguments], PretrainConfig, "usage")[0]


@pytest.mark.parametrize("preset", ["demo", "openkbp", "hymamba_b"])
@pytest.mark.parametrize("encoder", ["hymamba", "vision_mamba"])
def test_presets_are_valid(preset, encoder, tmp_path):
    config = parse(
        f"--config.model.encoder={encoder}",
        f"--config.data.source={tmp_path}",
        config=f"--config=configs/pretrain.py:{preset}",
    )
    assert config.model.encoder == encoder
    assert config.data.source == str(tmp_path)


def test_the_default_is_the_papers_recipe(tmp_path):
    config = parse(f"--config.data.source={tmp_path}", config="--config=configs/pretrain.py")
    assert config.data.crop == (96, 96, 96)
    assert config.data.batch == 16
    assert (config.optim.learning_rate, config.optim.betas, config.optim.clip_norm) == (
        1e-4,
        (0.9, 0.999),
        5.0,
    )
    assert (config.optim.weight_decay, config.optim.weight_decay_end) == (0.04, 0.2)
    assert (config.epochs, config.optim.warmup, config.model.mask_ratio) == (100, 0.4, 0.75)


def test_values_take_the_type_that_is_there():
    config = parse(
        "--config.optim.learning_rate=1",
        "--config.data.crop",
        "32,48,16",
        "--config.data.flip=[0, 0.5, 1]",
        "--config.model.encoder=vision_mamba",
        "--config.optim.clip_norm=inf",
    )
    assert isinstance(config.optim.learning_rate, float)
    assert config.data.crop == (32, 48, 16)
    assert config.data.flip == (0.0, 0.5, 1.0)
    assert config.optim.clip_norm == float("inf")
    assert flat(config)["data.crop"] == [32, 48, 16]


def test_several_sources_and_their_weights(tmp_path):
    config = parse(f"--config.data.source={tmp_path}, {tmp_path}", "--config.data.weights=/a/b=3, c=0.5")
    assert config.data.sources == [str(tmp_path)] * 2
    assert config.data.mixture() == {"/a/b": 3.0, "c": 0.5}
    assert parse().data.mixture() is None
    with pytest.raises(ConfigError, match="source: found '/no/such'; expected an existing folder"):
        parse(f"--config.data.source={tmp_path},/no/such")


WRONG = {
    "--config.optm.learning_rate=1": "optm.learning_rate: no such key; .* config.optim.learning_rate",
    "--config.optim.learning_rate=high": "optim.learning_rate: found 'high'; expected a number",
    "--config.optim.learning_rate=inf": "optim.learning_rate: found inf .*; expected a finite number",
    "--config.optim.weight_decay=1e999": "optim.weight_decay: found inf .*; expected a finite number",
    "--config.optim.eps=1" + 400 * "0": "optim.eps: found '10+'; expected a number",
    "--config.optim.clip_norm=nan": "optim.clip_norm: found nan .*; expected a finite number",
    "--config.data.spacing=(1e999,4.0,4.0)": "data.spacing: found inf .*; expected a finite number",
    f"--config.data.spacing=({400 * '9'},4,4)": "data.spacing: found 9+ .*; expected a finite number",
    "--config.data.window=(-1e999,1e999)": "data.window: found -inf .*; expected a finite number",
    "--config.optim.betas={[]:1}": r"optim.betas: found '{\[\]:1}'; expected a tuple",
    f"--config.optim.betas={3000 * '-'}1": "optim.betas: found '-+1'; expected a tuple",
    f"--config.optim.betas={9000 * '-'}1": "optim.betas: found '-+1'; expected a tuple",
    "--config.optim.learning_rate=-1": "optim.learning_rate: found -1.0; expected a positive number",
    "--config.optim=1": "config.optim: a section; expected one of its keys",
    "--config.steps=2.5": "steps: found 2.5 .*; expected an integer",
    "--config.steps=0": "steps: found 0; expected one of config.steps and config.epochs positive",
    "--config.seed=True": "seed: found True .*; expected an integer",
    "--config.resume=maybe": "resume: found 'maybe'; expected one of auto, never, must",
    "--config.data.crop=(48,50,48)": r"crop: found \(48, 50, 48\); .* stride 16; try \(48, 48, 48\)",
    "--config.data.crop=(48,48)": r"crop: found \(48, 48\) .*; expected 3 integers",
    "--config.data.source=/no/such/folder": "source: found '/no/such/folder'; expected an existing folder",
    "--config.data.weights=a=1,a=2": "data.weights: found 'a=2'; expected each name once",
    "--config.data.weights=a": "data.weights: found 'a'; expected NAME=NUMBER",
    "--config.data.weights=a=1,b=x": "data.weights: found 'b=x'; expected NAME=NUMBER",
    "--config.data.weights=a=1,b=nan": "data.weights: found 'b=nan'; expected a finite number, zero or more",
    "--config.data.weights=a=-1,b=1": "data.weights: found 'a=-1'; expected a finite number, zero or more",
    "--config.data.weights=a=inf": "data.weights: found 'a=inf'; expected a finite number, zero or more",
    "--config.data.weights=a=0,b=0": "data.weights: found 'a=0,b=0'; expected at least one above zero",
    "--config.data.threads=-1": "data.threads: found -1; expected 0 or more",
    "--config.data.window=(250,-175)": "window: .* low < high",
    "--config.data.window=(-40000,250)": "window: found .*-40000.0, 250.0.*; expected .* from -32768 to 32767",
    "--config.data.window=(0,32768)": "window: found .*; expected .* from -32768 to 32767",
    "--config.mesh.space=-1": "mesh.space: found -1; expected at least 1",
    "--workdir=r\udcff": r"--workdir: found '.*r\\udcff'; expected a path in UTF-8",
    "--config.model.mask_ratio=0.99": "mask_ratio: found 0.99; .* some but not all of the 27 patches",
    "--config.model.mask_ratio=0": "mask_ratio: found 0.0; .* some but not all",
    "--config.model.encoder=hymama": "encoder: found 'hymama'; .* did you mean hymamba",
    "--config.model.decoder_width=100": "decoder_width: found 100; .* divisible by 16 .* try 96",
    "--config.model.hymamba.channels=(8,8,8,8,50)": "channels: .* divisible by 6 .* try 48",
    "--config.model.vision_mamba.feature_depths=(1,2,3,9)": "feature_depths: .* last of them mamba_depth, 4",
    "--config.optim.accumulate=3": "accumulate: found 3; expected a divisor of the batch",
    "--config.mesh.space=5": "mesh.space: found 5; expected a divisor of",
    "--config.mesh.space=0": "mesh.space: found 0; expected at least 1",
    "--config.mesh.space=2 --config.mesh.model=2": "mesh.space: found 2; expected 1 where config.mesh.model is 2",
    "--confg.steps=1": "--confg.steps=1: not understood",
    "--config.steps": "--config.steps: no value",
    "stray": "stray: not understood",
    "--config=configs/pretrain.py:dmo": "no preset 'dmo'; expected one of demo, .* did you mean demo",
    "--config=configs/nothing.py:demo": "no file configs/nothing.py",
    "--workdir=pyproject.toml": "found a file at",
}


@pytest.mark.parametrize("argument", WRONG)
def test_what_is_wrong_is_one_line(argument):
    with pytest.raises(ConfigError, match=WRONG[argument]) as caught:
        parse(*argument.split())
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("source", ["", " ", ",", " , "])
def test_no_source_at_all_is_named(source):
    with pytest.raises(ConfigError, match=f"data.source: found '{source}'; expected a folder"):
        parse(f"--config.data.source={source}")
    with pytest.raises(ConfigError, match=f"source: found '{source}'; expected one or more folders"):
        PreprocessConfig(source=source).check("")


def test_a_missing_flag_is_named():
    with pytest.raises(ConfigError, match="--config: missing"):
        parse_command_line([], PretrainConfig, "usage")
    with pytest.raises(ConfigError, match="--workdir: missing"):
        parse_command_line([DEMO], PretrainConfig, "usage")
    with pytest.raises(ConfigError, match=r"data.source: found ''; .*pass --config.data.source=FOLDER"):
        parse(config="--config=configs/pretrain.py")


def test_a_broken_config_file_is_one_line(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(
        "from mambamim_jax.config import defaults\nfrom mambamim_jax.settings import PretrainConfig\n"
        "def get_config():\n    config = defaults(PretrainConfig)\n    config.sed = 1\n    return config\n"
    )
    with pytest.raises(ConfigError, match=r"config.sed: no such key; .* did you mean config.seed"):
        parse(config=f"--config={file}")
    file.write_text("def get_config():\n    raise OSError('two\\nlines')\n")
    with pytest.raises(ConfigError, match=r"broken.py fails with OSError: two;") as caught:
        parse(config=f"--config={file}")
    assert "\n" not in str(caught.value)
    for given, says in (("sys.exit()", "SystemExit;"), ("sys.exit('no data')", "SystemExit: no data;")):
        file.write_text(f"import sys\n{given}\n")
        with pytest.raises(ConfigError, match=rf"broken.py fails with {says}"):
            parse(config=f"--config={file}")


@pytest.mark.parametrize(("value", "found"), [("None", "None"), ("{'seed': 1}", "a dict")])
def test_a_config_file_that_returns_something_else_is_named(tmp_path, value, found):
    file = tmp_path / "other.py"
    file.write_text(f"def get_config():\n    return {value}\n")
    with pytest.raises(ConfigError, match=rf"other.py: get_config returned {found}; expected a ConfigDict"):
        parse(config=f"--config={file}")


def test_a_config_file_may_define_a_dataclass_and_be_written_in_utf_8(tmp_path):
    file = tmp_path / "settings.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from mambamim_jax.config import defaults\nfrom mambamim_jax.settings import PretrainConfig\n"
        "@dataclass\nclass Site:\n    name: str = 'Zürich'\n    seed: int = 5\n"
        "def get_config():\n    config = defaults(PretrainConfig)\n    config.seed = Site().seed\n"
        "    config.steps = len(Site().name)\n    return config\n",
        encoding="utf-8",
    )
    config = parse(f"--config.data.source={tmp_path}", "--config.epochs=0", config=f"--config={file}")
    assert (config.seed, config.steps) == (5, 6)


def test_help_lists_every_key():
    with pytest.raises(HelpRequested) as caught:
        parse("--help")
    for key in flat(PretrainConfig()):
        assert f"--config.{key}=" in str(caught.value)
