"""PixArt-Sigma's own turns: bits, no guidance, masked text, folders as published and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from gpuworker.loading import LoadError, load_card
from gpuworker.models.card import ShapeRefused
from gpuworker.state import LatentState
from tests.worker.tiny_models import Reference
from tests.worker.tiny_pixart import pixart_pipeline, pixart_reference, solver
from tests.worker.worker_pool import CPU


def drawn(made: Reference, **changes: object) -> LatentState:
    """The last state of its job, alone."""
    card = load_card(made.folder, CPU, torch.float32)
    state = card.encode(**{**made.settings, **changes})
    while not state.finished:
        (state,) = card.step([state], None)
    return state


def edit(path: Path, **changes: object) -> None:
    """Changes some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("scheduler", [None, solver(beta_end=0.02), EulerDiscreteScheduler()])
def test_alone_it_is_the_stock_pipeline_to_the_bit(tmp_path: Path, scheduler: Any) -> None:
    """With the published schedule too, and with a solver that scales the first noise."""
    made = pixart_reference(tmp_path / "tiny", scheduler=scheduler)
    assert torch.equal(drawn(made).tensors["latents"], made.latents)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_there_is_no_plain_branch(tmp_path: Path, scale: float) -> None:
    made = pixart_reference(tmp_path / "tiny", scale)
    state = drawn(made)
    assert torch.equal(state.tensors["latents"], made.latents)
    assert "negative_embeds" not in state.tensors


def test_prompts_are_cleaned_as_the_pipeline_cleans_them(tmp_path: Path) -> None:
    made = pixart_reference(tmp_path / "tiny")
    shouted = drawn(made, prompt="  A RED FOX on the sea ")
    assert torch.equal(shouted.tensors["latents"], made.latents)


def test_what_the_mask_hides_is_not_seen(tmp_path: Path) -> None:
    made = pixart_reference(tmp_path / "tiny")
    card = load_card(made.folder, CPU, torch.float32)
    state = card.encode(**made.settings)
    hidden = state.tensors["prompt_mask"][0] == 0
    assert hidden.any() and not hidden.all()
    embeds = state.tensors["prompt_embeds"].clone()
    embeds[:, hidden] = 7.0
    other = LatentState({**state.tensors, "prompt_embeds": embeds}, 0, 8, state.facts)
    (one,), (two,) = card.step([state], None), card.step([other], None)
    assert torch.equal(one.tensors["latents"], two.tensors["latents"])


def test_a_folder_as_it_was_published(tmp_path: Path) -> None:
    """PixArt-Sigma's index still names the class that diffusers had then."""
    made = pixart_reference(tmp_path / "tiny")
    edit(tmp_path / "tiny/model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edit(tmp_path / "tiny/transformer/config.json", _class_name="Transformer2DModel")
    assert torch.equal(drawn(made).tensors["latents"], made.latents)


def test_what_is_no_pixart_sigma_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    pixart_pipeline().save_pretrained(folder)
    edit(folder / "model_index.json", tokenizer=[None, None])
    with pytest.raises(LoadError, match="tokenizer"):
        load_card(str(folder), CPU, torch.float32)
    edit(folder / "model_index.json", _class_name="PixArtAlphaPipeline")
    with pytest.raises(LoadError, match="PixArtAlphaPipeline"):
        load_card(str(folder), CPU, torch.float32)


@pytest.mark.parametrize("width", [44, 8, 136])
def test_sizes_that_it_cannot_do(tmp_path: Path, width: int) -> None:
    folder = tmp_path / "tiny"
    pixart_pipeline().save_pretrained(folder)
    facts = load_card(str(folder), CPU, torch.float32).facts
    assert facts.size_default == (64, 64)
    with pytest.raises(ShapeRefused, match=f"width={width}"):
        facts.check(width, 24, 1, 8, 4.5)
