"""Which numbers of frames a model's videos may have, as `ModelInfo.frames` tells it.

Nothing here looks at a model: the gateway refuses by it, the command line shows it.
"""

from __future__ import annotations

from hocket.v1.generation_pb2 import FrameCounts


def offers(counts: FrameCounts, frames: int) -> bool:
    """Whether a video may have so many."""
    return counts.minimum <= frames <= counts.maximum and _beyond(counts, frames) == 0


def nearest(counts: FrameCounts, frames: int) -> int:
    """The number on offer that is nearest; the smaller one of two."""
    within = min(max(frames, counts.minimum), counts.maximum)
    below = within - _beyond(counts, within)
    above = below + max(1, counts.multiple)
    near = [number for number in (below, above) if offers(counts, number)]
    return min(near, key=lambda number: abs(number - frames), default=counts.default_count)


def described(counts: FrameCounts) -> str:
    """In words: "1 to 121, 1 more than a multiple of 4"."""
    if counts.minimum == counts.maximum:
        return str(counts.minimum)
    span = f"{counts.minimum} to {counts.maximum}"
    if counts.multiple <= 1:
        return span
    ahead = f"{counts.offset} more than a multiple" if counts.offset else "a multiple"
    return f"{span}, {ahead} of {counts.multiple}"


def _beyond(counts: FrameCounts, frames: int) -> int:
    """How many more than the next lower number that fits the multiple."""
    return (frames - counts.offset) % max(1, counts.multiple)
