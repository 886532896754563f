"""LTX-Video beyond the table: decoders that denoise, and jobs without guidance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gpuworker.collectives.team import GroupLayout, LayoutRefused, Team
from gpuworker.loading import LoadError, load_card
from gpuworker.models.card import ModelCard
from gpuworker.state import LatentState
from tests.worker.test_families import Mute
from tests.worker.tiny_ltx import ltx_reference
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import level_error
from tests.worker.worker_pool import CPU


def finished(reference: Reference) -> tuple[ModelCard, LatentState]:
    """The job of a reference, run alone."""
    card = load_card(reference.folder, CPU, torch.float32)
    state = card.encode(**reference.settings)
    while not state.finished:
        (state,) = card.step([state], None)
    return card, state


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_alone_it_is_the_stock_pipeline_to_the_bit(tmp_path: Path, guidance_scale: float) -> None:
    reference = ltx_reference(tmp_path / "tiny-ltx", guidance_scale)
    card, state = finished(reference)
    assert torch.equal(state.tensors["latents"], reference.latents)
    assert level_error(card.decode(state), reference) <= 1
    assert ("negative_embeds" in state.tensors) == (guidance_scale > 1)


def test_without_guidance_there_are_no_halves(tmp_path: Path) -> None:
    reference = ltx_reference(tmp_path / "tiny-ltx", guidance_scale=1.0)
    card = load_card(reference.folder, CPU, torch.float32)
    with pytest.raises(LayoutRefused):
        card.step([card.encode(**reference.settings)], Team(Mute(2), GroupLayout(cfg=2)))


def test_a_decoder_that_denoises_gets_the_pipelines_noise(tmp_path: Path) -> None:
    reference = ltx_reference(tmp_path / "tiny-ltx", conditioned=True)
    card, state = finished(reference)
    assert level_error(card.decode(state), reference) <= 1
    card._card["decode_noise_scale"] = 0.0  # type: ignore[attr-defined]
    assert level_error(card.decode(state), reference) > 1


def test_noise_drawn_inside_the_decoder_comes_from_the_seed(tmp_path: Path) -> None:
    """The stock pipeline takes it from the process, so that its videos differ at every call."""
    reference = ltx_reference(tmp_path / "tiny-ltx", conditioned=True, inject_noise=True)
    card, state = finished(reference)
    before = torch.get_rng_state()
    once = card.decode(state)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert np.array_equal(card.decode(state), once)
    other = LatentState(state.tensors, 8, 8, {**state.facts, "seed": 12})
    assert not np.array_equal(card.decode(other), once)


def test_patches_are_refused(tmp_path: Path) -> None:
    reference = ltx_reference(tmp_path / "tiny-ltx")
    config = Path(reference.folder) / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "patch_size": 2}))
    with pytest.raises(LoadError) as refused:
        load_card(reference.folder, CPU, torch.float32)
    assert refused.value.missing == "transformer" and "patch_size=2" in refused.value.reason
