"""What a worker tells of its models: the cards' facts, as the API has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gpuworker.memory.weights import WeightStore
from gpuworker.models.card import CardFacts, ModelCard
from gpuworker.operations.names import offered
from hocket.v1 import generation_pb2, types_pb2


def models_info(
    cards: Mapping[str, ModelCard], weights: WeightStore, batch_max: int, *, alone: bool
) -> tuple[generation_pb2.ModelInfo, ...]:
    """Of all cards; `alone`: the worker joins no groups."""
    found = []
    for name, card in cards.items():
        parts = weights.model_parts(name)
        facts = replace(card.facts, degrees=(1,)) if alone else card.facts
        able = offered(card.operations, {node for node, _ in parts})
        found.append(model_info(facts, batch_max, able, parts, card.adapters))
    return tuple(found)


def model_info(
    facts: CardFacts,
    batch_max: int = 1,
    operations: Sequence[str] = (),
    parts: Sequence[tuple[str, str]] = (),
    adapters: Sequence[str] = (),
) -> generation_pb2.ModelInfo:
    """A card's facts as the API tells them; `operations` of workflows it serves, too; `parts` are
    (node, part).
    """
    shapes = [
        types_pb2.Shape(width=w, height=h, frames=facts.frames_default, fps=facts.fps)
        for w, h in facts.sizes or (facts.size_default,)
    ]
    free = not facts.sizes
    return generation_pb2.ModelInfo(
        name=facts.name,
        family=facts.family,
        workflows=facts.workflows,
        shapes=shapes,
        frames=_frame_counts(facts),
        size_multiple=facts.size_multiple if free else 0,
        size_min=facts.size_min if free else 0,
        size_max=facts.size_max if free else 0,
        pixels_max=facts.pixels_max or facts.size_max**2 if free else 0,
        steps_min=facts.steps_min,
        steps_max=facts.steps_max,
        steps_default=facts.steps_default,
        guidance_kind="cfg" if facts.guidance == "true_cfg" else facts.guidance,
        guidance_min=facts.guidance_min,
        guidance_max=facts.guidance_max,
        guidance_default=facts.guidance_default,
        degrees=facts.degrees,
        examples=facts.examples,
        batch_max=batch_max,
        operations=operations,
        parts=[generation_pb2.ModelPart(node=node, part=part) for node, part in parts],
        adapters=adapters,
        obeys_layout=True,
        branches_above=facts.branches_above if facts.guidance == "true_cfg" else None,
    )


def _frame_counts(facts: CardFacts) -> generation_pb2.FrameCounts | None:
    """Of a model of videos."""
    if facts.frames_max <= 1:
        return None
    return generation_pb2.FrameCounts(
        minimum=facts.frames_min,
        maximum=facts.frames_max,
        multiple=facts.frames_multiple,
        offset=facts.frames_offset % facts.frames_multiple,
        default_count=facts.frames_default,
    )
