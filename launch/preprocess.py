"""Preprocess CT volumes into a store: read, checked, put on one grid, once and for all.

    python launch/preprocess.py --config=configs/data.py[:PRESET] --source=FOLDER[,FOLDER…] --store=STORE

Presets: fast, compact. --config.KEY=VALUE changes a key; --help with --config lists them all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mambamim_jax.program import CONTINUE, run

KEPT = ("spacing", "window", "encoding", "labels", "max_lost")
"""Keys that preprocessing gets as they are."""


def main(arguments: list[str]) -> int:
    """The exit code: 0, or 2 where settings, data or the store's folder cannot work."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mambamim_jax.checks import ConfigError
    from mambamim_jax.config import HelpRequested, parse_command_line
    from mambamim_jax.data import datasets, fingerprint, store
    from mambamim_jax.settings_data import PreprocessConfig

    try:
        config, folder = parse_command_line([_renamed(a) for a in arguments], PreprocessConfig, __doc__ or "")
        sources = [source.strip() for source in config.source.split(",") if source.strip()]
        cases = datasets.discover_all(sources, config.format)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns) as bar:
            task = bar.add_task("", total=len(cases))
            prepared = store.prepare(
                cases,
                folder,
                report_path=folder / "report" / "data_report.jsonl",
                workers=config.workers or None,
                progress=lambda done, total, name: bar.update(task, completed=done, description=name),
                say=print,
                **{key: getattr(config, key) for key in KEPT},
            )
    except HelpRequested as help_text:
        print(help_text)
        return 0
    except (ConfigError, datasets.DatasetError, store.DataLossError, store.StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(prepared.summary)
    try:
        found = fingerprint.write(store.open_store(folder), folder / "report")
    except OSError as error:
        print(f"error: {folder / 'report'}: {error.strerror}; the store itself is complete", file=sys.stderr)
        return 2
    print(f"{len(found['outliers'])} outliers named; see {folder / 'report' / 'fingerprint.png'}")
    return 0


def _renamed(argument: str) -> str:
    """An argument as ``parse_command_line`` knows it; nothing inside a value is touched."""
    name, equals, value = argument.partition("=")
    return {"--source": "--config.source", "--store": "--workdir"}.get(name, name) + equals + value


if __name__ == "__main__":
    run(main, CONTINUE)
