"""Cheaper variants of a request, within what its caller allows: fewer steps, then smaller shapes.

Ladders, one a shape, largest shape first; each goes from all steps down to the fewest allowed. The
first variant that is on time, read from the top, is the cheapest degradation.
"""

from __future__ import annotations

from hocket.v1 import generation_pb2, types_pb2

Ladder = tuple[types_pb2.GenerationSpec, ...]


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
    found = [_ladder(spec, spec.shape, spec.steps - 1, steps_min)]
    found += [
        _ladder(spec, shape, spec.steps, steps_min) for shape in _smaller(spec, limits, model)
    ]
    return tuple(ladder for ladder in found if ladder)


def _ladder(
    spec: types_pb2.GenerationSpec, shape: types_pb2.Shape, steps: int, steps_min: int
) -> Ladder:
    variants = []
    for count in range(steps, steps_min - 1, -1):
        variant = types_pb2.GenerationSpec()
        variant.CopyFrom(spec)
        variant.shape.CopyFrom(shape)
        variant.steps = count
        variants.append(variant)
    return tuple(variants)


def _smaller(
    spec: types_pb2.GenerationSpec,
    limits: types_pb2.DegradeLimits,
    model: generation_pb2.ModelInfo | None,
) -> list[types_pb2.Shape]:
    """Served shapes below the one asked for, largest first; frames stay."""
    width_min = limits.width_min or spec.shape.width
    height_min = limits.height_min or spec.shape.height
    found: dict[tuple[int, int], types_pb2.Shape] = {}
    for served in () if model is None else model.shapes:
        fits = (
            width_min <= served.width <= spec.shape.width
            and height_min <= served.height <= spec.shape.height
        )
        same = (served.width, served.height) == (spec.shape.width, spec.shape.height)
        frames = model is not None and (
            model.HasField("frames") or max(1, served.frames) == max(1, spec.shape.frames)
        )
        if fits and frames and not same:
            found[served.width, served.height] = types_pb2.Shape(
                width=served.width, height=served.height, frames=spec.shape.frames
            )
    order = sorted(found, key=lambda size: (-size[0] * size[1], size))
    return [found[size] for size in order]
