"""A request inside the scheduler: its jobs, its artifacts, and what its service has cost.

    text ──▶ dit (S steps) ──▶ vae        a job for each node of its workflow, here of the chain;
                                          `attempt` counts restarts of whichever runs

A request is in one *pass* at a time: that of the first stepped node which is not done. `request`
and `workflow` are what it asked for, seen from there (see catalogue.py); `steps_done`, `holders`
and `group` are of that stepped node. What other stepped nodes left stays in `marks`.

`holders` says which worker has a copy of the latents after how many steps: every member of a group
gets one at each step, and those who ran earlier steps keep theirs as free checkpoints until the
request ends or they are lost. The latents travel with what the stepped node took: a copy of them
stands for these inputs, as far as that node needs them. Of a plain chain one after 0 steps is the
inputs alone, and all artifacts are told of as latents. Other artifacts are in `copies`, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..values import Holder, Input, Request
from ..workflow import CHAIN, Redo, Workflow
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

    asked: Request  # as it arrived
    order: int  # of arrival
    arrived_us: int
    progressed_us: int  # when it last arrived, ended a step or was held up by nobody
    legs: tuple[Request, ...] = ()  # as it was entered, by pass; empty: a chain, as it arrived
    views: tuple[Workflow, ...] = (CHAIN,)  # by pass
    request: Request = field(init=False)  # what it asked for, seen from its pass
    workflow: Workflow = field(init=False)
    jobs: dict[str, Job] = field(init=False)  # by node, in the workflow's order
    first: tuple[Job, ...] = field(init=False)  # ready when it arrived
    before: tuple[Job, ...] = field(init=False)  # of the nodes upstream of the stepped one
    stepped: Job = field(init=False)
    after: tuple[Job, ...] = field(init=False)
    last: Job = field(init=False)
    attempt: int = 0
    steps_done: int = 0  # of the latent that it goes on from
    # By stepped node: worker -> steps done of its copy.
    marks: dict[str, dict[str, int]] = field(init=False)
    holders: dict[str, int] = field(init=False)  # of these, the present pass's
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
    lacks: bool = False  # something was lost since it last stood anew

    def __post_init__(self) -> None:
        self.legs = self.legs or (self.asked,)
        workflow = self.views[0]
        self.jobs = {node: Job(self.asked.id, node) for node in workflow.order}
        self.first = tuple(self.jobs[node] for node in workflow.first)
        self.last = self.jobs[workflow.last]
        self.marks = {node: {} for node in workflow.steppeds}
        self._stand(0)
        for job in self.first:
            job.move(JobState.READY)

    def _stand(self, at: int) -> None:
        """It is in that pass now."""
        workflow = self.views[at]
        self.request, self.workflow = self.legs[at], workflow
        self.before = tuple(self.jobs[node] for node in workflow.upstream)
        self.stepped = self.jobs[workflow.stepped]
        self.after = tuple(self.jobs[node] for node in workflow.after)
        self.holders = self.marks[workflow.stepped]

    @property
    def id(self) -> str:
        return self.asked.id

    @property
    def steps_over(self) -> int:
        """Steps done, over all passes."""
        at = self.workflow.at
        return self.steps_done + sum([leg.steps for leg in self.legs[:at]] if at else ())

    @property
    def steps_total(self) -> int:
        """Steps of all passes."""
        return sum([leg.steps for leg in self.legs])

    @property
    def steps_lost(self) -> int:
        return self.steps_run - self.steps_over

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
        begun = self.workflow.ending
        for job in self.after:
            begun = begun and job.state not in NOT_BEGUN
        return begun

    def inputs(self, node: str) -> tuple[str, ...]:
        """Workers with a copy of something that a node takes, by name; not of a plain chain."""
        names = self.workflow.node[node].inputs
        return tuple(sorted({w for name in names for w in self.where(name)}))

    def where(self, artifact: str) -> tuple[str, ...]:
        """Workers with a copy of an artifact, all steps behind it; by name, or as they made it."""
        maker = self.workflow.maker[artifact]
        marks = self.marks.get(maker)
        if marks is None:
            return self.copies.get(artifact, ())
        steps = self.steps_of(maker)
        return tuple(sorted([w for w, done in marks.items() if done >= steps]))

    def steps_of(self, node: str) -> int:
        """Steps of a stepped node, in all."""
        return self.legs[self.workflow.steppeds.index(node)].steps

    def everywhere(self) -> set[str]:
        """Workers with a copy of anything."""
        found = {w for marks in self.marks.values() for w in marks}
        return found.union(*self.copies.values())

    def beside(self, worker: str) -> list[tuple[str, ...]]:
        """Of each artifact that a worker has: the others with a copy as good."""
        found = [
            tuple([w for w, done in marks.items() if w != worker and done >= marks[worker]])
            for marks in self.marks.values()
            if worker in marks
        ]
        copies = self.copies.values()
        return found + [tuple([w for w in c if w != worker]) for c in copies if worker in c]

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
        if not workflow.plain or workflow.makers[workflow.stepped] != (node,):
            self.made(node, workers)
        elif not self.group:  # else steps behind it were told of first
            self.holders.clear()
            self.holders.update({w: 0 for w in workers})
        return self.released(node)

    def made(self, node: str, workers: tuple[str, ...]) -> None:
        """Workers with what a node, called once, makes."""
        for artifact in self.workflow.node[node].outputs:
            known = self.copies.get(artifact.name, ())
            self.copies[artifact.name] = tuple(dict.fromkeys((*known, *workers)))

    def pass_over(self) -> tuple[str, ...]:
        """The last step of its pass is done: it goes over to the next one, if there is one; returns
        the nodes now ready.
        """
        self.stepped.move(JobState.DONE)
        ready = self.released(self.stepped.node)
        if not self.workflow.ending:
            open_ = self._open_passes()
            self._stand(open_[0] if open_ else len(self.marks) - 1)
            self.group = ()
            self.steps_done = 0 if open_ else self.request.steps
            self.lacks = self.lacks or bool(self.holders)  # of an earlier time
        return ready

    def _open_passes(self) -> list[int]:
        """Those whose steps are not done."""
        nodes = enumerate(self.marks)
        return [at for at, node in nodes if self.jobs[node].state is not JobState.DONE]

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
        held = False
        for marks in self.marks.values():
            held = marks.pop(worker, None) is not None or held
        for name, workers in self.copies.items():
            if worker in workers:
                self.copies[name] = tuple([w for w in workers if w != worker])
                held = True
        self.lacks = self.lacks or held
        return held

    def lose_inputs(self, worker: str, inputs: Iterable[Input]) -> None:
        """A worker does not have some artifacts, in these versions, that were looked for there."""
        for one in inputs:
            marks = self.marks.get(self.workflow.maker[one.artifact])
            if marks is None:
                known = self.copies.get(one.artifact, ())
                self.copies[one.artifact] = tuple([w for w in known if w != worker])
            elif marks.get(worker, -1) >= one.version:
                del marks[worker]
        self.lacks = True

    def resume(self, living: Callable[[str], bool]) -> None:
        """Stands the jobs at what survived on living workers, by the workflow's rule; those that
        have something outstanding go on.
        """
        furthest = self._furthest(living)
        running = {node for node, job in self.jobs.items() if job.outstanding}
        redo = self._redo(living, furthest, running)
        for node, job in self.jobs.items():
            if node in running:
                continue
            if node in redo.blocked:
                job.move(JobState.BLOCKED)
            elif node in redo.ready:
                job.move(JobState.READY)
            elif job.state is not JobState.DONE:  # a copy turned up that nobody had known of
                job.move(JobState.ASSIGNED)
                job.move(JobState.DONE)
        self._resume_pass(furthest)

    def vain(self, living: Callable[[str], bool]) -> bool:
        """Something outstanding is not needed, or begins behind what a living worker has."""
        furthest = self._furthest(living)
        redo = self._redo(living, furthest, set())
        out = [node for node, job in self.jobs.items() if job.outstanding]
        if any(node not in redo.ready and node not in redo.blocked for node in out):
            return True
        return self.stepped.node in out and furthest.get(self.stepped.node, 0) > self.steps_done

    def _furthest(self, living: Callable[[str], bool]) -> dict[str, int]:
        """Steps behind the best living copy, by stepped node that has one."""
        found: dict[str, int] = {}
        for node, marks in self.marks.items():
            done = max([done for w, done in marks.items() if living(w)], default=None)
            if done is not None:
                found[node] = done
        return found

    def _redo(
        self, living: Callable[[str], bool], furthest: dict[str, int], running: set[str]
    ) -> Redo:
        nodes = self.workflow.node
        survive = {name for name, workers in self.copies.items() if any(map(living, workers))}
        for node, done in furthest.items():
            if done >= self.steps_of(node):
                survive.update([artifact.name for artifact in nodes[node].outputs])
        coming = {artifact.name for node in running for artifact in nodes[node].outputs}
        return self.workflow.redo(survive, running.union(furthest), coming)

    def _resume_pass(self, furthest: dict[str, int]) -> None:
        """Into the pass whose steps run, else the first one whose steps are not done; how far it
        got there.
        """
        before = self.workflow.stepped
        open_ = self._open_passes()
        at = open_[0] if open_ else len(self.marks) - 1
        running = [i for i, node in enumerate(self.marks) if self.jobs[node].outstanding]
        self._stand(running[0] if running else at)
        self.lacks = self.workflow.at != at
        stepped, steps = self.stepped, self.request.steps
        if stepped.outstanding:
            self._count_over()
            return
        if stepped.node != before:
            self.group = ()
        done = furthest.get(stepped.node)
        self.steps_done = steps if stepped.state is JobState.DONE else done or 0
        self._count_over()
        if done is None and self.steps_done == 0:
            self.group = ()

    def _count_over(self) -> None:
        """Steps that an earlier leader saw, of which something survives, are not lost."""
        self.steps_run = max(self.steps_run, self.steps_over)
