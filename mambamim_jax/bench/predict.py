"""``launch/bench.py predict``: sliding-window inference, ours against PyTorch under MONAI's, alternately.

python launch/bench.py predict --released=PATH [--window=96] [--volume=96,96,144] [--overlap=0.5] [--batch=1]

Both sides have the authors' fine-tuning network with the same weights, the same volume, the same windows and the same
Gaussian weights; the largest difference of what they return is printed. Needs PyTorch, MONAI and a checkout of
the released code; without --released ours is measured alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambamim_jax.bench.alternate import Side, SideError, measure
from mambamim_jax.bench.tables import print_table
from mambamim_jax.bench.torch_baseline import checkout
from mambamim_jax.checks import LineParser, overlap, whole, whole_numbers
from mambamim_jax.settings import STRIDE
from mambamim_jax.types import NumpyArray, Size3

HERE = "mambamim_jax.bench.predict"
SIZES: dict[str, dict[str, Any]] = {
    "paper": {
        "channels": (32, 64, 128, 192, 384),
        "depths": (2, 2, 2, 1),
        "expansion": (2, 4, 4, 4),
        "mamba_depth": 4,
    },
    "small": {
        "channels": (8, 16, 24, 32, 48),
        "depths": (1, 1, 1, 1),
        "expansion": (2, 2, 2, 2),
        "mamba_depth": 2,
    },
}
GIB = 2**30


def volume_of(shape: Sequence[int]) -> NumpyArray:
    """A volume (h, w, d, 1) of random intensities in [0, 1]."""
    return np.random.default_rng(1).random((*shape, 1), np.float32)


class Ours:
    """``SlidingWindow`` on our Segmenter; a step is one volume.

    Args:
      weights: .npz file with the authors' names. result: .npy file for what it returns.
    """

    def __init__(self, weights: str, volume: Size3, window: int, overlap: float, batch: int, result: str):
        from flax import nnx

        from mambamim_jax.convert import from_official
        from mambamim_jax.evaluate.sliding_window import SlidingWindow
        from mambamim_jax.model.encoder import HyMamba
        from mambamim_jax.model.rngs import Rngs
        from mambamim_jax.model.segmenter import Segmenter
        from mambamim_jax.official_sizes import sizes_of_official
        from mambamim_jax.weight_files import read_arrays

        arrays = read_arrays(weights)
        sizes, self.params = sizes_of_official(arrays), from_official(arrays).params

        def build() -> Segmenter:
            rngs = Rngs(0)
            names = ("channels", "depths", "expansion", "mamba_depth")
            encoder = HyMamba(**{name: getattr(sizes, name) for name in names}, rngs=rngs)
            return Segmenter(encoder, classes=sizes.classes, head_width=sizes.channels[0], rngs=rngs)

        graph, _ = nnx.split(nnx.eval_shape(build), nnx.Param)
        self.sliding = SlidingWindow(
            lambda params, x: nnx.merge(graph, params)(x), (window,) * 3, overlap=overlap, batch=batch
        )
        self.volume, self.result = volume_of(volume), result

    def __call__(self) -> float:
        """Predicts the volume and returns the mean of the logits' magnitudes."""
        logits = self.sliding(self.volume, [self.params])
        self.last = logits
        return float(np.abs(logits).mean())

    def facts(self) -> dict[str, Any]:
        """Writes the last result down; says how many windows there are."""
        np.save(self.result, self.last)
        return {"windows": len(self.sliding.places(self.volume.shape))}


class Theirs:
    """``monai.inferers.sliding_window_inference`` on the released network in PyTorch, in its inference mode."""

    def __init__(
        self,
        released: str,
        sizes: dict[str, Any],
        weights: str,
        volume: Size3,
        window: int,
        overlap: float,
        batch: int,
        result: str,
        threads: int = 0,
    ):
        import torch

        from mambamim_jax.bench.torch_baseline import build_segmenter

        if threads:
            torch.set_num_threads(threads)
        self.model = build_segmenter(released, sizes).eval()
        with np.load(weights) as arrays:
            state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.model.load_state_dict(state)
        self.volume = torch.from_numpy(np.moveaxis(volume_of(volume), -1, 0)[None].copy())
        self.window, self.overlap, self.batch, self.result = (window,) * 3, overlap, batch, result

    def __call__(self) -> float:
        """Predicts the volume and returns the mean of the logits' magnitudes."""
        import torch
        from monai.inferers import sliding_window_inference

        with torch.inference_mode():
            logits = sliding_window_inference(
                self.volume, self.window, self.batch, self.model, self.overlap, mode="gaussian"
            )
        assert isinstance(logits, torch.Tensor)
        self.last = np.moveaxis(logits[0].numpy(), 0, -1)
        return float(np.abs(self.last).mean())

    def facts(self) -> dict[str, Any]:
        """Writes the last result down."""
        np.save(self.result, self.last)
        return {}


