"""Limits of sizes that an operator sets in card.json, within those of the model's family.

size_max      the longest side, in pixels; no more than the family's
pixels_max    width times height at most; longer sides are then for flatter pictures only
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpuworker.models.card import CardFacts, ModelRefused


def limited(facts: CardFacts, card: Mapping[str, Any]) -> CardFacts:
    """The facts, by what card.json says. Raises `ModelRefused`: the default size must fit."""
    side, pixels = max(facts.size_default), facts.size_default[0] * facts.size_default[1]
    size_max = _stated(card, "size_max", facts.size_max, side)
    if size_max > facts.size_max:
        allowed = f"at most the family's {facts.size_max}"
        raise ModelRefused("card.json", f"size_max={size_max}: allowed is {allowed}")
    pixels_max = _stated(card, "pixels_max", facts.pixels_max, pixels)
    return replace(facts, size_max=size_max, pixels_max=pixels_max)


def _stated(card: Mapping[str, Any], name: str, otherwise: int, least: int) -> int:
    if name not in card:
        return otherwise
    value = card[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        allowed = f"{least}, of the default size, or more"
        raise ModelRefused("card.json", f"{name}={value!r}: allowed is {allowed}")
    return value
