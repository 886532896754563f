"""What CogVideoX has of its own: frames in pairs, a solver that draws noise, picture inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpuworker.collectives.team import GroupLayout
from gpuworker.loading import LoadError, load_card
from gpuworker.models.cogvideox import CogVideoXCard
from gpuworker.state import LatentState
from tests.worker.tiny_cogvideox import (
    cogvideox_15_reference,
    cogvideox_latents,
    cogvideox_pipeline,
    cogvideox_reference,
    cogvideox_rotary_reference,
)
from tests.worker.tiny_models import TEXT_TOKENS, Reference
from tests.worker.worker_jobs import LATENT_TOLERANCE, latent_error, level_error, run_schedule
from tests.worker.worker_pool import CPU, Pool


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """As 5b."""
    return cogvideox_rotary_reference(tmp_path_factory.mktemp("cogvideox") / "tiny-5b")


def test_frames_in_pairs(pool: Pool, tmp_path: Path) -> None:
    """As 1.5: padded by a latent frame, which every layout splits and the picture lacks."""
    reference = cogvideox_15_reference(tmp_path / "tiny-15")
    alone, _ = run_schedule(pool, reference, [((0,), 8)])
    assert latent_error(alone, reference) == 0
    state, frames = run_schedule(
        pool, reference, [((0, 1), 3), ((2, 3, 1, 0), 3, GroupLayout(2, 1, 2)), ((1,), 2)]
    )
    assert latent_error(state, reference) <= LATENT_TOLERANCE
    assert level_error(frames, reference) <= 1


@pytest.mark.parametrize("make", [cogvideox_reference, cogvideox_rotary_reference])
def test_one_worker_is_the_stock_pipeline_to_the_bit(
    pool: Pool, make: Callable[[Path], Reference], tmp_path: Path
) -> None:
    reference = make(tmp_path / "tiny-one")
    state, _ = run_schedule(pool, reference, [((0,), 3), ((1,), 5)])
    assert latent_error(state, reference) == 0


def test_in_half_precision_too(noisy: Reference) -> None:
    """The pipeline guides and solves in float32 and rounds after each step: so does a card.

    From the card's first noise: it is drawn in float32 whatever the model computes in.
    """
    pipeline = cogvideox_pipeline().to(torch.bfloat16)
    card = CogVideoXCard("half", pipeline.components, {"text_tokens": TEXT_TOKENS}, CPU)
    state = card.encode(**noisy.settings)
    expected = cogvideox_latents(pipeline, noisy.settings, state.tensors["latents"])
    while not state.finished:
        (state,) = card.step([state], None)
    assert torch.equal(state.tensors["latents"], expected)


def test_the_noise_of_a_step_is_in_the_state(noisy: Reference) -> None:
    """A step made twice draws the same; another seed, or another step, draws other noise."""
    card = load_card(noisy.folder, CPU, torch.float32)
    state = card.encode(**noisy.settings)
    (once,) = card.step([LatentState.from_bytes(state.to_bytes())], None)
    (again,) = card.step([state], None)
    assert once.to_bytes() == again.to_bytes()
    drawn = "solver.noise_state"
    assert not torch.equal(once.tensors[drawn], state.tensors[drawn])
    other = card.encode(**{**noisy.settings, "seed": 12})
    assert not torch.equal(other.tensors[drawn], state.tensors[drawn])


def test_models_that_take_a_picture_are_refused(noisy: Reference, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-i2v"
    shutil.copytree(noisy.folder, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "ofs_embed_dim": 8}))
    with pytest.raises(LoadError) as refused:
        load_card(str(folder), CPU, torch.float32)
    assert refused.value.missing == "ofs_embed_dim"
