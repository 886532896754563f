"""What a policy that decides at events sees: every job that could start now, every worker.

    Scene: works (jobs whose latent is there)   seats (workers)   running (what they do now)
      │
      ▼ policy
    Decision: starts (these jobs, these steps, on these workers), rejections, when to ask again

A scene is a picture of one instant; nothing a policy does to it reaches the ledger.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..books.board import BoardForecast
from ..books.cluster import Worker
from ..books.ledger import Ledger
from ..books.lifecycle import JobState
from ..books.tracker import Job, Tracked
from ..starts import Decision, Start
from ..values import Holder, Request
from ..workflow import NodeKind, Section, Workflow
from .placement import Demand, Placement
from .standing import standing, standing_for


# Seats and works are never changed; made anew for every scene, they are not frozen for speed only.
@dataclass(slots=True, eq=False)
class Seat:
    """A worker."""

    index: int  # in cluster order, among usable workers
    worker: Worker
    free_us: int  # when what it was given is over; not before now
    idle: bool  # can be given work now

    @property
    def name(self) -> str:
        return self.worker.name


@dataclass(slots=True, eq=False)
class Work:
    """A job that could start now."""

    request: Request
    node: str
    section: Section  # of the node
    order: int  # rank of arrival
    arrived_us: int
    available_us: int  # now, or within the lead
    waiting_since_us: int  # last time it made progress
    first_step: int
    steps_left: int  # 1 for what is called once
    group: tuple[str, ...]  # ran its last denoising step
    holders: tuple[Holder, ...]  # have its latent
    company: str  # shares a batch with those of the same word only; its own id: with nobody

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def where(self) -> tuple[str, ...]:
        """Workers from which it goes on without a move."""
        return self.group or tuple(h.worker for h in self.holders)


@dataclass(frozen=True, slots=True)
class Running:
    """An assignment under way."""

    sequence: int
    node: str
    kind: NodeKind
    requests: tuple[str, ...]
    workers: tuple[str, ...]
    steps_left: int  # of the assignment
    step_us: int
    end_us: int  # predicted


class Scene:
    """One instant, as policies see it."""

    def __init__(self, ledger: Ledger, forecast: BoardForecast, now_us: int) -> None:
        self._ledger = ledger
        self.now_us = now_us
        lead_us = ledger.settings.lead_us
        # Without a lead, whoever is late is not done: it is its report that ends an assignment.
        late = set() if lead_us else ledger.board.busy()
        free_us, until_us = forecast.free_us, now_us + lead_us
        # Nothing is outstanding, so no report will ask again: what starts queues behind the step
        # that a worker may still be at, of work that was called off.
        free_at_us = until_us if ledger.board.flights else max(free_us.values(), default=until_us)
        self.seats: tuple[Seat, ...] = tuple(
            [
                Seat(i, w, free_us[w.name], free_us[w.name] <= free_at_us and w.name not in late)
                for i, w in enumerate(ledger.cluster.usable())
            ]
        )
        self.works: tuple[Work, ...] = tuple(_works(ledger, forecast, now_us, until_us))
        self._available_us = {w.request.id: w.available_us for w in self.works}
        self._forecast = forecast
        self._running: tuple[Running, ...] | None = None

    # ------------------------------------------------------------------------------ prices

    def call_us(self, request: Request, node: str, degree: int = 1, batch: int = 1) -> int:
        """Mean time of one call (or step) on the usable workers' slowest kind."""
        return self._ledger.predict_usable(request, node, degree, batch).mean_us

    def workflow(self, request: Request) -> Workflow:
        """What it consists of."""
        return self._ledger.workflow(request)

    def before_us(self, request: Request, batch: int = 1) -> int:
        """Mean time of the calls before its steps, each on one worker: their critical path."""
        workflow = self._ledger.workflow(request)
        return workflow.longest_us(workflow.before, lambda n: self.call_us(request, n, 1, batch))

    def step_us(self, request: Request, degree: int = 1, batch: int = 1) -> int:
        """Mean time of one step."""
        return self.call_us(request, self._ledger.workflow(request).stepped, degree, batch)

    def after_us(self, request: Request, batch: int = 1) -> int:
        """As `before_us`, of all that is behind its steps; later passes at their likely degree."""
        ledger = self._ledger
        workflow = ledger.workflow(request)
        if workflow.ending:
            return workflow.longest_us(workflow.after, lambda n: self.call_us(request, n, 1, batch))
        return workflow.longest_us(workflow.behind, lambda n: ledger.span(request, n).mean_us)

    def steps_us(self, request: Request) -> dict[int, int]:
        """Mean time of one denoising step, by every degree."""
        return dict(self._ledger.rates(request).mean_us)

    def safe_us(self, request: Request, node: str, degree: int = 1, batch: int = 1) -> int:
        """As `call_us`, the safe quantile."""
        return self._ledger.predict_usable(request, node, degree, batch).safe_us

    def degrees(self, request: Request) -> tuple[int, ...]:
        """Widths in which its denoiser can run on the usable workers, ascending."""
        return self._ledger.degrees(request)

    def batch_max(self, request: Request, node: str) -> int:
        """Most jobs of its model and shape that a worker takes at once."""
        return self._ledger.batch_max(request, node)

    def move_us(self, work: Work, workers: tuple[str, ...]) -> int:
        """Setting up a run there: moving the latent, forming the group."""
        if work.section is Section.BEFORE:
            return 0
        moving, cluster = self._ledger.moving, self._ledger.cluster
        return moving.cost_us(cluster, work.where, workers, work.section is Section.AFTER)

    def load_us(self, request: Request, node: str, workers: Iterable[str]) -> int:
        """Getting the node's weights onto all of these workers; they load at the same time."""
        ledger, known = self._ledger, self._ledger.cluster.workers
        return max((ledger.load_us(known[w], request, node) for w in workers), default=0)

    def resident(self, worker: str) -> tuple[str, ...]:
        """The parts on a worker, least recently used first."""
        return self._ledger.residency.parts(self._ledger.cluster.workers[worker])

    def parts(self, worker: str, model: str, node: str) -> tuple[str, ...]:
        """The parts that a node needs there."""
        return self._ledger.residency.needs(self._ledger.cluster.workers[worker], model, node)

    def footprint_mib(self, worker: str, model: str) -> int:
        """Memory of a whole model there, with its largest activations; 0: memory is no matter."""
        return self._ledger.residency.footprint_mib(self._ledger.cluster.workers[worker], model)

    # ------------------------------------------------------------------------------ state

    def tracked(self) -> Iterable[Tracked]:
        """All requests inside, in order of arrival: to be read only."""
        return self._ledger.tracked.values()

    @property
    def running(self) -> tuple[Running, ...]:
        """Assignments under way when the scene was made, in sequence order."""
        if self._running is None:
            self._running = tuple(
                Running(
                    sequence,
                    f.assignment.node,
                    f.kind,
                    tuple(m.request for m in f.assignment.batch),
                    f.assignment.workers,
                    f.steps_left,
                    f.assignment.step_time_us,
                    self._forecast.end_us[sequence],
                )
                for sequence, f in self._ledger.board.flights.items()
            )
        return self._running

    def idle(self, request: Request | None = None, degree: int = 1) -> list[Seat]:
        """Idle workers that could take part in steps of that width, in cluster order."""
        return [
            s
            for s in self.seats
            if s.idle and (request is None or s.worker.can(request.model, degree))
        ]

    @property
    def mixed(self) -> bool:
        """Not every worker that has a model runs every call of its requests."""
        return bool(self._ledger.named) or self._ledger.cluster.partial

    @property
    def partial(self) -> bool:
        """Some workers lack an operation of the chain of a model that they have."""
        return self._ledger.cluster.partial

    def can(self, seat: Seat, work: Work, degree: int = 1) -> bool:
        """The worker runs the work's node, as one of so many."""
        return self._ledger.can(seat.worker, work.request, work.node, degree)

    def begin_us(self, start: Start) -> int:
        """When workers and jobs of a start are all there."""
        times = [self._available_us[r] for r in start.requests]
        return max(times + [self._forecast.free_us[w] for w in start.workers])

    def placement(self) -> Placement:
        """Binds the idle workers, one group after the other."""
        return Placement(self._ledger.cluster, {s.name: s.free_us for s in self.seats if s.idle})

    def place(self, placement: Placement, work: Work, degree: int) -> tuple[str, ...] | None:
        """The best group of that width among what `placement` has left, bound; None: too few."""
        demand = Demand(
            degree,
            self.call_us(work.request, work.node, degree),
            max(work.available_us, self.now_us),
            work.group,
            tuple(h.worker for h in work.holders),
        )
        able = self._ledger.able_names(work.request, work.node, degree)
        members = placement.find(demand, able)
        if members is not None:
            placement.bind(members)
        return members


