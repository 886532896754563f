"""Pictures as inputs: img2img and inpainting equal the stock pipelines, alone to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from gpuworker.loading import load_card
from gpuworker.models.card import (
    CONTROLLED,
    ENCODE_IMAGE,
    INPAINT,
    REFERENCE,
    Asked,
    ModelCard,
    ShapeRefused,
)
from gpuworker.models.flux import WordFluxCard
from gpuworker.state import LatentState
from tests.worker import tiny_pictures
from tests.worker.families import FAMILIES
from tests.worker.test_same_picture import EMOJI
from tests.worker.tiny_models import Reference, flux_reference
from tests.worker.tiny_pictures import Make, mask_of, noisy_picture
from tests.worker.worker_jobs import LATENT_TOLERANCE
from tests.worker.worker_pool import CPU
from tests.worker.worker_tasks import first_state


def drawn(card: ModelCard, state: LatentState) -> LatentState:
    """The last state of a job, alone."""
    while not state.finished:
        (state,) = card.step([state], None)
    return state


@pytest.fixture(scope="module")
def flux_card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    """A tiny Flux."""
    return load_card(flux_reference(tmp_path_factory.mktemp("flux")).folder, CPU, torch.float32)


@pytest.fixture
def emoji() -> WordFluxCard:
    """The shipped model."""
    card = load_card(str(EMOJI), CPU, torch.float32)
    assert isinstance(card, WordFluxCard)
    return card


def asked_of(**others: Any) -> Asked:
    """Settings of a job for the tiny Flux."""
    asked = Asked("a red fox", "", 28, 28, frames=1, steps=8, guidance_scale=3.5, seed=11)
    return asked._replace(**others)


@pytest.mark.parametrize(
    ("make", "strength", "steps"),
    [
        (tiny_pictures.flux_img2img, 0.7, 6),
        (tiny_pictures.flux_img2img, 0.3, 3),
        (tiny_pictures.flux_inpaint, 1.0, 8),
        (tiny_pictures.sd3_img2img, 0.5, 4),
        (tiny_pictures.sd35_medium_img2img, 0.7, 6),
        (tiny_pictures.sd3_inpaint, 1.0, 8),
        (tiny_pictures.sd3_inpaint, 0.3, 3),
        (tiny_pictures.qwen_img2img, 0.3, 3),
        (tiny_pictures.qwen_inpaint, 0.7, 6),
    ],
)
def test_alone_it_is_the_stock_pipeline_to_the_bit(
    tmp_path: Path, make: Make, strength: float, steps: int
) -> None:
    made = make(tmp_path / "tiny", strength)
    card = load_card(made.folder, CPU, torch.float32)
    assert {ENCODE_IMAGE, INPAINT} <= set(card.operations)
    state = first_state(card, made.settings, made.start)
    assert (state.steps_done, state.steps_total) == (0, steps)
    state = drawn(card, state)
    assert torch.equal(state.tensors["latents"], made.latents)
    assert np.array_equal(card.decode(state), made.frames)


@pytest.mark.parametrize(("width", "height"), [(28, 28), (20, 36)])
def test_kontext_alone_is_the_stock_pipeline_to_the_bit(
    tmp_path: Path, width: int, height: int
) -> None:
    made = tiny_pictures.flux_kontext(tmp_path / "tiny", width, height)
    card = load_card(made.folder, CPU, torch.float32)
    assert REFERENCE in card.operations
    state = drawn(card, first_state(card, made.settings, made.start))
    assert torch.equal(state.tensors["latents"], made.latents)
    assert np.array_equal(card.decode(state), made.frames)


def test_a_controlnet_steers_its_own_jobs_alone(tmp_path: Path) -> None:
    """As in the stock pipeline but for an ulp, since its control picture lies otherwise in memory;
    a companion without a control picture has a forward of its own.
    """
    made = tiny_pictures.flux_control(tmp_path / "tiny")
    card = load_card(made.folder, CPU, torch.float32)
    assert CONTROLLED in card.operations and REFERENCE not in card.operations
    state = first_state(card, made.settings, made.start)
    plain = card.encode(**made.settings)
    steered, companion = state, plain
    while not steered.finished:
        steered, companion = card.step([steered, companion], None)
    alone, alone_too = drawn(card, state), drawn(card, plain)
    assert torch.equal(steered.tensors["latents"], alone.tensors["latents"])
    assert torch.equal(companion.tensors["latents"], alone_too.tensors["latents"])
    assert float((alone.tensors["latents"] - made.latents).abs().max()) < LATENT_TOLERANCE / 10
    assert float((alone_too.tensors["latents"] - made.latents).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["flux", "qwen", "pixart", "cogvideox", "ltx"])
def test_embeddings_and_a_beginning_are_an_encode(family: str, tmp_path: Path) -> None:
    """For every guidance, also where the embeddings were asked for with another one."""
    made = FAMILIES[family].make(tmp_path / "tiny")
    card, asked = load_card(made.folder, CPU, torch.float32), Asked(**made.settings)
    embeddings = card.embed(asked)
    assert "latents" not in embeddings.tensors and embeddings.finished
    for scale in (asked.guidance_scale, 1.0):
        begun = card.begin(embeddings, asked._replace(guidance_scale=scale))
        encoded = card.encode(**{**made.settings, "guidance_scale": scale})
        assert begun.to_bytes() == encoded.to_bytes()


def test_the_shipped_models_embeddings_serve_every_size(emoji: WordFluxCard) -> None:
    asked = Asked("a fox", "", 128, 128, frames=1, steps=4, guidance_scale=1.8, seed=5)
    embeddings = emoji.embed(asked)
    for side in (64, 256):
        smaller = asked._replace(width=side, height=side)
        begun, encoded = emoji.begin(embeddings, smaller), emoji.encode(*smaller)
        assert begun.to_bytes() == encoded.to_bytes()


@torch.inference_mode()
def test_the_shipped_model_begins_from_a_picture_as_the_plain_loop_does(
    emoji: WordFluxCard,
) -> None:
    """The second pass of a workflow, with diffusers' classes alone; its VAE has no posterior."""
    asked = Asked("a fox", "", 64, 64, frames=1, steps=10, guidance_scale=1.8, seed=5)
    pixels = noisy_picture(64, 64)
    latents = emoji.encode_image(pixels, seed=5)
    parts, text = emoji._parts, emoji.embed(asked).tensors
    unit = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0
    clean = parts["vae"].encode(2.0 * unit - 1.0).latents
    assert torch.equal(latents.tensors["latents"], clean.flatten(2).transpose(1, 2))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(EMOJI / "scheduler")
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(6)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    noisy = scheduler.scale_noise(clean, scheduler.timesteps[6:7], noise)
    tokens = noisy.flatten(2).transpose(1, 2).contiguous()
    state = emoji.begin(emoji.embed(asked), asked, latents, strength=0.4)
    assert torch.equal(state.tensors["latents"], tokens)
    for timestep in scheduler.timesteps[6:]:
        (velocity,) = parts["transformer"](
            hidden_states=torch.cat([tokens, tokens]),
            encoder_hidden_states=torch.cat([text[f"{n}_embeds.64x64"] for n in BRANCHES]),
            pooled_projections=torch.cat([text["plain_pooled.64x64"], text["pooled.64x64"]]),
            timestep=timestep.expand(2) / 1000,
            img_ids=state.tensors["img_ids"],
            txt_ids=state.tensors["txt_ids"],
            return_dict=False,
        )
        plain, prompted = velocity.chunk(2)
        velocity = plain + 1.8 * (prompted - plain)
        (tokens,) = scheduler.step(velocity, timestep, tokens, return_dict=False)
    assert torch.equal(drawn(emoji, state).tensors["latents"], tokens)


