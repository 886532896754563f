"""Which numbers of frames a video family takes, where a folder's card.json may narrow or widen it.

A family's autoencoder makes one latent frame of the first frame and one of each `multiple` frames
behind it: videos are one frame more than a multiple long. How long at most is what the family's
documentation says it was made for; card.json has the last word ("frames_max", "frames_default").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gpuworker.models.card import ModelRefused


class FrameCounts(NamedTuple):
    """Numbers 1 + k `multiple` up to `most`, and the one where none is asked for."""

    multiple: int
    most: int
    default: int


def frame_counts(card: Mapping[str, Any], multiple: int, most: int, default: int) -> FrameCounts:
    """The family's numbers, by card.json: `most` and `default` are the family's own, rounded down.

    Raises `ModelRefused` where card.json has none that the autoencoder can make.
    """
    highest = _down(_positive(card, "frames_max", most), multiple)
    if "frames_default" not in card:
        return FrameCounts(multiple, highest, _down(min(default, highest), multiple))
    wanted = _positive(card, "frames_default", default)
    if wanted > highest or wanted != _down(wanted, multiple):
        allowed = f"1..{highest}, 1 more than a multiple of {multiple}"
        raise ModelRefused("card.json", f"frames_default={wanted}: allowed is {allowed}")
    return FrameCounts(multiple, highest, wanted)


def _positive(card: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = card.get(name, otherwise)
    if not isinstance(value, int) or value < 1:
        raise ModelRefused("card.json", f"{name}={value!r}: allowed is 1 and more")
    return value


def _down(frames: int, multiple: int) -> int:
    return (frames - 1) // multiple * multiple + 1
