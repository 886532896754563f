"""The shipped model of clips: the plain loop's clip in every layout, frames that really move."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from gpuworker.collectives.team import GroupLayout
from gpuworker.config import EMBEDDED_MODELS
from gpuworker.loading import load_card
from gpuworker.models.card import ModelCard, ShapeRefused
from gpuworker.models.word_motion import WordMotionCard
from gpuworker.state import LatentState
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import (
    LATENT_TOLERANCE,
    Schedule,
    latent_error,
    level_error,
    random_schedule,
    run_schedule,
)
from tests.worker.worker_pool import CPU, Pool
from tools.train_emoji.motion_sample import decode, denoise
from tools.train_emoji.sample import Pipeline

FOLDER = EMBEDDED_MODELS[1]
STEPS = 6


@pytest.fixture(scope="module")
def card() -> ModelCard:
    return load_card(str(FOLDER), CPU, torch.float32)


@pytest.fixture(scope="module")
def clip() -> Reference:
    """A clip of the whole motion."""
    return plain(16)


def plain(frames: int) -> Reference:
    """What the training's own sampler makes, which shares no code with the card."""
    pipe = Pipeline.load(FOLDER)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler")
    prompt, guidance = "a fox bouncing on a green background", 1.5
    tokens = denoise(pipe, scheduler, prompt, 64, 5, STEPS, guidance, frames)
    settings = {"prompt": prompt, "negative_prompt": "", "width": 64, "height": 64}
    settings.update(frames=frames, steps=STEPS, guidance_scale=guidance, seed=5)
    return Reference(str(FOLDER), settings, tokens, decode(pipe, tokens, 64).numpy())


@pytest.mark.parametrize(
    "schedule",
    [
        [((0,), 2), ((1, 0), 2), ((2, 3, 0, 1), 2)],
        [((0, 3), 2, GroupLayout(cfg=2)), ((1, 2, 0, 3), 4, GroupLayout(cfg=2, ring=2))],
        random_schedule(2, STEPS, cfg=(1, 2)),
    ],
)
def test_a_clip_equals_the_plain_loop(pool: Pool, clip: Reference, schedule: Schedule) -> None:
    state, frames = run_schedule(pool, clip, schedule)
    assert latent_error(state, clip) <= LATENT_TOLERANCE
    assert level_error(frames, clip) <= 1


def test_another_motion_is_another_clip(card: ModelCard, clip: Reference) -> None:
    """The comparison above would see it."""
    settings = clip.settings | {"prompt": "a fox falling on a green background"}
    assert latent_error(run(card, settings).to_bytes(), clip) > 100 * LATENT_TOLERANCE


@pytest.mark.parametrize(("motion", "axis"), [("flying", 1), ("falling", 0)])
def test_the_thing_moves_as_told(card: ModelCard, clip: Reference, motion: str, axis: int) -> None:
    prompt = f"a red apple {motion} on a white background"
    frames = card.decode(run(card, clip.settings | {"prompt": prompt}))
    drawn = (frames.min(-1) < 200).astype(float)  # whatever is not the white
    along = np.arange(64)
    places = [(f.sum(1 - axis) * along).sum() / f.sum() for f in drawn[2:14]]
    assert places[-1] - places[0] > 20
    assert np.all(np.diff(places) > -1)


@pytest.mark.parametrize("frames", [2, 10])
def test_a_shorter_clip_equals_the_plain_loop(pool: Pool, frames: int) -> None:
    shorter = plain(frames)
    assert shorter.frames.shape == (frames, 64, 64, 3)
    for schedule in ([((0,), STEPS)], [((1, 0), 3), ((2, 3, 0, 1), 3)]):
        state, pixels = run_schedule(pool, shorter, schedule)
        assert latent_error(state, shorter) <= LATENT_TOLERANCE
        assert level_error(pixels, shorter) <= 1


def test_a_shorter_clip_is_the_beginning_of_the_motion(card: ModelCard, clip: Reference) -> None:
    """The apple of eight frames falls as far as that of sixteen has fallen by then."""
    prompt = "a red apple falling on a white background"
    heights = []
    for frames in (8, 16):
        settings = clip.settings | {"prompt": prompt, "frames": frames}
        drawn = (card.decode(run(card, settings)).min(-1) < 200).astype(float)[:8]
        heights.append([(f.sum(1) * np.arange(64)).sum() / max(1, f.sum()) for f in drawn])
    assert np.abs(np.subtract(*heights)).max() < 3
    assert heights[0][7] < 30, "and not to the ground"


def test_lengths_it_was_not_trained_on_are_refused(card: ModelCard, clip: Reference) -> None:
    assert isinstance(card, WordMotionCard)
    for frames in (1, 9, 17, 18, 32):
        with pytest.raises(ShapeRefused) as refused:
            card.encode(**clip.settings | {"frames": frames})
        assert refused.value.field == "frames"
        assert refused.value.allowed == "2..16, a multiple of 2"


def test_what_will_be_drawn_is_told(card: ModelCard) -> None:
    assert card.resolve("a puppy jumping") == "a dog bouncing"
    assert all(card.resolve(example) == example for example in card.facts.examples)


def test_the_folder_names_its_licence() -> None:
    assert "Noto Emoji" in (FOLDER / "NOTICE").read_text()
    assert json.loads((FOLDER / "card.json").read_text())["name"] == FOLDER.name


def run(card: ModelCard, settings: dict[str, object]) -> LatentState:
    """All steps, on one worker."""
    state = card.encode(**settings)  # type: ignore[arg-type]
    for _ in range(STEPS):
        (state,) = card.step([state], None)
    return state
