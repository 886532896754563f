"""A denoise job over a pool of test workers: encode, segments on changing groups, the outcome."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuworker.collectives.team import GroupLayout
from gpuworker.state import LatentState
from tests.worker import worker_tasks as tasks
from tests.worker.tiny_models import Reference
from tests.worker.worker_pool import Pool

LATENT_TOLERANCE = 1e-4  # float32, the contract
Leg = tuple[tuple[int, ...], int, GroupLayout]  # places of the members in the pool, steps, layout
Schedule = Sequence[tuple[tuple[int, ...], int] | Leg]  # without a layout: plain Ulysses


@dataclass
class Job:
    """One request on the pool; `holders` are the workers that have its newest state."""

    pool: Pool
    reference: Reference
    name: str
    holders: tuple[str, ...] = ()

    def encode(self, worker: str) -> None:
        """Makes the first state, on one worker."""
        made = self.reference
        self.pool.one(worker, tasks.encode, made.folder, self.name, made.settings, made.start)
        self.holders = (worker,)

    def run(
        self,
        members: Sequence[str],
        steps: int,
        timeout_s: float = 20.0,
        plant: str = "",
        layout: GroupLayout | None = None,
    ) -> list[int | tasks.Loss]:
        """Runs steps on a new group: from a member that holds the state, or else by a copy."""
        segment = self.segment(members, steps, timeout_s, plant, layout)
        outcome = self.pool.each(members, tasks.denoise, segment)
        self.holders = tuple(members)
        return outcome

    def segment(
        self,
        members: Sequence[str],
        steps: int,
        timeout_s: float,
        plant: str,
        layout: GroupLayout | None = None,
    ) -> tasks.Segment:
        """The order for such a run."""
        holders = [name for name in members if name in self.holders]
        fetch_from = ""
        if not holders:
            self.pool.one(self.holders[0], tasks.offer, self.name)
            fetch_from = self.pool.address(self.holders[0])
        source = members.index(holders[0]) if holders else 0
        meeting = meet(self.pool, members, timeout_s)
        folder = self.reference.folder
        return tasks.Segment(folder, self.name, meeting, steps, source, fetch_from, layout, plant)

    def states(self) -> list[bytes]:
        """The newest state on each holder."""
        return [self.pool.one(name, tasks.blob, self.name) for name in self.holders]

    def frames(self) -> Any:
        """The picture, decoded by the last holder."""
        return self.pool.one(self.holders[-1], tasks.pictures, self.reference.folder, self.name)

    def forget(self) -> None:
        """Drops it everywhere."""
        self.pool.each(self.pool.names, tasks.forget, self.name)


def meet(pool: Pool, members: Sequence[str], timeout_s: float = 20.0) -> tasks.Meeting:
    """A group that has not been before."""
    return tasks.Meeting(pool.next_epoch(), tuple(members), pool.address(members[0]), timeout_s)


def run_schedule(
    pool: Pool, reference: Reference, schedule: Schedule, plant: str = ""
) -> tuple[bytes, Any]:
    """Runs a whole job; returns its last state, which all holders agree on, and the picture."""
    names = pool.names
    job = Job(pool, reference, f"job{pool.next_epoch()}")
    job.encode(names[schedule[0][0][0]])
    done = 0
    for places, steps, *layout in schedule:
        done += steps
        members = [names[place] for place in places]
        outcome = job.run(members, steps, plant=plant, layout=layout[0] if layout else None)
        assert outcome == [done] * len(places), (schedule, outcome)
    states, frames = job.states(), job.frames()
    assert len(set(states)) == 1, f"members disagree after {schedule}"
    job.forget()
    return states[0], frames


def latent_error(state: bytes, reference: Reference) -> float:
    """Largest difference to the latents of the stock pipeline."""
    latents = LatentState.from_bytes(state).tensors["latents"]
    return float((latents - reference.latents).abs().max())


def level_error(frames: Any, reference: Reference) -> int:
    """Largest difference to the pixels of the stock pipeline, in levels."""
    assert frames.shape == reference.frames.shape
    return int(np.abs(frames.astype(int) - reference.frames.astype(int)).max())


def random_schedule(seed: int, steps: int, cfg: tuple[int, ...] = (1,)) -> list[Leg]:
    """Two to five segments of random degree, members, order and layout; `cfg`: its halves."""
    chance = random.Random(seed)
    cuts = sorted(chance.sample(range(1, steps), chance.randint(1, 4)))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, steps], strict=True)]
    schedule: list[Leg] = []
    for n in lengths:
        layout = chance.choice(layouts(chance.choice((1, 2, 4)), cfg))
        schedule.append((tuple(chance.sample(range(4), layout.degree)), n, layout))
    return schedule


def layouts(degree: int, cfg: tuple[int, ...] = (1,)) -> list[GroupLayout]:
    """All layouts of a degree that is a power of two."""
    found = []
    for halves in cfg:
        for ulysses in (1, 2, 4):
            if degree % (halves * ulysses) == 0:
                found.append(GroupLayout(halves, ulysses, degree // halves // ulysses))
    return found
