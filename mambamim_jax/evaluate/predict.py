"""Prediction: scans in, label maps on the scans' own grids out.

    read → network's grid → windows over the body's box → mean probabilities → the scan's grid → labels → file

Probabilities are averaged over windows, flips and the models of an ensemble, then interpolated to the scan's grid.
Outside the box of what is above the window's low end, which training never saw, all is background.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from mambamim_jax.data.builder import explain
from mambamim_jax.data.volume import VolumeError
from mambamim_jax.device_memory import exhausted
from mambamim_jax.evaluate.inputs import InputError, Scan, find_cases, foreground, read_scan
from mambamim_jax.evaluate.label_files import probability_file, write_labels
from mambamim_jax.evaluate.labels import probabilities
from mambamim_jax.evaluate.output import LABELS, PROBABILITIES, Output, check_apart
from mambamim_jax.evaluate.painter import Painter, place
from mambamim_jax.evaluate.sliding_window import SlidingWindow
from mambamim_jax.model_files import WEIGHTS, LoadedModel, ModelFileError, load_model, network_of
from mambamim_jax.paths import home
from mambamim_jax.train.progress import Terminal
from mambamim_jax.train.workdir import claimed
from mambamim_jax.types import Array, NumpyArray, Size3, Tree

MARGIN = 8
"""Voxels around the body's box, whose borders need some context."""
STRIDE = 16
SAME = ("channel_names", "normalisation", "spacing", "labels", "regions")
"""What the models of an ensemble must have in common besides the network."""


@dataclass(frozen=True)
class Options:
    """How to predict; see ``launch/predict.py --help``."""

    overlap: float = 0.5
    flips: tuple[int, ...] = ()
    batch: int = 1
    window: Size3 | None = None
    probabilities: bool = False
    dtype: str | None = None


class Predictor:
    """One or more models that predict together.

    Args:
      paths: model folders or fine-tuning workdirs.

    Raises: ModelFileError or InputError, in one line.
    """

    def __init__(self, paths: Sequence[str | Path], options: Options):
        self.models = [load_model(path, dtype=options.dtype) for path in paths]
        first = self.models[0]
        for model in self.models:
            if model.description["task"] != "segment":
                found = f"found task {model.description['task']!r}"
                raise ModelFileError(
                    f"{model.path}: {found}, expected a segmentation model; fine-tune it first"
                )
            _check_member(model, first)
        self.description, self.options = first.description, options
        self.regions = self.description.get("regions")
        window = options.window or tuple(self.description["crop"])
        if any(side % STRIDE or side <= 0 for side in window):
            raise InputError(f"--window: found {window}, expected sides divisible by {STRIDE}")

        def network(params: Tree, x: Array) -> Array:
            return probabilities(first.apply(params, x), self.regions)

        try:
            sizes = {"overlap": options.overlap, "batch": options.batch, "flips": options.flips}
            self.sliding = SlidingWindow(network, window, **sizes)  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(f"--overlap, --batch, --flips or --window: {error}") from None
        self.members = [model.params for model in self.models]

    def labels(
        self, scan: Scan, progress: Callable[[int, int], None] | None = None, kept: Any = None
    ) -> NumpyArray:
        """The label map (i, j, k) on the scan's own grid.

        Args:
          progress: called with (windows done, windows).
          kept: an array (classes, k, j, i) to fill with probabilities times ``painter.SCALE``.
        """
        box = foreground(scan.image, MARGIN)
        inside = scan.image[tuple(slice(*ends) for ends in box.T)]
        placement = place(scan.affine, scan.shape, scan.grid, scan.image.shape[:3], box)
        axis = self.sliding.stream_axis(inside.shape)
        classes = self.description["classes"]
        painter = Painter(scan.shape, placement, axis, classes, self.regions, kept)
        if inside.size:
            for start, values in self.sliding.stream(inside, self.members, progress):
                painter.add(start, values)
        return painter.labels.transpose(2, 1, 0)

    def settings(self) -> dict[str, Any]:
        """Everything that predictions depend on."""
        models = [{"weights": _digest(model.path / WEIGHTS)} for model in self.models]
        named = {key: self.description.get(key) for key in SAME}
        how = {
            "window": list(self.sliding.window),
            "overlap": self.options.overlap,
            "flips": [*self.options.flips],
        }
        return {"models": models, **how, "dtype": self.description.get("dtype", "float32"), **named}


