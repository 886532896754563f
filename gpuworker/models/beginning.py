"""What a job may begin with, checked before anything is computed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gpuworker.models.card import Asked, CardFacts, ShapeRefused
from gpuworker.state import LatentState


def check_texts(facts: CardFacts, asked: Asked) -> None:
    """Raises `ShapeRefused` for settings that a model cannot do, a negative prompt among them."""
    facts.check(*asked[2:7])
    if asked.negative_prompt and facts.guidance != "true_cfg":
        allowed = "none: this model has no CFG"
        raise ShapeRefused("negative_prompt", asked.negative_prompt, allowed)


def check_begin(
    facts: CardFacts,
    maker: str,
    inpaints: bool,
    embeddings: LatentState,
    asked: Asked,
    latents: LatentState | None,
    strength: float,
    mask: NDArray[np.uint8] | None,
) -> None:
    """Raises `ShapeRefused` for what a job cannot begin with; `maker`: the kind of card whose
    embeddings it takes.
    """
    facts.check(*asked[2:7])
    if (made_by := embeddings.facts.get("made_by")) != maker:
        raise ShapeRefused("embeddings", made_by, f"those of a {maker}")
    if latents is None and strength != 1:
        raise ShapeRefused("strength", strength, "1 without latents to begin from")
    if not 0 <= strength <= 1:
        raise ShapeRefused("strength", strength, "0..1")
    if mask is not None and not inpaints:
        raise ShapeRefused("mask", "a mask", f"none: {facts.family} has no inpainting")
    if mask is not None and latents is None:
        raise ShapeRefused("mask", "a mask", "none without latents to begin from")