def _works(ledger: Ledger, forecast: BoardForecast, now_us: int, until_us: int) -> Iterable[Work]:
    for tracked in ledger.tracked.values():
        stepped = tracked.stepped
        calls = [j for j in tracked.before if j.state is JobState.READY]
        calls += [j for j in tracked.after if j.state is JobState.READY]
        if calls:
            yield from [_call(ledger, tracked, job, now_us) for job in calls]
        elif stepped.state is JobState.READY and tracked.steps_done < tracked.request.steps:
            done, left = tracked.steps_done, tracked.request.steps - tracked.steps_done
            holders = standing_for(ledger, tracked, stepped.node)[1]
            yield _work(tracked, stepped.node, now_us, done, left, tracked.group, holders)
        elif stepped.state is JobState.ASSIGNED and until_us > now_us:  # else its report is to come
            where = standing(ledger, tracked, forecast, now_us)
            left = 0 if where is None else tracked.request.steps - where.first_step
            if where is not None and left > 0 and where.available_us <= until_us:
                yield _work(
                    tracked,
                    stepped.node,
                    where.available_us,
                    where.first_step,
                    left,
                    where.group,
                    where.holders,
                )


def _call(ledger: Ledger, tracked: Tracked, job: Job, now_us: int) -> Work:
    """A node that is called once."""
    first_step, holders = standing_for(ledger, tracked, job.node)
    group = tracked.group if job.node in tracked.workflow.on_latents else ()
    return _work(tracked, job.node, now_us, first_step, 1, group, holders)


def _work(
    tracked: Tracked,
    node: str,
    available_us: int,
    first_step: int,
    steps_left: int,
    group: tuple[str, ...],
    holders: tuple[Holder, ...],
) -> Work:
    return Work(
        tracked.request,
        node,
        tracked.workflow.section[node],
        tracked.order,
        tracked.arrived_us,
        available_us,
        tracked.progressed_us,
        first_step,
        steps_left,
        group,
        holders,
        tracked.id if tracked.alone == node else "",
    )


__all__ = ["Decision", "Running", "Scene", "Seat", "Start", "Work"]
