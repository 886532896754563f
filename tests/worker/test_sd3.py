"""Stable Diffusion 3's own turns: no T5, no guidance, bits, and folders that lack something."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpuworker.loading import LoadError, load_card
from gpuworker.models.card import Asked
from gpuworker.state import LatentState
from tests.worker.tiny_models import Reference
from tests.worker.tiny_sd3 import reference, sd3_pipeline, sd3_reference, sd35_medium_reference
from tests.worker.worker_pool import CPU


def drawn(made: Reference) -> LatentState:
    """The last state of its job, alone."""
    card = load_card(made.folder, CPU, torch.float32)
    state = card.encode(**made.settings)
    while not state.finished:
        (state,) = card.step([state], None)
    return state


def same(state: LatentState, made: Reference) -> bool:
    """Whether it is the stock pipeline's, to the bit."""
    mine: Tensor = state.tensors["latents"]
    return torch.equal(mine, made.latents)


@pytest.mark.parametrize("make", [sd3_reference, sd35_medium_reference])
def test_alone_it_is_the_stock_pipeline_to_the_bit(tmp_path: Path, make: object) -> None:
    assert callable(make)
    made = make(tmp_path / "tiny")
    assert same(drawn(made), made)


def test_without_t5_its_embeddings_are_zero(tmp_path: Path) -> None:
    made = reference(tmp_path / "tiny", sd3_pipeline(t5=False))
    assert json.loads((tmp_path / "tiny" / "model_index.json").read_text())["text_encoder_3"] == [
        None,
        None,
    ]
    state = drawn(made)
    assert same(state, made)
    assert not state.tensors["prompt_embeds"][:, 16:].any()


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_there_is_no_plain_branch(tmp_path: Path, scale: float) -> None:
    made = reference(tmp_path / "tiny", sd3_pipeline(), scale)
    state = drawn(made)
    assert same(state, made)
    assert "negative_embeds" not in state.tensors


def test_in_half_precision_it_is_loaded_and_draws(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    sd3_pipeline(t5=False).save_pretrained(folder)
    card = load_card(str(folder), CPU, torch.bfloat16)
    state = card.encode("a fox", "the sea", 28, 20, 1, 2, 5.0, seed=3)
    while not state.finished:
        (state,) = card.step([state], None)
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.bfloat16}
    asked = Asked("a fox", "the sea", 28, 20, 1, 2, 5.0, seed=4)
    latents = card.encode_image(card.decode(state), seed=4)
    begun = card.begin(card.embed(asked), asked, latents, strength=0.5)
    assert {t.dtype for s in (latents, begun) for t in s.tensors.values()} == {torch.bfloat16}
    assert state.tensors["latents"].isfinite().all()
    assert card.decode(state).shape == (1, 20, 28, 3)


@pytest.mark.parametrize("missing", ["text_encoder_2", "tokenizer", "tokenizer_3"])
def test_what_its_index_lacks_is_named(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "tiny"
    sd3_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, missing: [None, None]}))
    with pytest.raises(LoadError) as refused:
        load_card(str(folder), CPU, torch.float32)
    assert refused.value.missing == missing
