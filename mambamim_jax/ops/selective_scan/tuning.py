"""Launch sizes of the GPU kernels, one small table keyed by compute capability.

`launch/bench.py scan --sweep` prints the times from which the rows were chosen.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """How the kernels are cut up. A program is a few warps of one sample and segment; four lanes are a quad."""

    inference_chunk: int  # tokens unrolled where no states are saved
    chunk: int  # tokens between two saved states, unrolled in the kernels
    warps: int  # warps of a forward program
    backward_warps: int  # warps of a backward program
    fill: int  # warps that fill the card; where a launch has fewer, the length is split into segments
    shortest: int  # tokens below which a segment is not split further
    channels: int = 2  # channels of a quad: 1, 2 or 4; chunks and parts are multiples of 4 / channels
    part: int = 8  # tokens unrolled in the backward pass, their states in registers; divides the chunk
    ahead: bool = False  # forward: read a chunk while the one before it is worked on
    backward_ahead: bool = False  # backward: read a part while the one before it is worked on
    kept: int = 1  # backward: tokens of a part, the last ones, whose decays stay in registers too
    again: bool = True  # backward: exchange a second time instead of keeping what was exchanged
    joined: bool = False  # backward: sum dB and dC over a program's warps in the kernel
    early: bool = False  # backward: use the state after a token as soon as it is recomputed


# (9, 0) is compiled to 168 registers without spills; none of these is measured.
TUNED = {
    (8, 0): Launch(8, 8, 1, 1, 108 * 12, 48),
    (9, 0): Launch(8, 8, 1, 1, 132 * 12, 48),
}


def launch_for(capability: tuple[int, int]) -> Launch:
    """The row of the newest measured card that is no newer than this one."""
    return TUNED[max((row for row in TUNED if row <= capability), default=min(TUNED))]