def write_weights(path: Path, size: str, classes: int, window: int) -> dict[str, Any]:
    """Random weights with the authors' names, of an initialised network's scale; returns its sizes as they say them."""
    import jax

    from mambamim_jax.convert import abstract_trees, to_official
    from mambamim_jax.official_sizes import Sizes
    from mambamim_jax.weight_files import write_arrays

    own, draw = SIZES[size], np.random.default_rng(0)

    def leaf(place: Any, like: Any) -> NumpyArray:
        name = jax.tree_util.keystr(place[-1:], simple=True)
        if name == "A_log":
            return np.broadcast_to(
                np.log(np.arange(1, like.shape[1] + 1, dtype=np.float32)), like.shape
            ).copy()
        if len(like.shape) < 2:
            return np.full(like.shape, float(name in ("scale", "D")), np.float32)
        return draw.standard_normal(like.shape, np.float32) / np.sqrt(
            np.prod(like.shape[:-1]), dtype=np.float32
        )

    params, _ = abstract_trees(Sizes("segment", classes=classes, **own))
    official = to_official(jax.tree_util.tree_map_with_path(leaf, params), None, {"size": window})
    write_arrays(path, official)
    theirs = {"depths": (1, *own["depths"]), "expansion": (2, *own["expansion"])}
    return {**own, **theirs, "size": window, "classes": classes}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 1 where a side failed."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.window % STRIDE:
        parser.error(f"argument --window: found {options.window}, expected voxels divisible by {STRIDE}")
    how = {
        "volume": options.volume,
        "window": options.window,
        "overlap": options.overlap,
        "batch": options.batch,
    }
    with tempfile.TemporaryDirectory() as folder:
        weights, results = Path(folder) / "weights.npz", [Path(folder) / f"{n}.npy" for n in (0, 1)]
        sizes = write_weights(weights, options.size, options.classes, options.window)
        how["weights"] = str(weights)
        sides = [Side("ours", f"{HERE}:Ours", {**how, "result": str(results[0])}, options.threads)]
        if options.released:
            other = {**how, "released": options.released, "sizes": sizes, "result": str(results[1])}
            other["threads"] = options.threads
            sides.append(Side("PyTorch, MONAI", f"{HERE}:Theirs", other, options.threads))
        try:
            measure(sides, steps=options.steps, warm_up=options.warm_up)
        except SideError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        found = [np.load(path) for path in results[: len(sides)]]
    windows = sides[0].facts["windows"]
    rows = [_row(side, sides) for side in sides]
    shape = "×".join(map(str, options.volume))
    title = f"Sliding window, {options.size} network, {options.classes} classes: {shape} voxels, {windows} windows"
    title += f" of {options.window}³, overlap {options.overlap:g}, batch {options.batch}"
    header = ["", "median s", "range s", "time against ours", "CPU s", "CPU time against ours", "peak GiB"]
    print_table(title, header, rows)
    if len(found) == 2:
        print(_agreement(*found))
    return 0


def _row(side: Side, sides: Sequence[Side]) -> list[str]:
    """A line of the table; processor time tells more than the clock where other work shares the cores."""
    spread = f"{min(side.seconds):.3g}–{max(side.seconds):.3g}"
    against = (side.median / sides[0].median, side.cpu_median / sides[0].cpu_median)
    times = [
        f"{side.median:.3g}",
        spread,
        f"{against[0]:.2f}×",
        f"{side.cpu_median:.3g}",
        f"{against[1]:.2f}×",
    ]
    return [side.name, *times, f"{side.peak_bytes / GIB:.2f}"]


def _agreement(ours: NumpyArray, theirs: NumpyArray) -> str:
    """How far the two results are from each other."""
    error = np.abs(ours - theirs)
    same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    scale = float(np.abs(theirs).max())
    quantile = float(np.quantile(error, 0.999)) / scale
    far = f"logits differ by at most {error.max() / scale:.1e} of the largest (99.9%: {quantile:.1e})"
    return f"{far}; labels equal: {same:.4%}"


def _parser() -> LineParser:
    parser = LineParser(prog="bench.py predict", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--released",
        type=checkout,
        metavar="PATH",
        help="a checkout of the authors' code (needs PyTorch, MONAI)",
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="paper", help="of the network")
    parser.add_argument("--classes", type=whole(1), default=14)
    parser.add_argument("--window", type=whole(1), default=96, help="voxels a side")
    parser.add_argument("--volume", type=whole_numbers(1, 3), default=(96, 96, 144), metavar="H,W,D")
    parser.add_argument("--overlap", type=overlap, default=0.5)
    parser.add_argument("--batch", type=whole(1), default=1, help="windows computed together")
    parser.add_argument("--steps", type=whole(1), default=3, help="measured volumes of each side")
    parser.add_argument("--warm-up", type=whole(0), default=1, help="volumes before, of each side")
    parser.add_argument("--threads", type=whole(0), default=0, help="cores for each side, 0 for all")
    return parser
