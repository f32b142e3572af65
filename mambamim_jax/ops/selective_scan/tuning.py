"""Launch sizes of the GPU kernels, one small table keyed by compute capability.

`launch/bench.py scan --sweep` prints the times from which the rows are chosen.
"""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """How the kernels are cut up. A program is a few warps of one sample and segment; four lanes are a quad.

    Channels of a quad are 1, 2 or 4, chunks multiples of 4 / channels.
    """

    inference_chunk: int  # tokens unrolled where no states are saved
    inference_channels: int  # channels of a quad there
    chunk: int  # tokens from one saved state to the next, unrolled, half as many for states of more than 16;
    # the backward pass keeps the states of all of them in registers
    channels: (
        int  # channels of a quad in the backward pass; at most twice as many in a forward pass that saves
    )
    warps: int  # warps of a forward program
    backward_warps: int  # of a backward program; half as many where e does not divide into programs of them
    fill: int  # warps that fill the card; where a launch has fewer, the length is split into segments
    shortest: int  # tokens below which a segment is not split further
    halve_below: int  # tokens of a segment below which inference halves its channels, where warps are few
    few: int  # warps that fill the card then; with so many each may take registers for reading B and C in fours
    long: int  # tokens of a segment from which there are twice as many, where warps are few
    backward_fill: int  # warps that fill it in the backward pass
    ends_chunk: int  # tokens unrolled where the ends of segments are found, if those divide into them
    abreast: int  # tokens of a chunk, at most, where warps of an inference program walk chunks side by side
    abreast_below: int  # tokens of a sequence from which they do not; 0 for never


# The row of (8, 0) is that of (9, 0) with its own fill, not measured.
TUNED = {
    (8, 0): Launch(8, 4, 8, 2, 1, 4, 108 * 12, 48, 128, 108 * 8, 1024, 108 * 8, 10, 16, 900),
    (9, 0): Launch(8, 4, 8, 2, 1, 4, 132 * 12, 48, 128, 132 * 8, 1024, 132 * 8, 10, 16, 900),
}


def launch_for(capability: tuple[int, int]) -> Launch:
    """The row of the newest measured card that is no newer than this one."""
    return TUNED[max((row for row in TUNED if row <= capability), default=min(TUNED))]
