"""The folder that predictions go to: which cases are there, and a record of how each of them was made.

``predictions.json`` holds the settings of the newest run, and with them every case whose files are there was made,
but for those in ``unfinished``, which are to be made again and may still be older, and those in ``earlier``: other
settings, each with its ``cases``. A case is put into ``unfinished`` before its files change and leaves it after that,
so that the record is true whenever a run is killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambamim_jax.evaluate.inputs import InputError
from mambamim_jax.evaluate.label_files import partial_of, write_text

LABELS, PROBABILITIES, RECORD = ".nii.gz", "_probabilities.nii", "predictions.json"
UNFINISHED, EARLIER, CASES = "unfinished", "earlier", "cases"
ADVICE = "choose another --output, or --overwrite"


class Output:
    """Predictions in a folder, which no other run may write to meanwhile.

    Args:
      folder: where CASE.nii.gz go. settings: everything that predictions depend on, for JSON.
      probabilities: whether a case has CASE_probabilities.nii, too.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], probabilities: bool):
        self.folder, self.probabilities = folder, probabilities
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.unfinished: set[str] = set()
        self.earlier: list[dict[str, Any]] = []

    def labels_of(self, case: str) -> Path:
        """The file of a case's label map."""
        return self.folder / f"{case}{LABELS}"

    def probabilities_of(self, case: str) -> Path:
        """The file of a case's probabilities."""
        return self.folder / f"{case}{PROBABILITIES}"

    def begin(self, cases: Iterable[str], overwrite: bool) -> list[str]:
        """Writes the record of a run and removes what an earlier one has left half-written of its cases.

        Returns: those of the cases that are to be predicted, all of them with ``overwrite``.

        Raises: InputError where predictions there were made in another way. OSError where nothing can be written.
        """
        cases = list(cases)
        there = self._there()
        others = self._read(there, overwrite)
        blocked = sorted({*cases} & {case for group in self.earlier for case in group[CASES]})
        if overwrite:
            self.earlier = [kept for group in self.earlier if (kept := _without(group, cases))[CASES]]
            self.unfinished |= there.intersection(cases)
        elif others:
            found = f"the predictions there were made with other {', '.join(others)}"
            raise InputError(f"{self.folder / RECORD}: {found}; {ADVICE}")
        elif blocked:
            names = ", ".join(blocked[:3]) + (" …" if len(blocked) > 3 else "")
            where, found = (
                self.folder / RECORD,
                f"{len(blocked)} of the cases there were made in another way ({names})",
            )
            if not where.exists():
                found = f"{len(blocked)} of the cases are there ({names}), and no {RECORD} says how they were made"
                where = self.folder
            raise InputError(f"{where}: {found}; {ADVICE}")
        for case in cases:
            for target in (self.labels_of(case), self.probabilities_of(case)):
                partial_of(target).unlink(missing_ok=True)
        self._write()
        return [case for case in cases if overwrite or case in self.unfinished or not self._is_complete(case)]

    def finish(self, case: str) -> None:
        """Notes that a case's files are those of this run; its older probabilities go where none are wanted."""
        if case in self.unfinished:
            if not self.probabilities:
                self.probabilities_of(case).unlink(missing_ok=True)
            self.unfinished.remove(case)
            self._write()

    def _there(self) -> set[str]:
        names = [path.name for path in self.folder.iterdir() if path.name[0] != "."]
        return {n.removesuffix(end) for n in names for end in (LABELS, PROBABILITIES) if n.endswith(end)}

    def _is_complete(self, case: str) -> bool:
        return self.labels_of(case).exists() and (
            not self.probabilities or self.probabilities_of(case).exists()
        )

    def _read(self, there: set[str], overwrite: bool) -> list[str]:
        """Takes over what the record says of the cases that are there; the settings that differ from the run's."""
        path = self.folder / RECORD
        try:
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            self.unfinished = there.intersection(before.pop(UNFINISHED, ()))
            earlier = [
                {**group, CASES: sorted(there.intersection(group[CASES]))}
                for group in before.pop(EARLIER, ())
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if not overwrite:
                found = f"no record of predictions in it ({type(error).__name__}: {error})"
                raise InputError(f"{path}: {found}; {ADVICE}") from None
            before, self.unfinished, earlier = {}, set(), []
        others = self._other(before)
        if others:
            known = self.unfinished.union(*(group[CASES] for group in earlier))
            earlier += [{CASES: sorted(there - known), **before}, {CASES: sorted(self.unfinished)}]
            self.unfinished = set()
        self.earlier = [group for group in earlier if group[CASES] and self._other(group)]
        return others if before and there else []

    def _other(self, settings: Mapping[str, Any]) -> list[str]:
        return [key for key, value in self.settings.items() if settings.get(key) != value]

    def _write(self) -> None:
        lists = {UNFINISHED: sorted(self.unfinished), EARLIER: self.earlier}
        record = {**self.settings, **{key: value for key, value in lists.items() if value}}
        write_text(self.folder / RECORD, json.dumps(record, indent=2) + "\n")


def made_otherwise(folder: Path) -> list[str]:
    """Cases that the record of a folder, if it has one, says may not have been made with the settings of the others."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        groups = [record.get(UNFINISHED, ()), *(group[CASES] for group in record.get(EARLIER, ()))]
        return sorted({str(case) for group in groups for case in group})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def check_apart(cases: Mapping[str, Sequence[Path]], folder: Path) -> None:
    """Raises InputError where predictions in this folder would lie among the scans, or take the place of one."""
    expected = "expected a folder without scans; choose another"
    scans = {_identity(path): path for paths in cases.values() for path in paths}
    parents = {parent for path in scans.values() for parent in (path.parent, path.resolve().parent)}
    if folder.exists() and _identity(folder) in {_identity(parent) for parent in parents}:
        raise InputError(f"--output: the scans lie in {folder}; {expected}")
    for target in (folder / f"{case}{ending}" for case in cases for ending in (LABELS, PROBABILITIES)):
        if target.exists() and _identity(target) in scans:
            raise InputError(f"--output: {target} is the scan {scans[_identity(target)]} itself; {expected}")


def _identity(path: Path) -> tuple[int, int] | Path:
    """The same for all paths that lead to one file or folder, through links of either kind."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino


def _without(group: Mapping[str, Any], cases: Sequence[str]) -> dict[str, Any]:
    return {**group, CASES: sorted({*group[CASES]}.difference(cases))}
