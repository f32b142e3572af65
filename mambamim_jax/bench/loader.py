"""``launch/bench.py loader``: crops per second from a store through the whole loader, warm and cold.

python launch/bench.py loader [--source=FOLDER[,FOLDER…]] [--volumes=12] [--monai] [--cold] [--steps=5]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mambamim_jax.bench.alternate import Side, SideError, measure
from mambamim_jax.bench.tables import print_table
from mambamim_jax.checks import LineParser, whole

HERE = "mambamim_jax.bench.loader"


class Reading:
    """Reads ``batches`` batches a step; each step goes on where the last ended, with nothing read ahead.

    With ``cold`` a step is one epoch, so that every volume is read for the first time since the page cache
    was emptied, and a batch one volume: of an epoch of few volumes half the time would go to reading ahead.
    """

    def __init__(
        self,
        store: str,
        crop: int,
        batches: int,
        dtype: str,
        threads: int,
        workers: int = 0,
        cold: bool = False,
    ) -> None:
        from mambamim_jax.data.loader import PretrainLoader
        from mambamim_jax.data.store import open_store

        self._loader = PretrainLoader(
            open_store(store),
            crop=(crop,) * 3,
            volumes_per_batch=1 if cold else 4,
            threads=threads,
            workers=workers,
            dtype=dtype,
        )
        self._batches, self._cold = int(self._loader.batches_per_epoch) if cold else batches, cold
        self._examples = 0
        self._iterator: Any = None

    def prepare(self) -> None:
        """Not timed: empty or fill the page cache, start the threads or processes, use up what they read ahead."""
        self._iterator = None
        (forget if self._cold else remember)(self._loader.store.folder)
        self._iterator = iter(self._loader)
        self._iterator.set_state(self._iterator.get_state() | {"examples": self._examples})
        if self._loader.workers:
            for _ in range(4 * self._loader.workers):
                self._read()

    def __call__(self) -> float:
        return float(sum(self._read() for _ in range(self._batches)))

    def rest(self) -> None:
        """Reading ahead would go on during the other sides' steps."""
        self._iterator = None
        time.sleep(0.1)  # for the batches that were begun

    def _read(self) -> int:
        self._examples += self._loader.volumes_per_batch
        return len(next(self._iterator)["image"])

    def facts(self) -> dict[str, Any]:
        """Whether the time on a CPU is all of it."""
        return {"cpu": not self._loader.workers}


def copying(crop: int, dtype: str) -> Callable[[], float]:
    """The machine's limit: copy crops' worth of memory, out of the caches, on one core."""
    import numpy as np

    source = np.ones((64, crop, crop, crop), dtype)
    target = np.empty_like(source)

    def step() -> float:
        for _ in range(4):
            np.copyto(target, source)
        return 4.0 * len(source)

    return step


