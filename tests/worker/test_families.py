"""Family by family: the stock pipeline's picture, in every layout, batch and schedule.

Each row of the table is one tiny model, saved as an ordinary folder and loaded from it. `make test`
runs a slice, `make test-full` all of it and prints the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpuworker.attention.elastic import DegreeRefused
from gpuworker.collectives.team import GroupLayout, Team
from gpuworker.loading import load_card
from gpuworker.models.card import ShapeRefused
from tests.worker import worker_tasks as tasks
from tests.worker.families import FAMILIES, VIDEOS, Family
from tests.worker.family_table import ERROR
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import (
    LATENT_TOLERANCE,
    Schedule,
    latent_error,
    layouts,
    level_error,
    meet,
    random_schedule,
    run_schedule,
)
from tests.worker.worker_pool import CPU, Pool

Made = dict[str, Reference]
Record = Callable[[str, object], None]


class Mute:
    """A group in which nobody may speak."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def all_to_all(self, flat: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        raise AssertionError("nothing may be sent")

    def all_gather(self, shard: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        raise AssertionError("nothing may be sent")


@pytest.fixture(scope="session")
def made() -> Made:
    """Models made so far."""
    return {}


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.full] if family.full else [])
        for name, family in FAMILIES.items()
    ]
)
def name(request: pytest.FixtureRequest) -> str:
    """A family's name."""
    return str(request.param)


@pytest.fixture
def family(name: str) -> Family:
    """What the table says of it."""
    return FAMILIES[name]


@pytest.fixture
def reference(
    name: str, family: Family, made: Made, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    """Its model and the stock answer."""
    if name not in made:
        made[name] = family.make(tmp_path_factory.mktemp("families") / f"tiny-{name}")
    return made[name]


def check(pool: Pool, reference: Reference, schedule: Schedule, record_property: Record) -> None:
    """The stock pipeline's latents and picture."""
    state, frames = run_schedule(pool, reference, schedule)
    error, levels = latent_error(state, reference), level_error(frames, reference)
    record_property(ERROR, error)
    assert error <= LATENT_TOLERANCE, f"latents differ by {error} after {schedule}"
    assert levels <= 1, f"pictures differ by {levels} levels after {schedule}"


@pytest.mark.parametrize("degree", [1, 2, pytest.param(4, marks=pytest.mark.full)])
def test_every_layout(
    pool: Pool, family: Family, reference: Reference, degree: int, record_property: Record
) -> None:
    for layout in layouts(degree, family.cfg):
        whole = [(tuple(range(degree)), reference.steps, layout)]
        check(pool, reference, whole, record_property)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.full)])
def test_random_schedules(
    pool: Pool, family: Family, reference: Reference, seed: int, record_property: Record
) -> None:
    drawn = random_schedule(seed, reference.steps, family.cfg)
    check(pool, reference, drawn, record_property)


def test_preempted_and_resumed_elsewhere(
    pool: Pool, reference: Reference, record_property: Record
) -> None:
    """Parked as bytes between any two of the legs; another worker, another degree."""
    steps = reference.steps
    check(pool, reference, [((0,), 2), ((2, 3), steps - 4), ((1,), 2)], record_property)


@pytest.mark.parametrize("degree", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_batch_of_four(
    pool: Pool, family: Family, reference: Reference, degree: int, record_property: Record
) -> None:
    """Companions with other seeds, prompts, guidance and positions come and go.

    Those of a job that begins from a picture begin from none.
    """
    steps, mine = reference.steps, reference.settings
    others = [
        {**mine, "seed": 21, "prompt": "a blue boat at night"},
        {**mine, "seed": 22, "guidance_scale": mine["guidance_scale"] + 1.5},
        {**mine, "seed": 23, "prompt": "the sea"},
    ]
    members = pool.names[:degree]
    for layout in layouts(degree, family.cfg):
        batch = tasks.Batch(
            reference.folder,
            (mine, *others),
            (0, steps - 2, 1, 3),
            meet(pool, members),
            layout,
            reference.start,
        )
        for state in pool.each(members, tasks.step_together, batch):
            error = latent_error(state, reference)
            record_property(ERROR, error)
            assert error <= LATENT_TOLERANCE, f"the companions changed it by {error} in {layout}"


@pytest.mark.parametrize(
    ("video", "frames"),
    [
        pytest.param(name, frames, marks=[pytest.mark.full] if place else [])
        for name, lengths in VIDEOS.items()
        for place, frames in enumerate(lengths.frames)
    ],
)
def test_another_number_of_frames(
    pool: Pool, video: str, frames: int, tmp_path: Path, record_property: Record
) -> None:
    """The stock pipeline's video of that length, on one worker and shared by two."""
    reference = VIDEOS[video].make(tmp_path / f"tiny-{video}-{frames}", frames=frames)
    assert len(reference.frames) == frames
    for members in ((0,), (1, 0)):
        check(pool, reference, [(members, reference.steps)], record_property)


@pytest.mark.parametrize("name", sorted(VIDEOS.keys() & FAMILIES.keys()), indirect=True)
def test_a_number_of_frames_between_is_refused(name: str, reference: Reference) -> None:
    card = load_card(reference.folder, CPU, torch.float32)
    facts, wanted = card.facts, VIDEOS[name].refused
    for frames in (wanted, facts.frames_max + facts.frames_multiple):
        with pytest.raises(ShapeRefused) as refused:
            card.encode(**reference.settings | {"frames": frames})
        assert (refused.value.field, refused.value.value) == ("frames", frames)
        assert str(facts.frames_max) in refused.value.allowed


def test_loaded_from_its_folder(reference: Reference) -> None:
    """The card says what it can do, and refuses the rest by name."""
    card = load_card(reference.folder, CPU, torch.float32)
    facts = card.facts
    assert facts.name.startswith("tiny-") and facts.degrees[0] == 1 and len(facts.degrees) > 1
    settings: dict[str, Any] = reference.settings
    shape = {key: settings[key] for key in ("width", "height", "frames", "steps")}
    facts.check(**shape, guidance_scale=settings["guidance_scale"])
    state = card.encode(**settings)
    assert not state.finished and state.steps_total == settings["steps"]
    once, again = card.decode(state), card.decode(state)
    assert once.dtype == np.uint8 and np.array_equal(once, again)


def test_heads_that_do_not_divide_are_refused_before_the_kernel(reference: Reference) -> None:
    card = load_card(reference.folder, CPU, torch.float32)
    assert 3 not in card.facts.degrees
    with pytest.raises(DegreeRefused) as refused:
        card.step([card.encode(**reference.settings)], Team(Mute(3), GroupLayout(ulysses=3)))
    assert refused.value.degree == 3 and refused.value.allowed == card.facts.degrees
