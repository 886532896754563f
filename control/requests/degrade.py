"""Cheaper variants of a request, within what its caller allows: fewer steps, then smaller shapes.

Ladders, one a shape, largest shape first; each goes from all steps down to the fewest allowed. The
first variant that is on time, read from the top, is the cheapest degradation. A ladder is its two
ends: variants are made where one is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from hocket import free_sizes
from hocket.v1 import generation_pb2, types_pb2

_SCALES = (0.75, 0.5, 0.375, 0.25)


@dataclass(frozen=True, slots=True)
class Ladder:
    """The variants of one shape."""

    width: int
    height: int
    most: int  # steps, of its first variant …
    fewest: int  # … and of its last


def ladders(
    spec: types_pb2.GenerationSpec,
    limits: types_pb2.DegradeLimits,
    model: generation_pb2.ModelInfo | None,
) -> tuple[Ladder, ...]:
    """Variants of `spec`, without itself; steps and shapes are such as the model serves."""
    steps_min = spec.steps
    if limits.steps_min:
        served_min = max(1, model.steps_min if model is not None else 1)
        steps_min = min(spec.steps, max(limits.steps_min, served_min))
    found = [Ladder(spec.shape.width, spec.shape.height, spec.steps - 1, steps_min)]
    found += [
        Ladder(width, height, spec.steps, steps_min)
        for width, height in _smaller(spec, limits, model)
    ]
    return tuple(ladder for ladder in found if ladder.most >= ladder.fewest)


def _smaller(
    spec: types_pb2.GenerationSpec,
    limits: types_pb2.DegradeLimits,
    model: generation_pb2.ModelInfo | None,
) -> list[tuple[int, int]]:
    """Widths and heights served below the one asked for, largest first; frames stay."""
    width_min = limits.width_min or spec.shape.width
    height_min = limits.height_min or spec.shape.height
    asked = (spec.shape.width, spec.shape.height)
    found = {
        (width, height)
        for width, height in _sizes(spec, model)
        if width_min <= width <= asked[0] and height_min <= height <= asked[1]
    }
    return sorted(found - {asked}, key=lambda size: (-size[0] * size[1], size))


def _sizes(
    spec: types_pb2.GenerationSpec, model: generation_pb2.ModelInfo | None
) -> list[tuple[int, int]]:
    """Recommended widths and heights; where sizes are free, also smaller ones of the same form."""
    if model is None:
        return []
    frames = max(1, spec.shape.frames)
    found = [
        (shape.width, shape.height)
        for shape in model.shapes
        if model.HasField("frames") or max(1, shape.frames) == frames
    ]
    if free_sizes.are_free(model):
        shape = spec.shape
        found += [free_sizes.scaled(model, shape.width, shape.height, s) for s in _SCALES]
    return found
