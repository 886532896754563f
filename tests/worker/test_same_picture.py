"""The picture for a seed is the stock pipeline's, whatever degrees and moves it went through."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from gpuworker.loading import load_card
from gpuworker.models.flux import WordFluxCard
from gpuworker.state import LatentState
from tests.worker.families import FAMILIES
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

WIDEN_AND_NARROW: Schedule = [
    ((0,), 1),
    ((0, 1), 2),
    ((3, 0, 2, 1), 2),
    ((2, 1), 2),
    ((1,), 1),
]
DISJOINT_MOVE: Schedule = [((0, 1), 3), ((3, 2), 3), ((0,), 2)]
EMOJI = Path(__file__).parents[2] / "gpuworker" / "assets" / "hocket-emoji"


def check(pool: Pool, reference: Reference, schedule: Schedule) -> bytes:
    """Runs a schedule and compares; returns the last state."""
    state, frames = run_schedule(pool, reference, schedule)
    error, levels = latent_error(state, reference), level_error(frames, reference)
    assert error <= LATENT_TOLERANCE, f"latents differ by {error} after {schedule}"
    assert levels <= 1, f"pictures differ by {levels} levels after {schedule}"
    return state


@pytest.mark.parametrize("schedule", [WIDEN_AND_NARROW, DISJOINT_MOVE])
def test_flux_on_named_schedules(pool: Pool, flux: Reference, schedule: Schedule) -> None:
    check(pool, flux, schedule)


@pytest.mark.parametrize("schedule", [WIDEN_AND_NARROW, DISJOINT_MOVE])
def test_wan_on_named_schedules(pool: Pool, wan: Reference, schedule: Schedule) -> None:
    check(pool, wan, schedule)


@pytest.mark.parametrize("seed", range(6))
def test_flux_on_random_schedules(pool: Pool, flux: Reference, seed: int) -> None:
    check(pool, flux, random_schedule(seed, steps=8))


@pytest.mark.parametrize("seed", range(100, 104))
def test_wan_on_random_schedules(pool: Pool, wan: Reference, seed: int) -> None:
    check(pool, wan, random_schedule(seed, steps=8, cfg=(1, 2)))


def test_degree_one_is_the_stock_pipeline_to_the_bit(pool: Pool, flux: Reference) -> None:
    state = check(pool, flux, [((0,), 8)])
    assert latent_error(state, flux) == 0


def test_the_same_schedule_gives_the_same_bytes(pool: Pool, flux: Reference) -> None:
    first, first_frames = run_schedule(pool, flux, WIDEN_AND_NARROW)
    second, second_frames = run_schedule(pool, flux, WIDEN_AND_NARROW)
    assert first == second
    assert np.array_equal(first_frames, second_frames)


@pytest.mark.parametrize(
    "family", ["flux", "wan", "ltx", "qwen", "pixart", "sd35-medium", "cogvideox", "hunyuan"]
)
def test_a_planted_fault_is_seen(pool: Pool, family: str, tmp_path: Path) -> None:
    """Shards that are joined in the wrong order must not pass for the same picture."""
    reference = FAMILIES[family].make(tmp_path / f"tiny-{family}")
    state, frames = run_schedule(pool, reference, [((0, 1), 8)], plant="reversed gather")
    assert latent_error(state, reference) > 100 * LATENT_TOLERANCE
    assert level_error(frames, reference) > 1


def test_the_shipped_model_equals_the_plain_loop(pool: Pool) -> None:
    reference = emoji_reference(width=64, height=64, steps=4, seed=5)
    check(pool, reference, [((0,), 1), ((1, 0), 1), ((2, 3, 0, 1), 1), ((3,), 1)])


@torch.inference_mode()
def emoji_reference(width: int, height: int, steps: int, seed: int) -> Reference:
    """The denoise loop of the shipped model, written out with diffusers classes alone."""
    card = load_card(str(EMOJI), CPU, torch.float32)
    assert isinstance(card, WordFluxCard)
    parts, layout = card._parts, json.loads((EMOJI / "card.json").read_text())
    text, scale = parts["text_encoder"], layout["guidance"]["default"]
    size_word = layout["size_words"][f"{width}x{height}"]
    embeds, pooled = text(torch.cat([text.tokenize(f"{t} {size_word}") for t in ("", "a fox")]))
    rows, columns = height // layout["patch_px"], width // layout["patch_px"]
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(
        (1, parts["vae"].config.latent_channels, rows, columns), generator=generator
    )
    tokens, ids = drawn.flatten(2).transpose(1, 2), torch.zeros(rows, columns, 3)
    ids[..., 1] = ((torch.arange(rows) + 0.5) * layout["position_span"] / rows)[:, None]
    ids[..., 2] = ((torch.arange(columns) + 0.5) * layout["position_span"] / columns)[None]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(EMOJI / "scheduler")
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        (velocity,) = parts["transformer"](
            hidden_states=torch.cat([tokens, tokens]),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=timestep.expand(2) / 1000,
            img_ids=ids.reshape(-1, 3),
            txt_ids=text.text_ids(),
            return_dict=False,
        )
        plain, prompted = velocity.chunk(2)
        velocity = plain + scale * (prompted - plain)
        (tokens,) = scheduler.step(velocity, timestep, tokens, return_dict=False)
    latents = tokens.transpose(1, 2).reshape(1, -1, rows, columns)
    latents = latents / layout["latent_scaling"] + layout["latent_shift"]
    (picture,) = parts["vae"].decode(latents, return_dict=False)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    settings = {"prompt": "a fox", "negative_prompt": "", "width": width, "height": height}
    settings.update(frames=1, steps=steps, guidance_scale=scale, seed=seed)
    return Reference(str(EMOJI), settings, tokens, pixels.numpy())


def test_a_step_leaves_the_old_state_alone(wan: Reference) -> None:
    card = load_card(wan.folder, CPU, torch.float32)
    state = card.encode(**wan.settings)
    before = state.to_bytes()
    (again,) = card.step([state], None)
    assert state.to_bytes() == before
    (anew,) = card.step([LatentState.from_bytes(before)], None)
    assert anew.to_bytes() == again.to_bytes()
