"""What must hold in every run, checked at every plan, start, step and end.

    plans      rounds, sequences and epochs only grow; jobs are open, workers known and distinct
    workers    one thing at a time; weights inside the memory, and there when they are used
    requests   encode, steps in order and each exactly once, decode; none lost, none ended twice

After a truncation, a failure or the loss of a worker, a job may begin again at a step that it had
reached before; otherwise no step is left out or run twice. The checker keeps books of its own and
asks neither the scheduler nor the simulated workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from control.scheduler.values import DIT, TEXT, Assignment, Ended, Load, Outcome, Plan, Request


class InvariantError(AssertionError):
    """A rule was broken: by whom (request or worker), when (microseconds), and how."""

    def __init__(self, rule: str, subject: str, at_us: int, detail: str) -> None:
        super().__init__(f"{rule}: {subject} at {at_us} us: {detail}")
        self.rule = rule
        self.subject = subject
        self.at_us = at_us
        self.detail = detail


@dataclass(slots=True)
class _Progress:
    """Where a request stands, by its own runs."""

    request: Request
    encoded: bool = False
    decoded: bool = False
    attempt: int = 0  # of the last run that began
    steps: int = 0  # done in that attempt
    furthest: int = 0  # in any
    losses: int = 0  # workers lost when the last run began


@dataclass(slots=True)
class Checker:
    """Books of one run. Each method raises InvariantError where a rule is broken."""

    memory_mib: int = 0  # of each worker; 0: unbounded
    weights_mib: dict[str, int] = field(default_factory=dict)  # by part
    # By (model, node), those that have weights.
    parts: Mapping[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    _open: dict[str, _Progress] = field(default_factory=dict)
    _closed: set[str] = field(default_factory=set)
    _busy: dict[str, int] = field(default_factory=dict)  # worker -> sequence
    _resident: dict[str, set[str]] = field(default_factory=dict)
    _epochs: dict[tuple[str, ...], int] = field(default_factory=dict)
    _losses: int = 0
    _round: int = 0
    _sequence: int = 0
    _planned_us: int = 0

    # -------------------------------------------------------------------------------- facts

    def worker_up(self, worker: str) -> None:
        """A worker joins, or comes back without anything."""
        self._busy.pop(worker, None)
        self._resident[worker] = set()

    def worker_lost(self, worker: str) -> None:
        self._resident.pop(worker, None)
        self._losses += 1

    def arrived(self, request: Request, at_us: int) -> None:
        if request.id in self._open or request.id in self._closed:
            raise InvariantError("arrives-once", request.id, at_us, "it was here before")
        self._open[request.id] = _Progress(request)

    def ended(self, end: Ended) -> None:
        """A request ends: once, and as done only with every step run."""
        progress = self._open.pop(end.request, None)
        if progress is None:
            raise InvariantError("ends-once", end.request, end.at_us, "it is not open")
        self._closed.add(end.request)
        if end.outcome is Outcome.DONE:
            steps = progress.request.steps
            if not (progress.encoded and progress.decoded and progress.steps == steps):
                detail = f"done after {progress.steps} of {steps} steps"
                raise InvariantError("done-is-done", end.request, end.at_us, detail)

    def inside(self, requests: Iterable[str], at_us: int) -> None:
        """The scheduler knows of just those that came and did not end."""
        known = set(requests)
        if lost := sorted(self._open.keys() - known):
            raise InvariantError("nothing-lost", lost[0], at_us, "the scheduler forgot it")
        if stray := sorted(known - self._open.keys()):
            raise InvariantError("nothing-lost", stray[0], at_us, "it ended, or never came")

    # -------------------------------------------------------------------------------- plans

    def planned(self, plan: Plan) -> None:
        """Before the plan's own ends are entered."""
        at_us = plan.now_us
        if plan.round < self._round or at_us < self._planned_us:
            detail = f"round {plan.round} after {self._round}, last plan at {self._planned_us} us"
            raise InvariantError("plans-in-order", f"round {plan.round}", at_us, detail)
        self._round, self._planned_us = plan.round, at_us
        for a in plan.assignments:
            self._assigned(a, at_us)

    def _assigned(self, a: Assignment, at_us: int) -> None:
        subject = f"assignment {a.sequence}"
        if a.sequence <= self._sequence:
            raise InvariantError("sequences-grow", subject, at_us, f"after {self._sequence}")
        self._sequence = a.sequence
        if a.epoch < self._epochs.get(a.workers, 0):
            detail = f"epoch {a.epoch} after {self._epochs[a.workers]}"
            raise InvariantError("epochs-grow", subject, at_us, detail)
        self._epochs[a.workers] = a.epoch
        if len(set(a.workers)) != len(a.workers) or not a.workers or a.steps < 1:
            raise InvariantError("sane", subject, at_us, f"{a.steps} steps on {a.workers}")
        for worker in a.workers:
            if worker not in self._resident:
                raise InvariantError("known-workers", worker, at_us, f"{subject}: not in service")
        kinds = set()
        for member in a.batch:
            progress = self._open.get(member.request)
            if progress is None:
                raise InvariantError("open-requests", member.request, at_us, f"{subject}: over")
            kinds.add((progress.request.model, progress.request.shape))
            if a.node == DIT and member.first_step + a.steps > progress.request.steps:
                detail = f"{subject}: {a.steps} steps from {member.first_step}"
                raise InvariantError("steps-in-order", member.request, at_us, detail)
        if len(kinds) != 1 or len({m.request for m in a.batch}) != len(a.batch):
            raise InvariantError("one-kind-a-batch", subject, at_us, f"{len(kinds)} kinds")

    # -------------------------------------------------------------------------------- workers

    def loaded(self, load: Load, at_us: int) -> None:
        """Evictions, then the weights; nobody holds more than fits."""
        held = self._resident[load.worker]
        held.difference_update(load.evict)
        held.add(load.part)
        used = sum(self.weights_mib.get(part, 0) for part in held)
        if self.memory_mib and used > self.memory_mib:
            detail = f"{used} MiB of weights in {self.memory_mib}: {sorted(held)}"
            raise InvariantError("memory", load.worker, at_us, detail)

    def started(self, a: Assignment, at_us: int) -> None:
        """After its loads."""
        for worker in a.workers:
            if worker not in self._resident:
                raise InvariantError("known-workers", worker, at_us, "not in service")
            if worker in self._busy:
                detail = f"{a.sequence} starts, {self._busy[worker]} runs"
                raise InvariantError("one-thing-at-a-time", worker, at_us, detail)
            self._busy[worker] = a.sequence
        for member in a.batch:
            progress = self._open.get(member.request)
            if progress is not None:
                self._begins(progress, member.first_step, member.attempt, a, at_us)

    def _begins(
        self, progress: _Progress, first_step: int, attempt: int, a: Assignment, at_us: int
    ) -> None:
        request = progress.request
        if self.memory_mib:
            needed = self.parts.get((request.model, a.node), frozenset())
            for worker in a.workers:
                if not needed <= self._resident[worker]:
                    detail = f"{a.node} of {request.model} runs without its weights"
                    raise InvariantError("memory", worker, at_us, detail)
        if attempt < progress.attempt or a.node == TEXT:
            return  # called off in the meantime; and an encode needs nothing
        fell_back = attempt > progress.attempt or progress.losses != self._losses
        if fell_back and first_step <= progress.furthest:
            progress.steps = first_step
        progress.attempt, progress.losses = attempt, self._losses
        if not progress.encoded or first_step != progress.steps:
            detail = f"{a.node} from step {first_step}, {progress.steps} done"
            raise InvariantError("steps-in-order", request.id, at_us, detail)
        if a.node != DIT and progress.steps != request.steps:
            detail = f"{a.node} after {progress.steps} of {request.steps} steps"
            raise InvariantError("steps-in-order", request.id, at_us, detail)

    def stepped(self, a: Assignment, done: int, at_us: int) -> None:
        """The assignment's step number `done` (from 1) ended on all its workers."""
        for worker in a.workers:
            if self._busy.get(worker) != a.sequence:
                detail = f"a step of {a.sequence} ended, {self._busy.get(worker)} runs"
                raise InvariantError("one-thing-at-a-time", worker, at_us, detail)
        for member in a.batch:
            progress = self._open.get(member.request)
            if progress is None:
                continue
            if a.node == TEXT:
                progress.encoded = True
            elif a.node == DIT:
                reached = member.first_step + done
                progress.furthest = max(progress.furthest, reached)
                if member.attempt == progress.attempt:
                    if reached != progress.steps + 1:
                        detail = f"step {reached} ended after {progress.steps}"
                        raise InvariantError("steps-in-order", member.request, at_us, detail)
                    progress.steps = reached
            elif member.attempt == progress.attempt:
                progress.decoded = True

    def released(self, a: Assignment) -> None:
        """The assignment is over, or its workers gave it up."""
        for worker in a.workers:
            if self._busy.get(worker) == a.sequence:
                del self._busy[worker]