BRANCHES = ("plain", "prompt")


def test_a_picture_that_was_never_denoised_is_decoded(emoji: WordFluxCard) -> None:
    """Any latents artifact can be: here the autoencoder's round trip of a picture it knows."""
    asked = Asked("a fox", "", 64, 64, frames=1, steps=6, guidance_scale=1.8, seed=5)
    picture = emoji.decode(drawn(emoji, emoji.encode(*asked)))
    again = emoji.decode(emoji.encode_image(picture, seed=0))
    assert np.abs(again.astype(int) - picture.astype(int)).mean() < 8


def test_the_noise_goes_on_behind_the_posteriors(flux_card: ModelCard) -> None:
    """With the same seed; with another one, it is that seed's, whatever was drawn before."""
    embeddings = flux_card.embed(asked_of())
    pixels = noisy_picture(28, 28)
    same, other = (flux_card.encode_image(pixels, seed) for seed in (11, 12))
    plain = flux_card.begin(embeddings, asked_of()).tensors["latents"]
    begun = [flux_card.begin(embeddings, asked_of(), latents) for latents in (same, other)]
    assert not torch.equal(begun[0].tensors["latents"], plain)
    assert torch.equal(begun[1].tensors["latents"], plain), "strength 1 is noise alone"


def test_a_part_is_kept_exactly(flux_card: ModelCard) -> None:
    pixels = noisy_picture(28, 28)
    latents = flux_card.encode_image(pixels, seed=3)
    black, white = np.zeros((1, 28, 28, 1), np.uint8), np.full((1, 28, 28, 1), 255, np.uint8)
    embeddings = flux_card.embed(asked_of())
    begun = [
        flux_card.begin(embeddings, asked_of(), latents, 0.5, mask) for mask in (black, white, None)
    ]
    kept, anew, plain = (drawn(flux_card, state) for state in begun)
    assert torch.equal(kept.tensors["latents"], latents.tensors["latents"])
    assert torch.equal(anew.tensors["latents"], plain.tensors["latents"])


