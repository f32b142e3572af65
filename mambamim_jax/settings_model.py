"""Everything that can be set of the networks: the one place of a key, its default and its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field

from mambamim_jax.checks import one_of, require


@dataclass(frozen=True)
class HyMambaConfig:
    """MedNeXt stages, then Mamba layers on the kept tokens."""

    channels: tuple[int, ...] = (32, 64, 128, 192, 384)
    depths: tuple[int, ...] = (2, 2, 2, 1)
    expansion: tuple[int, ...] = (2, 4, 4, 4)
    mamba_depth: int = 4
    state: int = 16

    def check(self, key: str) -> None:
        for name, length in (("channels", 5), ("depths", 4), ("expansion", 4)):
            value = getattr(self, name)
            ok = len(value) == length and all(item > 0 for item in value)
            require(ok, f"{key}.{name}", value, f"{length} positive integers")
        check_width(self.channels[-1], f"{key}.channels", self.channels, "the last width")
        require(self.mamba_depth > 0, f"{key}.mamba_depth", self.mamba_depth, "at least 1")
        require(self.state > 0, f"{key}.state", self.state, "at least 1")


@dataclass(frozen=True)
class VisionMambaConfig:
    """A 16³ patch embedding, Mamba layers only, features of several depths lifted to a pyramid."""

    channels: tuple[int, ...] = (64, 128, 192, 384, 384)
    """Widths of the maps at strides 1, 2, 4, 8, 16; the last is the width of the tokens."""
    mamba_depth: int = 12
    feature_depths: tuple[int, ...] = (3, 6, 9, 12)
    """After which layers the maps at strides 2, 4, 8, 16 are taken."""
    state: int = 16

    def check(self, key: str) -> None:
        ok = len(self.channels) == 5 and all(item > 0 for item in self.channels)
        require(ok, f"{key}.channels", self.channels, "5 positive integers")
        check_width(self.channels[-1], f"{key}.channels", self.channels, "the last width")
        taken, last = self.feature_depths, self.mamba_depth
        ok = len(taken) == 4 and sorted({*taken}) == [*taken] and taken[0] > 0 and taken[-1] == last
        expected = f"four increasing layers, the last of them mamba_depth, {last}"
        require(ok, f"{key}.feature_depths", taken, expected)
        require(self.state > 0, f"{key}.state", self.state, "at least 1")


def check_width(width: int, key: str, found: object, what: str) -> None:
    """Raises ConfigError unless a token width suits the 3D sine-cosine position embedding."""
    expected = f"{what} divisible by 6 (3D sine-cosine position embedding)"
    require(width > 0 and width % 6 == 0, key, found, expected, f"try {max(1, round(width / 6)) * 6}")


ENCODERS = ("hymamba", "vision_mamba")


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder, which pre-training and fine-tuning share."""

    encoder: str = "hymamba"
    hymamba: HyMambaConfig = field(default_factory=HyMambaConfig)
    vision_mamba: VisionMambaConfig = field(default_factory=VisionMambaConfig)
    dtype: str = "float32"
    """Compute type; the scan, the statistics of norms and the loss are always in float32."""
    scan: str = "auto"

    def check(self, key: str) -> None:
        one_of(f"{key}.encoder", self.encoder, ENCODERS)
        one_of(f"{key}.dtype", self.dtype, ("float32", "bfloat16"))
        scans = ("auto", "reference", "associative", "sequential", "pallas_triton", "pallas_mosaic")
        one_of(f"{key}.scan", self.scan, scans)


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The encoder, and the decoder that reconstructs hidden patches."""

    filler: str = "toki"
    """What stands in for hidden tokens at the deepest scale."""
    decoder_width: int = 768
    mask_ratio: float = 0.75

    def check(self, key: str) -> None:
        super().check(key)
        fillers = ("toki", "toki_paper", "toki_scrambled", "linear", "learned_token")
        one_of(f"{key}.filler", self.filler, fillers)
        width, advice = self.decoder_width, f"try {max(1, round(self.decoder_width / 16)) * 16}"
        ok = width > 0 and width % 16 == 0
        require(ok, f"{key}.decoder_width", width, "a width divisible by 16 (halved four times)", advice)