def forget(folder: Path) -> None:
    """Have the kernel drop a store's files from the page cache."""
    from mambamim_jax.data import arrays

    arrays._open.cache_clear()  # mapped pages can't be dropped
    for path in Path(folder).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def remember(folder: Path) -> None:
    """Have a store's files in the page cache, which a cold side may have emptied."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(2**22):
                    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 2 where a side cannot run."""
    parser = LineParser(prog="bench.py loader", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", help="data sets, commas between; phantoms if not given")
    parser.add_argument(
        "--volumes", type=whole(0), default=0, help="as many of them, spread evenly; 0 for all"
    )
    parser.add_argument("--crop", type=whole(1), default=96)
    parser.add_argument("--batches", type=whole(1), default=40, help="batches of 16 crops in a step")
    parser.add_argument("--steps", type=whole(1), default=5)
    parser.add_argument("--threads", type=whole(1), default=2)
    parser.add_argument(
        "--cold", action="store_true", help="also one epoch a step with the page cache emptied before"
    )
    parser.add_argument("--monai", action="store_true", help="also MONAI's chain (needs MONAI and PyTorch)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            stores, images, note = _stores(options, Path(folder))
            sides = _sides(options, stores, images, folder)
            measure(sides, steps=options.steps)
        except (SideError, ValueError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 2
    limit = {side.name: side.value / side.median for side in sides if side.name.startswith("copy")}
    rows = []
    for side in sides:
        rate = side.value / side.median
        kind = "float32" if "float32" in side.name or "MONAI" in side.name else "int16"
        row = [
            side.name,
            f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}",
            f"{rate / limit[f'copy {kind}, one core']:.2f}",
        ]
        complete = side.facts.get("cpu", True)
        row += [
            f"{1e3 * side.cpu_median / side.value:.2f}" if complete else "",
            f"{side.peak_bytes / 2**20:.0f}",
        ]
        rows.append(row)
    title = f"Loader: {options.crop}³ crops, {options.threads} threads{note}"
    print_table(title, ["", "crops/s", "of one core's copying", "CPU ms a crop", "peak MiB"], rows)
    return 0


def _stores(options: argparse.Namespace, folder: Path) -> tuple[dict[str, str], list[str], str]:
    """Prepare the cases in each encoding there is; where the stores are, the images in them, and a line about
    their size.
    """
    from mambamim_jax.data import arrays, datasets, store
    from mambamim_jax.data.phantom import write_phantoms

    sources = options.source or str(write_phantoms(folder / "phantoms", count=12))
    cases = datasets.discover_all(sources.split(","))
    if options.volumes:
        cases = [cases[n * len(cases) // options.volumes] for n in range(options.volumes)]
    stores, sizes = {}, []
    for encoding in arrays.ENCODINGS:
        try:
            arrays.require(encoding)
        except store.StoreError as error:
            print(error, file=sys.stderr)
            continue
        start = time.perf_counter()
        made = store.prepare(cases, folder / encoding, encoding=encoding, max_lost=0.9)
        bytes_ = sum(p.stat().st_size for p in made.folder.rglob("image.*"))
        voxels = sum(int(a * b * c) for a, b, c in (entry.shape for entry in made.entries))
        took = (time.perf_counter() - start) / len(made)
        size = f"{bytes_ / len(made) / 2**20:.1f} MiB a volume, {bytes_ / voxels:.2f} bytes a voxel"
        sizes.append(f"{encoding} {size}, {took:.2f} s")
        stores[encoding] = str(made.folder)
    images = [line["image"] for line in made.report if line["status"] == "used"]
    return stores, images, f"; {len(made)} volumes: {'; '.join(sizes)}"


def _sides(options: argparse.Namespace, stores: dict[str, str], images: list[str], folder: str) -> list[Side]:
    sides = [
        Side(f"copy {kind}, one core", f"{HERE}:copying", {"crop": options.crop, "dtype": kind})
        for kind in ("int16", "float32")
    ]
    shared: dict[str, Any] = {"crop": options.crop, "batches": options.batches, "threads": options.threads}
    for encoding, path in stores.items():
        for dtype in ("int16", "float32"):
            arguments = shared | {"store": path, "dtype": dtype}
            sides.append(Side(f"{encoding} {dtype}, warm", f"{HERE}:Reading", arguments))
        arguments = shared | {"store": path, "dtype": "int16"}
        if encoding == "blosc2":
            sides.append(
                Side("blosc2 int16, 2 processes, warm", f"{HERE}:Reading", arguments | {"workers": 2})
            )
        if options.cold:
            sides.append(Side(f"{encoding} int16, cold", f"{HERE}:Reading", arguments | {"cold": True}))
    if options.monai:
        for mode, volumes in (("plain", 2), ("persistent", 12), ("memory", 12)):
            arguments = {"images": images, "mode": mode, "crop": options.crop, "volumes": volumes}
            arguments |= {"cache": f"{folder}/monai", "threads": options.threads}
            sides.append(Side(f"MONAI, {mode}", "mambamim_jax.bench.monai_chain:loader", arguments))
    return sides
