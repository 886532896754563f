"""A request inside the scheduler: its jobs, its artifacts, and what its service has cost.

    text ──▶ dit (S steps) ──▶ vae        a job for each node of its workflow, here of the chain;
                                          `attempt` counts restarts of whichever runs

The latents travel with what the stepped node takes: a copy after 0 steps is its inputs alone, one
after S steps is what those behind it need. `holders` says which worker has a copy after how many
steps: every member of a group gets one at each step, and those who ran earlier steps keep theirs as
free checkpoints until the request ends or they are lost. Other artifacts are in `copies`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..values import Holder, Request
from ..workflow import CHAIN, Workflow
from .lifecycle import JOB_MOVES, JobState, moved

NOT_BEGUN = (JobState.READY, JobState.BLOCKED)


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
    workflow: Workflow = CHAIN
    jobs: dict[str, Job] = field(init=False)  # by node, in the workflow's order
    first: tuple[Job, ...] = field(init=False)  # ready when it arrived
    before: tuple[Job, ...] = field(init=False)  # of the nodes before the stepped one
    stepped: Job = field(init=False)
    after: tuple[Job, ...] = field(init=False)
    last: Job = field(init=False)
    attempt: int = 0
    steps_done: int = 0  # of the latent that it goes on from
    holders: dict[str, int] = field(default_factory=dict)  # worker -> steps done of its copy
    # Artifact -> workers with a copy, of nodes called once; not those that are latents of 0 steps.
    copies: dict[str, tuple[str, ...]] = field(default_factory=dict)
    group: tuple[str, ...] = ()  # ran its last denoising step
    steps_run: int = 0  # ended, whether or not their result survived
    degree_changes: int = 0
    moves: int = 0
    # By node, steps and kind: of each failure, who may have been to blame.
    failures: dict[tuple[str, int, str], list[tuple[str, ...]]] = field(default_factory=dict)
    alone: str = ""  # node at which it runs in no batch: one that it was in failed there
    promised: bool = False  # firmly: it is not given up for one that came later

    def __post_init__(self) -> None:
        workflow = self.workflow
        self.jobs = {node: Job(self.request.id, node) for node in workflow.order}
        self.first = tuple(self.jobs[node] for node in workflow.first)
        self.before = tuple(self.jobs[node] for node in workflow.before)
        self.stepped = self.jobs[workflow.stepped]
        self.after = tuple(self.jobs[node] for node in workflow.after)
        self.last = self.jobs[workflow.last]
        for job in self.first:
            job.move(JobState.READY)

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

    @property
    def untouched(self) -> bool:
        """It stands as at its arrival: nobody was given any of it, or all has to be done again."""
        for job in self.first:
            if job.state is not JobState.READY:
                return False
        for job in self.jobs.values():
            if job.outstanding:
                return False
        return self.last.state is JobState.BLOCKED

    @property
    def prepared(self) -> bool:
        """All that its steps need was made."""
        return all([job.state is JobState.DONE for job in self.before])

    @property
    def preparing(self) -> bool:
        """All that its steps need was made or is being made."""
        begun = True
        for job in self.before:
            begun = begun and job.state not in NOT_BEGUN
        return begun

    @property
    def ending(self) -> bool:
        """All calls behind its steps were given to somebody."""
        begun = True
        for job in self.after:
            begun = begun and job.state not in NOT_BEGUN
        return begun

    def inputs(self, node: str) -> tuple[str, ...]:
        """Workers with a copy of something that a node takes from nodes called once, by name."""
        names = self.workflow.node[node].inputs
        return tuple(sorted({w for name in names for w in self.copies.get(name, ())}))

    def latest(self) -> tuple[Holder, ...]:
        """Those who hold the latent that it goes on from, by name."""
        steps_done = self.steps_done
        names = [w for w, done in self.holders.items() if done == steps_done]
        names.sort()
        return tuple([Holder(worker=w, steps_done=steps_done) for w in names])

    def advance(self, steps_done: int, workers: tuple[str, ...], at_us: int) -> None:
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

    def called(self, node: str, workers: tuple[str, ...], at_us: int) -> tuple[str, ...]:
        """A node that is called once ended on these workers; returns the nodes now ready."""
        workflow = self.workflow
        self.jobs[node].move(JobState.DONE)
        self.progressed_us = at_us
        if workflow.makers[workflow.stepped] == (node,):
            if not self.group:  # else steps behind it were told of first
                self.holders = {w: 0 for w in workers}
        else:
            self.made(node, workers)
        return self.released(node)

    def made(self, node: str, workers: tuple[str, ...]) -> None:
        """Workers with what a node, called once, makes."""
        self.copies.update({a.name: workers for a in self.workflow.node[node].outputs})

    def released(self, node: str) -> tuple[str, ...]:
        """A node is done: moves those that waited for it alone, and returns them."""
        done = [n for n, job in self.jobs.items() if job.state is JobState.DONE]
        ready = self.workflow.released(node, done)
        blocked = [n for n in ready if self.jobs[n].state is JobState.BLOCKED]
        for follower in blocked:
            self.jobs[follower].move(JobState.READY)
        return tuple(blocked)

    def lose(self, worker: str) -> bool:
        """What a worker held is gone; whether it held anything."""
        held = self.holders.pop(worker, None) is not None
        for name, workers in self.copies.items():
            if worker in workers:
                self.copies[name] = tuple([w for w in workers if w != worker])
                held = True
        return held

    def resume(self, living: Callable[[str], bool]) -> None:
        """Stands the jobs at what survived on living workers, by the workflow's rule."""
        steps = self.request.steps
        furthest = max([done for w, done in self.holders.items() if living(w)], default=None)
        survive = {name for name, workers in self.copies.items() if any(map(living, workers))}
        stepped = self.workflow.node[self.stepped.node]
        if furthest is not None:
            survive.update(stepped.inputs)
            self.steps_run = max(self.steps_run, furthest)
        if furthest is not None and furthest >= steps:
            survive.update([artifact.name for artifact in stepped.outputs])
        redo = self.workflow.redo(survive)
        for node, job in self.jobs.items():
            if node in redo.blocked:
                job.move(JobState.BLOCKED)
            elif node in redo.ready:
                job.move(JobState.READY)
            elif job.state is not JobState.DONE:  # a copy turned up that nobody had known of
                job.move(JobState.ASSIGNED)
                job.move(JobState.DONE)
        self.steps_done = steps if self.stepped.state is JobState.DONE else furthest or 0
        if furthest is None and self.steps_done == 0:
            self.group = ()
