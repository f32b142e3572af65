"""MONAI's chain of transforms for the same crops, as a baseline to measure against (needs MONAI and
PyTorch).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

SPACING, WINDOW = (1.5, 1.5, 1.5), (-175.0, 250.0)


def fixed(spacing: tuple[float, ...] = SPACING, window: tuple[float, float] = WINDOW) -> list[Any]:
    """The part before anything random: load, orient, resample, window."""
    from monai import transforms as t

    low, high = window
    return [
        t.LoadImaged("image"),
        t.EnsureChannelFirstd("image"),
        t.Orientationd("image", axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S"))),
        t.Spacingd("image", pixdim=spacing, mode="bilinear"),
        t.ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
    ]


def loader(
    images: list[str], mode: str, crop: int, volumes: int, cache: str = "", threads: int = 0
) -> Callable[[], float]:
    """A callable that reads ``volumes`` items of four crops and returns the number of crops.

    Args:
        images: files. mode: ``plain``, ``persistent`` (its disk cache, in ``cache``) or ``memory``. threads: PyTorch's.
    """
    import monai.data
    import torch
    from monai import transforms as t

    warnings.simplefilter("ignore")
    torch.set_num_threads(max(threads, 1))
    size = (crop,) * 3
    random = [
        t.CropForegroundd("image", source_key="image"),
        t.SpatialPadd("image", spatial_size=size),
        t.RandCropByPosNegLabeld("image", "image", size, pos=1, neg=0, num_samples=4),
        *(t.RandFlipd("image", prob=p, spatial_axis=axis) for axis, p in enumerate((0.2, 0.2, 0.1))),
    ]
    chain = t.Compose([*fixed(), *random])
    files = [{"image": image} for image in images]
    if mode == "persistent":
        data: Any = monai.data.PersistentDataset(files, chain, cache_dir=cache)
    elif mode == "memory":
        data = monai.data.CacheDataset(files, chain, progress=False, num_workers=1)
    else:
        data = monai.data.Dataset(files, chain)
    if mode == "persistent":
        for n in range(len(files)):
            data[n]
    place = 0

    def step() -> float:
        nonlocal place
        crops = 0
        for _ in range(volumes):
            crops += len(data[place % len(files)])
            place += 1
        return float(crops)

    return step


def preprocess(image: str, threads: int = 1) -> Callable[[], float]:
    """A callable that takes one file through the fixed part, foreground and padding, and returns its
    voxels.
    """
    import torch
    from monai import transforms as t

    warnings.simplefilter("ignore")
    torch.set_num_threads(max(threads, 1))
    chain = t.Compose(
        [
            *fixed(),
            t.CropForegroundd("image", source_key="image"),
            t.SpatialPadd("image", spatial_size=(96,) * 3),
        ]
    )
    return lambda: float(chain({"image": image})["image"].numel())
