"""What HunyuanVideo has of its own: rounding, no negative prompt, pictures as input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gpuworker.loading import LoadError, load_card
from gpuworker.models.card import ShapeRefused
from gpuworker.models.hunyuan_video import HunyuanVideoCard
from tests.worker.tiny_hunyuan import TEXT_TOKENS, hunyuan_latents, hunyuan_pipeline
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import latent_error, run_schedule
from tests.worker.worker_pool import CPU, Pool


def test_one_worker_is_the_stock_pipeline_to_the_bit(pool: Pool, hunyuan: Reference) -> None:
    state, _ = run_schedule(pool, hunyuan, [((0,), 3), ((1,), 5)])
    assert latent_error(state, hunyuan) == 0


def test_in_half_precision_too(hunyuan: Reference) -> None:
    """The pipeline rounds latents and timesteps on its way: so does a card, job by job."""
    pipeline = hunyuan_pipeline().to(torch.bfloat16)
    card = HunyuanVideoCard("half", pipeline.components, {"text_tokens": TEXT_TOKENS}, CPU)
    (state,) = card.step([card.encode(**hunyuan.settings)], None)
    while not state.finished:
        (state,) = card.step([state], None)
    assert torch.equal(state.tensors["latents"], hunyuan_latents(pipeline, hunyuan.settings))


def test_negative_prompts_are_refused(hunyuan: Reference) -> None:
    card = load_card(hunyuan.folder, CPU, torch.float32)
    with pytest.raises(ShapeRefused, match="negative_prompt"):
        card.encode(**{**hunyuan.settings, "negative_prompt": "fog"})


def test_models_that_take_a_picture_are_refused(hunyuan: Reference, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-i2v"
    shutil.copytree(hunyuan.folder, folder)
    config = folder / "transformer" / "config.json"
    changed = {**json.loads(config.read_text()), "image_condition_type": "latent_concat"}
    config.write_text(json.dumps(changed))
    with pytest.raises(LoadError) as refused:
        load_card(str(folder), CPU, torch.float32)
    assert refused.value.missing == "image_condition_type"


@pytest.mark.parametrize("tokens", [7, 0, "many"])
def test_too_few_text_tokens_for_a_group_are_refused(
    hunyuan: Reference, tmp_path: Path, tokens: object
) -> None:
    folder = tmp_path / "tiny-short"
    shutil.copytree(hunyuan.folder, folder)
    (folder / "card.json").write_text(json.dumps({"text_tokens": tokens}))
    with pytest.raises(LoadError) as refused:
        load_card(str(folder), CPU, torch.float32)
    assert refused.value.missing == "card.json" and "8 and more" in str(refused.value)
