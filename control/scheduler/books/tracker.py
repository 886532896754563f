"""A request inside the scheduler: its three jobs, its latent, and what its service has cost.

    text ──▶ dit (S steps) ──▶ vae        one job each; `attempt` counts restarts of whichever runs

The latent is made by the text job (0 steps done) and needed with all S steps by the vae job.
`holders` says which worker has a copy after how many steps: every member of a group gets one at
each step, and those who ran earlier steps keep theirs as free checkpoints until the request ends or
they are lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..values import DIT, TEXT, VAE, Holder, Request
from .lifecycle import JOB_MOVES, JobState, moved

NODES = (TEXT, DIT, VAE)


@dataclass(slots=True)
class Job:
    """One node of one request."""

    request: str
    node: str
    state: JobState = JobState.BLOCKED
    outstanding: list[int] = field(default_factory=list)  # sequences, oldest first

    def move(self, target: JobState) -> None:
        self.state = moved(f"job {self.request}/{self.node}", self.state, target, JOB_MOVES)


@dataclass(slots=True)
class Tracked:
    """What the scheduler knows of one request that has not ended."""

    request: Request
    order: int  # of arrival
    arrived_us: int
    progressed_us: int  # when it last arrived, ended a step or was held up by nobody
    jobs: dict[str, Job] = field(default_factory=dict)
    attempt: int = 0
    steps_done: int = 0  # of the latent that it goes on from
    holders: dict[str, int] = field(default_factory=dict)  # worker -> steps done of its copy
    group: tuple[str, ...] = ()  # ran its last denoising step
    steps_run: int = 0  # ended, whether or not their result survived
    degree_changes: int = 0
    moves: int = 0
    # By node, steps and kind: of each failure, who may have been to blame.
    failures: dict[tuple[str, int, str], list[tuple[str, ...]]] = field(default_factory=dict)
    alone: str = ""  # node at which it runs in no batch: one that it was in failed there
    promised: bool = False  # firmly: it is not given up for one that came later

    def __post_init__(self) -> None:
        self.jobs = {node: Job(self.request.id, node) for node in NODES}
        self.jobs[TEXT].move(JobState.READY)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def steps_lost(self) -> int:
        return self.steps_run - self.steps_done

    @property
    def outstanding(self) -> list[int]:
        """Sequences of all its assignments, oldest first."""
        return sorted([s for job in self.jobs.values() for s in job.outstanding])

    def latest(self) -> tuple[Holder, ...]:
        """Those who hold the latent that it goes on from, by name."""
        steps_done = self.steps_done
        names = [w for w, done in self.holders.items() if done == steps_done]
        names.sort()
        return tuple([Holder(worker=w, steps_done=steps_done) for w in names])

    def stepped(self, steps_done: int, workers: tuple[str, ...], at_us: int) -> None:
        """Denoising went on to `steps_done` on these workers."""
        if self.group and set(self.group) != set(workers):
            self.degree_changes += len(self.group) != len(workers)
            self.moves += set(self.group).isdisjoint(workers)
        self.group = workers
        self.steps_run += max(0, steps_done - self.steps_done)
        self.steps_done = steps_done
        self.progressed_us = at_us
        for worker in workers:
            self.holders[worker] = steps_done

    def resume_from(self, steps_done: int | None) -> None:
        """Stands the jobs at the latest latent that survived; at the encode again if none did."""
        text, dit, vae = (self.jobs[n] for n in NODES)
        if steps_done is None:
            self.steps_done = 0
            self.group = ()
            for job in (vae, dit):
                job.move(JobState.BLOCKED)
            text.move(JobState.READY)
            return
        self.steps_done = steps_done
        self.steps_run = max(self.steps_run, steps_done)
        if text.state is not JobState.DONE:  # a copy turned up that nobody had known of
            text.move(JobState.ASSIGNED)
            text.move(JobState.DONE)
        done = steps_done >= self.request.steps
        if not done:
            vae.move(JobState.BLOCKED)
            dit.move(JobState.READY)
            return
        if dit.state is not JobState.DONE:
            dit.move(JobState.ASSIGNED)
            dit.move(JobState.DONE)
        vae.move(JobState.READY)
