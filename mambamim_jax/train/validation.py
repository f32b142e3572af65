"""Dice on held-out cases while fine-tuning goes on, and the model folders WORKDIR/best and WORKDIR/last."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mambamim_jax.data.labelled import prepared
from mambamim_jax.device_memory import DeviceMemoryError, exhausted
from mambamim_jax.evaluate.inputs import foreground
from mambamim_jax.evaluate.labels import decide
from mambamim_jax.evaluate.predict import MARGIN
from mambamim_jax.evaluate.sliding_window import SlidingWindow
from mambamim_jax.model_files import CONFIG, WEIGHTS, ModelFileError, flat, models, save_model
from mambamim_jax.settings_finetune import ValidationConfig
from mambamim_jax.train.labelled_data import LabelledData
from mambamim_jax.train.logs import is_number
from mambamim_jax.train.step import State
from mambamim_jax.train.workdir import unwritable
from mambamim_jax.types import Array, Size3, Tree
from mambamim_jax.weight_files import read_arrays


@dataclass(frozen=True)
class HeldOut:
    """Sliding-window prediction of whole held-out volumes, on the grid of the store.

    Attributes:
      data: what is held out. probabilities: (params, x (b, h, w, d, c)) → (b, h, w, d, classes).
      crop: the window. settings: overlap, cases. every: steps between two measurements.
      description: of the model, as ``model_files.save_model`` takes it.
      workdir: where best and last are written. say: prints a line.
    """

    data: LabelledData
    probabilities: Callable[[Tree, Array], Array]
    crop: Size3
    settings: ValidationConfig
    every: int
    description: Mapping[str, Any]
    workdir: Path
    say: Callable[[str], None]

    def begin(self) -> None:
        """Moves the models that a run before this one left in the workdir to a new folder in WORKDIR/earlier.

        Raises: ConfigError where the workdir cannot be written to.
        """
        left = models(self.workdir)
        if left:
            earlier = self.workdir / "earlier"
            aside = next(path for n in count() if not (path := earlier / str(n)).exists())
            try:
                aside.mkdir(parents=True)
                for name in left:
                    (self.workdir / name).rename(aside / name)
            except OSError as error:
                raise unwritable(self.workdir, error) from error
            self.say(f"the models of an earlier run in {self.workdir} are in {aside}")

    def measure(
        self,
        step: int,
        state: State,
        earlier: Sequence[Mapping[str, Any]],
        check: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """{"mean_dice", "dice": {class: mean over the cases}, "cases": {id: Dice of each class}, "best": bool}.

        A class that is neither in a case's label nor predicted there does not count (None); one that is missed, or
        predicted where it is not, has Dice 0. ``mean_dice`` is the mean over the classes of the means over cases.
        "best": whether WORKDIR/best is this network; one that could not be written is not the best for those after.
        ``check`` is called at every window, what it raises ends the measurement before anything is written.

        Raises: DeviceMemoryError.
        """
        params = kept(state)
        window = SlidingWindow(
            self.probabilities, self.crop, overlap=self.settings.overlap, batch=self.settings.batch
        )
        names, store = self.data.table.foreground, self.data.held_out
        number = min(self.settings.cases or len(store), len(store))
        try:
            cases = {store.entries[n].id: self._dice(window, params, n, check) for n in range(number)}
        except jax.errors.JaxRuntimeError as error:
            if wanted := exhausted(error):
                raise DeviceMemoryError(self._too_large(wanted)) from error
            raise
        by_class = {name: _mean([case[i] for case in cases.values()]) for i, name in enumerate(names)}
        mean = _mean(list(by_class.values()))
        bests = [row for row in earlier if row.get("best") and is_number(row.get("mean_dice"))]
        best = max((row["mean_dice"] for row in bests), default=-1.0)
        improved = mean is not None and mean > best
        text = f"step {step}: held-out Dice {mean if mean is None else round(mean, 4)} over {number} cases"
        self.say(f"{text}, {'the best so far' if improved else f'best {best:.4f}'}")
        written = improved and self._save("best", step, params, mean)
        return {"mean_dice": mean, "dice": by_class, "cases": cases, "best": written}

    def finish(self, step: int, state: State) -> None:
        """Writes WORKDIR/last, unless it is there."""
        params = kept(state)
        if not self._is_there(step, params):
            self._save("last", step, params, None)

    def _too_large(self, wanted: str) -> str:
        """What to say of windows that a device has not memory for."""
        batch, crop = self.settings.batch, " × ".join(map(str, self.crop))
        less = (
            "a smaller config.validation.batch" if batch > 1 else "a smaller config.data.crop, in a new run"
        )
        windows = f"{batch} windows of {crop} voxels at once (config.validation.batch, config.data.crop)"
        return f"{wanted} on a device, for the validation's {windows}; what needs less: {less}"

    def _is_there(self, step: int, params: Tree) -> bool:
        """Whether WORKDIR/last is of this step and holds these parameters."""
        folder, wanted = self.workdir / "last", flat({"params": params})
        try:
            steps = json.loads((folder / CONFIG).read_text())["training"]["steps"]
            found = read_arrays(folder / WEIGHTS)
        except (OSError, ValueError, KeyError, TypeError):
            return False
        same = steps == step and found.keys() == wanted.keys()
        return same and all(np.array_equal(found[name], array) for name, array in wanted.items())

    def _dice(
        self, window: SlidingWindow, params: Tree, n: int, check: Callable[[], None]
    ) -> list[float | None]:
        """Dice of each class, or region, in one case; outside the body's box all is background, as in prediction."""
        store, table = self.data.held_out, self.data.table
        image = prepared(np.asarray(store.image(n)[:]), store, self.data.normalisation)
        label = np.asarray(store.label(n)[:])
        wanted = [region.labels for region in table.regions] or [(v,) for v in range(1, len(table.names))]
        regions = [asdict(region) for region in table.regions] or None
        inside = tuple(slice(*ends) for ends in foreground(image, MARGIN).T)
        axis, body = window.stream_axis(image[inside].shape), label[inside]
        common, found = np.zeros((2, len(wanted)), np.int64)
        for first, values in window.stream(image[inside], [params], lambda *_: check()):
            place = tuple(
                slice(first, first + values.shape[axis]) if a == axis else slice(None) for a in range(3)
            )
            predicted, known = decide(values, regions), body[place]
            for i, labels in enumerate(wanted):
                here = np.isin(predicted, labels)
                found[i] += np.count_nonzero(here)
                common[i] += np.count_nonzero(here & np.isin(known, labels))
        there = [np.count_nonzero(np.isin(label, labels)) for labels in wanted]
        return [float(2 * c / (f + t)) if f + t else None for c, f, t in zip(common, found, there)]

    def _save(self, name: str, step: int, params: Tree, dice: float | None) -> bool:
        """Writes a model folder; whether that went."""
        results = {} if dice is None else {"held-out Dice": round(dice, 4)}
        training = {**self.description.get("training", {}), "steps": step}
        try:
            save_model(
                self.workdir / name,
                {**self.description, "training": training, "results": results},
                jax.tree.map(np.asarray, params),
            )
        except ModelFileError as error:  # such as a full disk: the run itself goes on
            self.say(f"WARNING: {error}")
            return False
        return True


def kept(state: State) -> Tree:
    """The parameters that a model folder holds: averaged if there is an average, without heads of training alone."""
    return without_heads(state["ema"] if "ema" in state else state["params"])


def without_heads(params: Tree) -> Tree:
    """Parameters without those of deep supervision."""
    return {name: part for name, part in params.items() if name != "aux"}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
