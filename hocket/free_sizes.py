"""Which widths and heights a model takes where its sizes are free, as `ModelInfo` tells it.

Nothing here looks at a model: the gateway refuses by it, the command line shows it. All numbers are
pixels.
"""

from __future__ import annotations

import math

from hocket.v1.generation_pb2 import ModelInfo


def are_free(info: ModelInfo) -> bool:
    """Whether the model takes other sizes than those of its shapes."""
    return info.size_multiple > 0


def takes_side(info: ModelInfo, side: int) -> bool:
    """Whether a width or a height may be that, beside another that is small enough."""
    return info.size_min <= side <= info.size_max and side % info.size_multiple == 0


def takes(info: ModelInfo, width: int, height: int) -> bool:
    """Whether a result may have that size."""
    sides = takes_side(info, width) and takes_side(info, height)
    return sides and width * height <= info.pixels_max


def nearest(info: ModelInfo, width: int, height: int) -> tuple[int, int]:
    """A size that the model takes, near to that; of nearly the same proportions."""
    width, height = _within(info, width), _within(info, height)
    if width * height > info.pixels_max:
        shrunk = math.sqrt(info.pixels_max / (width * height))
        width, height = (_down(info, side * shrunk) for side in (width, height))
        # One side may have been raised to the least: the other one makes room.
        if width * height > info.pixels_max:
            least, most = min(width, height), _down(info, info.pixels_max / min(width, height))
            width, height = (least, most) if width <= height else (most, least)
    return width, height


def scaled(info: ModelInfo, width: int, height: int, scale: float) -> tuple[int, int]:
    """The next size that the model takes at or below `scale` times one that it takes."""
    return _down(info, width * scale), _down(info, height * scale)


def described(info: ModelInfo) -> str:
    """In words: "16 to 2048 in steps of 16, at most 4194304 pixels"."""
    return f"{described_side(info)}, at most {info.pixels_max} pixels"


def described_side(info: ModelInfo) -> str:
    """In words: "16 to 2048 in steps of 16"."""
    return f"{info.size_min} to {info.size_max} in steps of {info.size_multiple}"


def _within(info: ModelInfo, side: int) -> int:
    multiple = info.size_multiple
    rounded = (side + multiple // 2) // multiple * multiple
    highest = info.size_max // multiple * multiple
    return max(_least(info), min(rounded, highest))


def _down(info: ModelInfo, side: float) -> int:
    return max(_least(info), int(side) // info.size_multiple * info.size_multiple)


def _least(info: ModelInfo) -> int:
    return -(-info.size_min // info.size_multiple) * info.size_multiple
