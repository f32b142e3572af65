"""``launch/bench.py preprocess``: one volume from file to store, against MONAI's chain, time and peak memory.

python launch/bench.py preprocess [--monai] [--steps=5] [IMAGE …]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mambamim_jax.bench.alternate import Side, SideError, measure
from mambamim_jax.bench.tables import print_table
from mambamim_jax.checks import LineParser, whole


class ToStore:
    """All that is done for one case, written to a new store each time."""

    def __init__(self, image: str):
        self._image, self._folder = image, ""

    def prepare(self) -> None:
        """Not timed: an empty store."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = tempfile.mkdtemp()
        (Path(self._folder) / "volumes").mkdir()

    def __call__(self) -> float:
        from mambamim_jax.data import preprocess

        job: dict[str, Any] = {"store": self._folder, "record": "record.json", "id": "x", "source": "bench"}
        job |= {"images": [self._image], "label": None, "spacing": [1.5] * 3, "window": [-175.0, 250.0]}
        record = preprocess.run(job | {"encoding": "npy", "intensity": "hu", "labels": "volume"})
        if record["status"] != "used":
            raise ValueError(record["message"])
        return float(len(record["volume"]))

    def facts(self) -> dict[str, Any]:
        """Nothing to tell; the last store is removed."""
        shutil.rmtree(self._folder, ignore_errors=True)
        return {}


def resampled(image: str) -> Callable[[], float]:
    """Reading and resampling alone."""
    import numpy as np

    from mambamim_jax.data import nifti, volume

    return lambda: float(volume.resample(nifti.read(image), (1.5, 1.5, 1.5), dtype=np.int16).voxels.size)


def synthetic(path: Path, slices: int) -> Path:
    """A 512×512 CT of many slices: a phantom, enlarged."""
    import nibabel
    import numpy as np

    from mambamim_jax.data.anatomy import draw_phantom

    rng = np.random.default_rng(0)
    hu, _ = draw_phantom(rng, (2.8125, 2.1875, 3.0), (20, 330))
    grid = [np.arange(n) * m // n for n, m in zip((512, 512, slices), hu.shape)]
    big = hu[np.ix_(*grid)] + rng.integers(-12, 13, (512, 512, slices)).astype(np.int16)
    affine = np.diag([-0.703, -0.703, 310 / slices, 1.0])
    nibabel.save(nibabel.Nifti1Image(big, affine), path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 where a side cannot run."""
    parser = LineParser(prog="bench.py preprocess", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="*", help="files; a made-up 512×512×140 CT if none are given")
    parser.add_argument("--slices", type=whole(1), default=140, help="of the made-up CT")
    parser.add_argument("--steps", type=whole(1), default=5)
    parser.add_argument("--monai", action="store_true", help="also MONAI's chain (needs MONAI and PyTorch)")
    options = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = options.images or [
            str(synthetic(Path(folder) / f"ct_512x512x{options.slices}.nii.gz", options.slices))
        ]
        for image in images:
            here = "mambamim_jax.bench.preprocess"
            sides = [Side("ours, to the store", f"{here}:ToStore", {"image": image}, 1)]
            sides += [Side("ours, read and resample", f"{here}:resampled", {"image": image}, 1)]
            if options.monai:
                sides += [Side("MONAI", "mambamim_jax.bench.monai_chain:preprocess", {"image": image}, 1)]
            try:
                measure(sides, steps=options.steps)
            except SideError as error:
                print(error, file=sys.stderr)
                return 2
            for side in sides:
                ratio = f"{sides[-1].median / side.median:.1f}" if options.monai else ""
                figures = [f"{1e3 * side.median:.0f}", ratio, f"{side.peak_bytes / 2**20:.0f}"]
                rows.append([Path(image).name, side.name, *figures])
    print_table("Preprocessing one volume, one core", ["file", "", "ms", "times faster", "peak MiB"], rows)
    return 0
