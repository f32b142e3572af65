"""How a launch of the GPU kernels is cut up: channels of a quad, tokens of a chunk, segments of the length."""

from __future__ import annotations

import math

from mambamim_jax.ops.selective_scan.contract import ScanInputs
from mambamim_jax.ops.selective_scan.triton_math import LANES
from mambamim_jax.ops.selective_scan.triton_program import QUAD, SET, Walk
from mambamim_jax.ops.selective_scan.tuning import Launch


def walk(f: ScanInputs, launch: Launch, work: str, reverse: bool, interpret: bool) -> tuple[Walk, int]:
    """The static facts of a launch, for inference, saves or backward, and the segments that the length is cut into.

    Raises: ValueError for channels or a chunk that no kernel takes.
    """
    b, length, e = f.u.shape
    chunk, channels, team, fill = launch.chunk, launch.channels, QUAD, launch.fill
    if work == "inference":
        chunk, channels, team, fill = inference(launch, b, length, e)
    if channels not in (1, 2, 4):
        raise ValueError(f"found {channels} channels a quad, expected 1, 2 or 4")
    least = unit(channels, work)
    if chunk < 1 or chunk % least:
        raise ValueError(
            f"found a chunk of {chunk} tokens, expected a multiple of {least} at {channels} channels a quad"
        )
    side = abreast(launch, b, length, e, f.A.shape[1]) if work == "inference" else 1
    if side > 1:
        chunk, channels, team = -(-length // (side * _turns(launch, side, length))), 1, QUAD
    doubled = work == "saves" and is_wide(launch, b, length, e)
    if doubled:
        channels = wide(launch)
    chunks, some = -(-length // chunk), warps(b * e, channels, team)
    if work == "backward":
        fill = launch.backward_fill
    per_segment = -(-chunks // (1 if side > 1 else segments(launch, fill, some, length)))
    count = -(-chunks // per_segment)
    step = math.lcm(chunk, launch.ends_chunk) // chunk
    rounded = -(-per_segment // step) * step
    if count > 1 and -(-chunks // rounded) == count:  # as many segments, and `ends` may have its own chunks
        per_segment = rounded
    adjacent = work == "inference" and (side > 1 or team > QUAD or some * count <= launch.few)
    facts = Walk(
        samples=b,
        length=length,
        chunk=chunk,
        channels=channels,
        team=team,
        block=LANES * (launch.backward_warps if work == "backward" else launch.warps * side),
        per_segment=per_segment,
        reverse=reverse,
        skip=0,
        adjacent=adjacent,
        shift=int(work != "inference" and not doubled and channels < QUAD),
        rejoins=adjacent or work == "backward",
        wide=doubled,
        abreast=side,
        interpret=interpret,
    )
    return facts, count


def unit(channels: int, work: str) -> int:
    """Tokens of the shortest chunk: a group, or where states are saved one of each half of the backward pass."""
    return QUAD // channels * (1 if work == "inference" else 2)


def ends(walk: Walk, launch: Launch) -> Walk:
    """The walk of the launch that finds the ends of a walk's segments, in chunks of its own where they fit."""
    chunk, tokens = launch.ends_chunk, walk.chunk * walk.per_segment
    if tokens % chunk or chunk % walk.together:
        return walk
    return walk._replace(chunk=chunk, per_segment=tokens // chunk)


def warps(sequences: int, channels: int, team: int = QUAD) -> int:
    """Warps of one segment of so many sequences, a channel of a sample each."""
    return max(sequences * team // (LANES * channels), 1)


def segments(launch: Launch, fill: int, warps: int, length: int) -> int:
    """How many segments fill the card with warps, twice as many where they would be long and warps few."""
    count = max(min(fill // warps, length // launch.shortest), 1)
    return 2 * count if 2 * warps <= fill and length // count >= launch.long else count


def would_be_short(launch: Launch, fill: int, warps: int, length: int) -> bool:
    """Whether warps are so few that twice as many are still few, and segments that fill the card would be short.

    Half the channels make twice the warps, so that half as many segments are enough.
    """
    return 2 * warps <= launch.few and length // segments(launch, fill, warps, length) < launch.halve_below


def wide(launch: Launch) -> int:
    """Channels of a quad of a forward pass that saves, where segments would not be short."""
    return min(2 * launch.channels, QUAD)


def is_wide(launch: Launch, b: int, length: int, e: int) -> bool:
    """Whether a forward pass that saves has twice the channels of the backward pass, for less work a channel."""
    few = warps(b * e, wide(launch))
    return launch.channels < QUAD and not would_be_short(launch, launch.fill, few, length)


def abreast(launch: Launch, b: int, length: int, e: int, n: int) -> int:
    """Warps of a program that walk chunks side by side in a pass that saves nothing, up to eight; 1 for none.

    As many as chunks, if the card has room for them. Fewer, that walk several chunks each, only where the length
    would be cut otherwise.
    """
    if n != SET or launch.warps > 1 or length >= launch.abreast_below:
        return 1
    side, programs = 8, warps(b * e, 1)
    while side > 1 and side // 2 * launch.abreast >= length:
        side //= 2
    if _turns(launch, side, length) == 1 and side * programs <= launch.fill:
        return side
    _, channels, team, fill = inference(launch, b, length, e)
    if segments(launch, fill, warps(b * e, channels, team), length) == 1:
        return 1
    while side > 1 and side * programs > launch.few:
        side //= 2
    return side


def _turns(launch: Launch, side: int, length: int) -> int:
    """Chunks that each of so many warps walks."""
    return -(-length // (side * launch.abreast))


def inference(launch: Launch, b: int, length: int, e: int) -> tuple[int, int, int, int]:
    """Chunk, channels, team and fill of a pass that saves nothing.

    Channels are halved where segments would be short, down to one; then, rather than to cut the length, the team is
    doubled, with half the states a lane.
    """
    chunk, channels, team, fill = launch.inference_chunk, launch.inference_channels, QUAD, launch.fill
    while chunk % (2 * team // channels) == 0:
        some = warps(b * e, channels, team)
        if not would_be_short(launch, fill, some, length):
            break
        if channels == 1 and (team > QUAD or segments(launch, fill, some, length) == 1):
            break
        channels, team, fill = max(channels // 2, 1), team * (2 if channels == 1 else 1), launch.few
    return chunk, channels, team, fill
