"""Configuration: a preset file and ``--config.a.b=value`` → the validated dataclasses of ``settings``.

The only file that knows ml_collections. A file such as ``configs/pretrain.py`` starts from
``defaults(PretrainConfig)`` and changes what its preset needs.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import types
import typing
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from mambamim_jax.checks import ConfigError, did_you_mean
from mambamim_jax.paths import home
from mambamim_jax.settings import flat_items

T = TypeVar("T")
UNBOUNDED = ("optim.clip_norm",)
"""Keys of numbers that may be infinite; all others are finite."""


def defaults(cls: type) -> ConfigDict:
    """An editable, locked ConfigDict with every key of the dataclass at its default."""
    return ConfigDict(dataclasses.asdict(cls()))


def validate(config: ConfigDict, cls: type[T]) -> T:
    """ConfigDict → frozen dataclass, all its values checked.

    Raises: ConfigError for an unknown or missing key, a wrong type or a value that cannot work.
    """
    return _build(config, cls, "")


def _build(config: Any, cls: type[T], prefix: str) -> T:
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config.{prefix.rstrip('.')}", f"found {config!r}", "a section with keys")
    hints = typing.get_type_hints(cls)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in config:
        if name not in hints:
            raise _unknown(f"{prefix}{name}", [f"{prefix}{known}" for known in hints])
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        key = f"{prefix}{name}"
        if name not in config:
            raise ConfigError(f"config.{key}", "missing", _describe(hint))
        if dataclasses.is_dataclass(hint):
            values[name] = _build(config[name], typing.cast(type, hint), f"{key}.")
        else:
            values[name] = _typed(config[name], hint, key)
    built = cls(**values)
    built.check(prefix.rstrip("."))  # type: ignore[attr-defined]
    return built


def _typed(value: Any, hint: Any, key: str) -> Any:
    """The value as the type that the dataclass names; integers pass as floats and lists as tuples."""
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if isinstance(value, (tuple, list)):
            if len(items) == 2 and items[1] is Ellipsis:
                return tuple(_typed(item, items[0], key) for item in value)
            if len(value) == len(items):
                return tuple(_typed(item, kind, key) for item, kind in zip(value, items))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max or (value == math.inf and key in UNBOUNDED):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"config.{key}", f"found {value!r} ({type(value).__name__})", _describe(hint))


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        many = len(items) == 2 and items[1] is Ellipsis
        kind = {int: "integers", float: "finite numbers"}.get(items[0], items[0].__name__)
        return f"a tuple of {kind}, such as (1, 2, 3)" if many else f"{len(items)} {kind} in a tuple"
    names = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false"}
    return names.get(hint, "a section with keys")


def _unknown(key: str, known: Sequence[str]) -> ConfigError:
    advice = did_you_mean(key, known).replace("mean ", "mean config.")
    return ConfigError(f"config.{key}", "no such key", "a key of this configuration", advice or "see --help")


# --- command line ---


class HelpRequested(Exception):
    """Carries the text that ``--help`` prints."""


def parse_command_line(arguments: Sequence[str], cls: type[T], usage: str) -> tuple[T, Path]:
    """``--config=FILE[:PRESET] --workdir=DIR [--config.a.b=value …]`` → (validated config, workdir).

    Raises:
      ConfigError: whatever is wrong with any of it.
      HelpRequested: for ``--help``, with the usage, the preset file's docstring and every key with its value.
    """
    given, overrides, wants_help = _split(arguments)
    if wants_help and "config" not in given:
        raise HelpRequested(usage)
    if "config" not in given:
        raise ConfigError(
            "--config", "missing", "FILE or FILE:PRESET", usage.strip().splitlines()[-1].strip()
        )
    config, documentation = _load(given["config"])
    for key, text in overrides:
        _override(config, key, text)
    if wants_help:
        keys = "\n".join(f"  --config.{key}={value}" for key, value in flat_items(config.to_dict()))
        raise HelpRequested(f"{usage}\n{documentation}\nKeys and their values in {given['config']}:\n{keys}")
    if not given.get("workdir"):
        raise ConfigError("--workdir", "missing", "a folder for this run's checkpoints and logs")
    workdir = home(given["workdir"]).resolve()
    try:
        os.fsencode(workdir).decode()
    except UnicodeDecodeError:
        expected = "a path in UTF-8, as checkpoints can be written to no other"
        raise ConfigError("--workdir", f"found {str(workdir)!r}", expected, "rename its folder") from None
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError("--workdir", f"found a file at {workdir}", "a folder, new or of an earlier run")
    return validate(config, cls), workdir


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, str]], bool]:
    """Command line → (--config and --workdir, the overrides in order, whether help is wanted)."""
    given: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, has_value, value = argument.lstrip("-").partition("=")
        if name in ("help", "h") and argument.startswith("-"):
            return given, overrides, True
        known = name in ("config", "workdir") or name.startswith("config.")
        if not argument.startswith("--") or not known:
            advice = did_you_mean(name, ("config", "workdir"))
            raise ConfigError(argument, "not understood", "--config, --config.KEY=VALUE or --workdir", advice)
        if not has_value:
            if not queue or queue[0].startswith("--"):
                raise ConfigError(f"--{name}", "no value", f"--{name}=VALUE")
            value = queue.pop(0)
        if name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        else:
            given[name] = value
    return given, overrides, False


def _load(spec: str) -> tuple[ConfigDict, str]:
    """``FILE`` or ``FILE:PRESET`` → (its ConfigDict, the file's docstring)."""
    file, _, preset = spec.partition(":")
    path, expected = home(file), "FILE.py or FILE.py:PRESET"
    if not path.is_file():
        raise ConfigError("--config", f"no file {file}", expected, "such as configs/pretrain.py:demo")
    module = types.ModuleType(f"config_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where a dataclass looks for what its file has imported
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        config = module.get_config(preset) if preset else module.get_config()
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".strip(" :").partition("\n")[0]
        raise ConfigError("--config", f"{file} fails with {reason}", expected) from error
    if not isinstance(config, ConfigDict):
        found = "None" if config is None else f"a {type(config).__name__}"
        advice = "start from defaults(…), as the files in configs/ do"
        raise ConfigError(file, f"get_config returned {found}", "a ConfigDict", advice)
    return config, module.get_config.__doc__ or ""


def unknown_preset(preset: str, presets: Sequence[str]) -> ConfigError:
    """The error that a config file raises for a preset it does not have."""
    advice = did_you_mean(preset, presets)
    return ConfigError("--config", f"no preset {preset!r}", "one of " + ", ".join(presets), advice)


def small_widths(config: ConfigDict) -> None:
    """Encoders that two CPU cores can train, the same for a preset of pre-training and of fine-tuning."""
    hymamba, vision_mamba = config.model.hymamba, config.model.vision_mamba
    hymamba.channels = vision_mamba.channels = (8, 16, 24, 32, 48)
    hymamba.depths, hymamba.mamba_depth = (1, 1, 1, 1), 2
    vision_mamba.mamba_depth, vision_mamba.feature_depths = 4, (1, 2, 3, 4)
    hymamba.state = vision_mamba.state = 8


def _override(config: ConfigDict, key: str, text: str) -> None:
    """Sets one key from the command line's text, read as the kind of value that is there."""
    known = [name for name, _ in flat_items(config.to_dict())]
    if key not in known:
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            raise ConfigError(
                f"config.{key}", "a section", "one of its keys", f"such as --config.{inside[0]}=…"
            )
        raise _unknown(key, known)
    section, _, name = key.rpartition(".")
    target = config
    for part in filter(None, section.split(".")):
        target = target[part]
    with target.ignore_type():
        target[name] = _parse(text, target[name], key)


def _parse(text: str, current: Any, key: str) -> Any:
    if isinstance(current, str):
        return text
    if isinstance(current, bool):
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"config.{key}", f"found {text!r}", "true or false")
        return text.lower() == "true"
    try:
        value = float(text) if text in ("inf", "nan") else literal_eval(text)
        return float(value) if type(value) is int and isinstance(current, float) else value
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        kinds = {int: "an integer", float: "a number", tuple: "a tuple, such as (96,96,96)"}
        raise ConfigError(f"config.{key}", f"found {text!r}", kinds[type(current)]) from None
