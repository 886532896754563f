"""Compiled blocks: the same latents, at degree 1 and where a sequence is split.

Most tests let Dynamo alone see through the blocks, hooks and wrapped attention, which is where they
could break; the whole compiler takes a minute a model.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from gpuworker.collectives.team import GroupLayout, Team
from gpuworker.loading import load_card
from gpuworker.models.card import ModelRefused
from gpuworker.state import LatentState
from tests.worker import worker_tasks as tasks
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import LATENT_TOLERANCE, meet
from tests.worker.worker_pool import CPU, Member, Pool

STEPS = 2


def latents(folder: str, settings: dict[str, object], backend: str) -> torch.Tensor:
    """Behind two steps; "" as written."""
    card = load_card(folder, CPU, torch.float32)
    if backend:
        card.compile(backend)
    state = card.encode(**settings)  # type: ignore[arg-type]
    for _ in range(STEPS):
        (state,) = card.step([state], None)
    return state.tensors["latents"]


def compiled_over(
    member: Member, meeting: tasks.Meeting, folder: str, settings: dict[str, object]
) -> tuple[bytes, int]:
    """A step alone, then one over the group; the state, and how many graphs there are."""
    card = load_card(folder, CPU, torch.float32)
    card.compile("eager")
    state = card.encode(**settings)  # type: ignore[arg-type]
    (state,) = card.step([state], None)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs, "nothing was compiled"
    team = Team(meeting.join(member), GroupLayout(ulysses=2))
    (state,) = card.step([state], team)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    return state.to_bytes(), graphs


def test_dynamo_sees_through_the_blocks(flux: Reference) -> None:
    whole = latents(flux.folder, flux.settings, "eager")
    assert torch.equal(whole, latents(flux.folder, flux.settings, ""))
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_split_sequence_runs_as_written(pool: Pool, flux: Reference) -> None:
    pair = pool.names[:2]
    found = pool.each(pair, compiled_over, meet(pool, pair), flux.folder, flux.settings)
    expected = latents(flux.folder, flux.settings, "")
    for blob, _ in found:
        split = LatentState.from_bytes(blob).tensors["latents"]
        assert float((split - expected).abs().max()) < LATENT_TOLERANCE


def test_a_family_without_repeated_blocks_is_refused(cogvideox: Reference) -> None:
    card = load_card(cogvideox.folder, CPU, torch.float32)
    with pytest.raises(ModelRefused, match="compile: diffusers names no repeated blocks"):
        card.compile()


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for a CPU")
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_the_whole_compiler_makes_the_same_latents(
    family: str, request: pytest.FixtureRequest
) -> None:
    reference: Reference = request.getfixturevalue(family)
    whole = latents(reference.folder, reference.settings, "inductor")
    expected = latents(reference.folder, reference.settings, "")
    assert float((whole - expected).abs().max()) < LATENT_TOLERANCE
