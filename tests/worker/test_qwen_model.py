"""Qwen-Image beyond the table: texts of unlike length, jobs without guidance, its other kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpuworker.loading import LoadError, load_card
from gpuworker.models import qwen as family
from gpuworker.models.rows import PLAIN, PROMPTED, Row
from gpuworker.state import LatentState
from tests.worker.tiny_models import Reference
from tests.worker.tiny_qwen import qwen_reference
from tests.worker.worker_jobs import LATENT_TOLERANCE, level_error
from tests.worker.worker_pool import CPU


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_alone_it_is_the_stock_pipeline_to_the_bit(tmp_path: Path, guidance_scale: float) -> None:
    reference = qwen_reference(tmp_path / "tiny-qwen", guidance_scale)
    card = load_card(reference.folder, CPU, torch.float32)
    state = card.encode(**reference.settings)
    assert ("negative_embeds" in state.tensors) == (guidance_scale > 1)
    while not state.finished:
        (state,) = card.step([state], None)
    assert torch.equal(state.tensors["latents"], reference.latents)
    assert level_error(card.decode(state), reference) <= 1


def with_companions(reference: Reference) -> float:
    """What a step of the job differs by, when three others with other texts make it too."""
    card, mine = load_card(reference.folder, CPU, torch.float32), reference.settings
    others: list[dict[str, Any]] = [
        {**mine, "prompt": "the sea", "seed": 5},
        {**mine, "negative_prompt": "a red boat on the blue sea", "seed": 6},
        {**mine, "prompt": "fox", "guidance_scale": 1.0},
    ]
    states = [card.encode(**settings) for settings in (mine, *others)]
    (alone,) = card.step(states[:1], None)
    together, *_ = card.step(states, None)
    return float((alone.tensors["latents"] - together.tensors["latents"]).abs().max())


def test_longer_and_shorter_texts_leave_each_other_alone(
    qwen: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert with_companions(qwen) <= LATENT_TOLERANCE
    monkeypatch.setattr(family, "_lengths_differ", lambda rows, name: False)
    assert with_companions(qwen) > 10 * LATENT_TOLERANCE, "without the mask it must be seen"


def test_both_halves_of_a_group_mask_or_neither_does() -> None:
    """Only the prompts differ in length here: the half that has none of them masks as well."""

    def mask_of(branch: int, *lengths: tuple[int, int]) -> Tensor | None:
        rows = []
        for a, b in lengths:
            texts = {"prompt_embeds": torch.ones(1, a, 4), "negative_embeds": torch.ones(1, b, 4)}
            state = LatentState(texts, 0, 8, {})
            rows.append(Row(state, branch, torch.ones(1, 2, 4), torch.tensor(1.0)))
        return family._texts(rows)[1]

    prompted, plain = mask_of(PROMPTED, (3, 2), (1, 2)), mask_of(PLAIN, (3, 2), (1, 2))
    assert prompted is not None and prompted.tolist() == [[True] * 3, [True, False, False]]
    assert plain is not None and plain.tolist() == [[True] * 2] * 2
    assert mask_of(PROMPTED, (3, 2), (3, 2)) is None and mask_of(PLAIN, (3, 2), (3, 2)) is None


def test_its_editing_kin_are_refused(tmp_path: Path) -> None:
    reference = qwen_reference(tmp_path / "tiny-qwen")
    config = Path(reference.folder) / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "zero_cond_t": True}))
    with pytest.raises(LoadError) as refused:
        load_card(reference.folder, CPU, torch.float32)
    assert refused.value.missing == "transformer" and "zero_cond_t" in refused.value.reason