@pytest.mark.parametrize(
    ("field", "how"),
    [
        ("strength", {"strength": 1.5}),
        ("strength", {"strength": 0.5, "latents": None}),
        ("control", {"control": LatentState({}, 0, 0, {})}),
        ("reference", {"reference": LatentState({}, 0, 0, {})}),
        ("mask", {"latents": None, "mask": np.zeros((1, 28, 28, 1), np.uint8)}),
        ("mask", {"mask": np.zeros((1, 28, 24, 1), np.uint8)}),
        ("mask", {"mask": np.zeros((1, 28, 28, 1), np.float32)}),
        ("latents", {"asked": asked_of(width=24)}),
        ("embeddings", {"embeddings": LatentState({}, 0, 0, {"made_by": "WanCard"})}),
    ],
)
def test_what_cannot_begin_is_named(flux_card: ModelCard, field: str, how: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "embeddings": flux_card.embed(asked_of()),
        "asked": asked_of(),
        "latents": flux_card.encode_image(noisy_picture(28, 28), seed=3),
        **how,
    }
    assert REFERENCE not in flux_card.operations
    with pytest.raises(ShapeRefused) as refused:
        flux_card.begin(**arguments)
    assert refused.value.field == field and refused.value.allowed


@pytest.mark.parametrize(
    ("field", "pixels"),
    [
        ("width", noisy_picture(27, 28)),
        ("image", noisy_picture(28, 28).repeat(2, 0)),
        ("image", mask_of(noisy_picture(28, 28))),
        ("image", noisy_picture(28, 28).astype(np.float32)),
    ],
)
def test_what_is_no_picture_for_it_is_named(flux_card: ModelCard, field: str, pixels: Any) -> None:
    with pytest.raises(ShapeRefused) as refused:
        flux_card.encode_image(pixels, seed=1)
    assert refused.value.field == field


def test_a_model_of_videos_takes_no_picture(wan: Reference) -> None:
    card, asked = load_card(wan.folder, CPU, torch.float32), Asked(**wan.settings)
    assert not {ENCODE_IMAGE, INPAINT} & set(card.operations)
    with pytest.raises(ShapeRefused) as refused:
        card.encode_image(noisy_picture(48, 32), seed=1)
    assert (refused.value.field, refused.value.value) == ("op", ENCODE_IMAGE)
    state = drawn(card, card.encode(**wan.settings))
    again = card.begin(card.embed(asked), asked._replace(seed=1), state, strength=0.5)
    assert (again.steps_total, drawn(card, again).finished) == (4, True)
    mask = np.zeros((1, 32, 48, 1), np.uint8)
    with pytest.raises(ShapeRefused) as refused:
        card.begin(card.embed(asked), asked, replace(state), 0.5, mask)
    assert refused.value.field == "mask"