def predict(
    paths: Sequence[str | Path],
    source: str | Path,
    output: str | Path,
    options: Options,
    overwrite: bool = False,
    terminal: Terminal | None = None,
) -> list[str]:
    """Predicts every case that is not there yet.

    Args:
      paths: models. source: a file or folder, see ``inputs.find_cases``. output: folder for CASE.nii.gz.

    Returns: one line for each case that could not be predicted.

    Raises: ModelFileError, InputError or ConfigError before any work, where another run writes to the output for
      instance; InputError where the disk is full, what is done stays.
    """
    terminal, folder = terminal or Terminal(), home(output)
    predictor = Predictor(paths, options)
    cases = find_cases(source, predictor.description["channel_names"])
    check_apart(cases, folder)
    with claimed(folder, terminal.say, option="--output"):
        try:
            record = Output(folder, predictor.settings(), options.probabilities)
            todo = {case: cases[case] for case in record.begin(cases, overwrite)}
            if kept := len(cases) - len(todo):
                terminal.say(f"{kept} of {len(cases)} cases are in {folder} already and are kept")
            return _predict_all(predictor, todo, record, terminal)
        except OSError as error:
            raise InputError(explain(error, folder)) from error


def _predict_all(
    predictor: Predictor, cases: Mapping[str, Sequence[Path]], output: Output, terminal: Terminal
) -> list[str]:
    """One line for each case that could not be predicted."""
    failures = []
    with terminal.counting("Predicting") as count:
        for number, (case, files) in enumerate(cases.items()):

            def note(done: int, windows: int, number: int = number, case: str = case) -> None:
                count(number, len(cases), f"{case}, window {done} of {windows}")

            try:
                predict_case(predictor, files, output.labels_of(case), note)
                output.finish(case)
            except (VolumeError, InputError, MemoryError, jax.errors.JaxRuntimeError) as error:
                failures.append(_line(error, files[0], predictor))
                terminal.say(f"error: {failures[-1]}")
            count(number + 1, len(cases), case)
    return failures


def _line(error: Exception, path: Path, predictor: Predictor) -> str:
    """What is wrong with a case. Raises the error if it is one of JAX's that is not about memory."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        wanted = exhausted(error)
        if wanted is None:
            raise error
        sliding = predictor.sliding
        windows = f"{sliding.batch} windows of {' × '.join(map(str, sliding.window))} voxels"
        return (
            f"{path}: {wanted} on the device, for {windows}; a smaller --batch or --dtype=bfloat16 needs less"
        )
    if not isinstance(error, MemoryError):
        return str(error)
    sides = " × ".join(f"{side:g}" for side in predictor.description["spacing"])
    advice = "crop the scan or use a machine with more"
    return f"{path}: out of memory with the scan at the model's {sides} mm; {advice}"


def predict_case(
    predictor: Predictor,
    files: Sequence[Path],
    target: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Predicts one case and writes its label map, and its probabilities first where they are wanted."""
    scan = read_scan(files, predictor.description)
    if not predictor.options.probabilities:
        write_labels(predictor.labels(scan, progress), files[0], target)
        return
    soft = target.with_name(target.name.removesuffix(LABELS) + PROBABILITIES)
    with probability_file(files[0], soft, predictor.description["classes"]) as kept:
        labels = predictor.labels(scan, progress, kept)
    write_labels(labels, files[0], target)


def _check_member(model: LoadedModel, first: LoadedModel) -> None:
    """Raises InputError unless two models can predict together."""
    if network_of(model.description) != network_of(first.description):
        expected = "models of an ensemble must have the same encoder, sizes and classes"
        raise InputError(f"{model.path}: another network than {first.path}; {expected}")
    for key in SAME:
        ours, theirs = (m.description.get(key) for m in (model, first))
        if ours != theirs:
            raise InputError(
                f"{model.path}: {key} {ours}, but {theirs} in {first.path}; an ensemble must agree"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
