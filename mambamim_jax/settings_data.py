"""Everything that can be set of preprocessing: the one place of a key, its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass

from mambamim_jax.checks import ConfigError, hu_window
from mambamim_jax.types import Spacing


@dataclass(frozen=True)
class PreprocessConfig:
    """What becomes of each volume. One store has one spacing, window and encoding."""

    source: str = ""
    """Folders (nnU-Net raw, Decathlon or plain) or Decathlon .json files, separated by commas."""
    format: str = "auto"
    """auto, nnunet, decathlon or folder; for all sources."""
    spacing: Spacing = (1.5, 1.5, 1.5)
    """mm along right, anterior, superior."""
    window: tuple[float, float] = (-175.0, 250.0)
    """HU; what lies above the low end is foreground. All HU are kept, so training may use another window."""
    encoding: str = "npy"
    """npy: fastest while the set fits the memory. blosc2: about half of the bytes, for sets that do not."""
    labels: str = "volume"
    """volume: the nearest voxel, then each organ's volume put right at its border. nearest: nothing but that."""
    max_lost: float = 0.1
    """Stop with an error where more than this share of the volumes can't be used."""
    workers: int = 0
    """Processes; 0 for one per core, at most eight. Each holds one volume: some 2 GiB for 512×512×1500."""

    def check(self, key: str) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ConfigError(f"config.{name}", f"found {getattr(self, name)!r}", expected)

        require(
            self.source.replace(",", " ").strip() != "",
            "source",
            "one or more folders: --source=FOLDER[,FOLDER…]",
        )
        require(min(self.spacing) > 0, "spacing", "three positive lengths in mm")
        hu_window("window", self.window)
        require(
            self.format in ("auto", "nnunet", "decathlon", "folder"),
            "format",
            "auto, nnunet, decathlon or folder",
        )
        require(self.encoding in ("npy", "blosc2"), "encoding", "npy or blosc2")
        require(self.labels in ("nearest", "volume"), "labels", "nearest or volume")
        require(0 <= self.max_lost <= 1, "max_lost", "a share in [0, 1]")
        require(self.workers >= 0, "workers", "0 or more")
