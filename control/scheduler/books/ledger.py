"""Everything the scheduler knows between two calls, and the operations that modules share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..settings import Settings
from ..times.drift import Shift
from ..times.latency import LatencyModel, Prediction
from ..values import Ended, Outcome, Request, Shape, Truncation
from ..workflow import Degrees, NodeKind, Workflow
from .board import Board
from .catalogue import COURSES_MAX, WORKFLOWS_MAX, CallSpec, Catalogue
from .cluster import Cluster, Worker
from .fetches import FetchesUnderWay
from .lifecycle import JobState, WorkerState
from .memory_limits import MemoryLimits
from .moving import Moving
from .overdue import Overdue
from .quarantine import Quarantine, Quarantined
from .residency import Residency
from .stragglers import Slow, Stragglers
from .tracker import Tracked

WORKERS_MAX = 4096  # beyond these, all lost workers are forgotten …
FORGOTTEN_AFTER_US = 3_600_000_000  # … below, those lost for so long
DRAINED_MAX = 65_536  # names that operators want drained
RATES_MAX = 4096  # models and shapes whose call times are kept at hand
PROGRESSED_MAX = 4096
NOTICES_MAX = 256  # untold ones about slow workers and drift
TOUCHED_MAX = 65_536  # changed requests beyond those inside


Notice = Slow | Shift | Quarantined


class Rates(NamedTuple):
    """What the calls of a model and shape take on the usable workers. To be read only."""

    gpus: tuple[str, ...]  # kinds that have the model
    degrees: tuple[int, ...]  # ascending
    mean_us: dict[int, int]  # of one step, by degree
    safe_us: dict[int, int]
    width_us: dict[int, int]  # mean, by any width that so many workers with the model could run
    after_safe_us: int  # of all that is behind the steps, along its critical path
    calls: dict[tuple[str, int, int], Prediction]  # by node, degree and batch, as they come up


@dataclass(slots=True)
class Ledger:
    """The scheduler's memory. Dicts are read in insertion order or sorted, never by hash."""

    settings: Settings
    latency: LatencyModel
    cluster: Cluster
    moving: Moving
    residency: Residency
    catalogue: Catalogue = field(default_factory=Catalogue)
    # The degree at which most steps of a request will run: the policy's, of times by degree.
    likely_degree: Callable[[Mapping[int, int]], int] = min
    stragglers: Stragglers = field(init=False)
    quarantine: Quarantine = field(init=False)
    overdue: Overdue = field(init=False)
    fetches: FetchesUnderWay = field(default_factory=FetchesUnderWay)
    drained: dict[str, None] = field(default_factory=dict)  # names: operators' wishes
    notices: deque[Notice] = field(default_factory=lambda: deque(maxlen=NOTICES_MAX))
    board: Board = field(default_factory=Board)
    tracked: dict[str, Tracked] = field(default_factory=dict)  # in order of arrival
    arrivals: int = 0
    next_sequence: int = 1
    truncations: list[Truncation] = field(default_factory=list)  # for the next plan
    released: list[str] = field(default_factory=list)  # for the next plan
    named: dict[str, None] = field(default_factory=dict)  # inside, of workflows not plain
    due: bool = False  # an event made an immediate plan worthwhile
    eager: bool = True  # every end of an assignment makes a plan worthwhile
    # What arrived, got on, fell back or ended since an estimate; None: more than is worth a list.
    progressed: dict[str, None] | None = None
    touched: dict[str, None] = field(default_factory=dict)  # requests changed since a plan
    moved: dict[str, None] | None = None  # workers whose runs got on or ended; None: nobody asks
    parting: dict[str, int] = field(default_factory=dict)  # worker -> end of a called-off step
    stages_wait: bool = False  # the last plan left encode or decode jobs for want of room
    memory: MemoryLimits = field(default_factory=MemoryLimits)
    _rates: dict[tuple[str, Shape, str], Rates] = field(default_factory=dict)
    _rates_version: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        self.stragglers = Stragglers(self.settings)
        self.quarantine = Quarantine(self.settings)
        self.overdue = Overdue(self.settings)

    def learn(self, workflows: Sequence[Workflow]) -> None:
        """See `Scheduler.learn`."""
        for workflow in workflows:
            self.catalogue.learn(workflow)
        if len(self.catalogue.known) > WORKFLOWS_MAX:
            used = {tracked.asked.workflow for tracked in self.tracked.values()}
            self.catalogue.trim(used.union(workflow.name for workflow in workflows))

    def enter(self, request: Request) -> tuple[Request, ...]:
        """A request as each of its passes. Raises: UnknownWorkflow, PassesFault."""
        if len(self.catalogue.courses) > COURSES_MAX:
            inside = self.tracked.values()
            self.catalogue.forget(leg.workflow for tracked in inside for leg in tracked.legs)
        return self.catalogue.enter(request)

    def workflow(self, request: Request) -> Workflow:
        """Of a request that was entered: seen from its pass."""
        return self.catalogue.views[request.workflow]

    def call(self, request: Request, node: str) -> CallSpec:
        """What a node calls for a request that was entered."""
        course = self.catalogue.courses.get(request.workflow)
        if course is not None:
            return course.calls[node]
        return CallSpec(request.model, node, request.shape, node)

    def able(self, request: Request, node: str, degree: int = 1) -> tuple[Worker, ...]:
        """The usable workers that can run a node of it that wide, in cluster order."""
        call = self.call(request, node)
        return self.cluster.able(call.model, degree, call.op)

    def able_names(self, request: Request, node: str, degree: int = 1) -> tuple[str, ...]:
        """As `able`, the names."""
        call = self.call(request, node)
        return self.cluster.able_names(call.model, degree, call.op)

    def can(self, worker: Worker, request: Request, node: str, degree: int = 1) -> bool:
        """A worker runs a node of the request."""
        call = self.call(request, node)
        return worker.can(call.model, degree, call.op)

    def load_us(self, worker: Worker, request: Request, node: str) -> int:
        """Time to get the weights of a node there now; 0 where they are there, or none needed."""
        call = self.call(request, node)
        return self.residency.load_us(worker, call.model, call.part) if call.part else 0

    def predict(
        self, request: Request, node: str, degree: int, gpus: Iterable[str], batch: int = 1
    ) -> Prediction:
        """One call on a group with these GPU kinds: the slowest member sets the pace."""
        course = self.catalogue.courses.get(request.workflow)
        if course is not None:
            call = course.calls[node]
            asked = (call.model, call.shape, call.op, degree, tuple(gpus), batch)
        else:
            asked = (request.model, request.shape, node, degree, tuple(gpus), batch)
        return self.latency.predict_call(asked)

    def span(self, request: Request, node: str) -> Prediction:
        """All that a node which is behind the steps of its pass will take: one call, or the steps
        of a later pass at their likely degree.
        """
        workflow = self.workflow(request)
        if workflow.node[node].kind is NodeKind.ONCE:
            return self.predict_usable(request, node, 1, 1)
        later = self.catalogue.later(request, node)
        rates = self.rates(later)
        degree = self.likely_degree(rates.mean_us) if rates.degrees else 1
        step = self.predict_usable(later, node, degree, 1)
        return Prediction(later.steps * step.mean_us, later.steps * step.safe_us)

    def gpus(self, workers: Iterable[str]) -> tuple[str, ...]:
        """GPU kinds of some workers, sorted; of all when there are none."""
        return self.cluster.gpus(tuple(workers))

    def degrees(self, request: Request) -> tuple[int, ...]:
        """Widths in which its denoiser can run on the usable workers, ascending."""
        workflow = self.workflow(request)
        stepped = workflow.node[workflow.stepped]
        gpus = self.gpus(self.cluster.able_names(request.model))
        offered = self.cluster.degrees(request.model)
        if stepped.degrees is Degrees.ONE:
            offered = tuple([degree for degree in offered if degree == 1])
        return self.memory.wide_enough(self.call(request, stepped.id), gpus, offered)

    def may_fit(self, request: Request) -> bool:
        """Some kind of usable workers may have the memory for a step of it, at some degree."""
        kinds = {w.gpu for w in self.cluster.able(request.model)}
        degrees = self.cluster.degrees(request.model)
        call = self.call(request, self.workflow(request).stepped)
        hopeless = self.memory.hopeless
        return any(not hopeless(call, (gpu,), degrees) for gpu in sorted(kinds))

    def batch_max(self, request: Request, node: str) -> int:
        """Most jobs of its model and shape that any usable worker takes at once."""
        call = self.call(request, node)
        if not call.part:
            return 1
        able = self.cluster.able(call.model, 1, call.op)
        most = min((w.models[call.model].batch_max for w in able), default=1)
        gpus = self.gpus(self.cluster.able_names(call.model, 1, call.op))
        return self.memory.batch_max(call, gpus, most)

    def steps_behind(self, tracked: Tracked) -> int:
        """Steps done once the outstanding ones of its pass are; there are some."""
        assignment = self.board.flights[tracked.stepped.outstanding[-1]].assignment
        member = next(m for m in assignment.batch if m.request == tracked.id)
        return member.first_step + assignment.steps

    def rates(self, request: Request) -> Rates:
        """What its calls take on the usable workers; worked out once until something changes."""
        version = (self.cluster.version, self.latency.version, self.memory.version)
        if version != self._rates_version or len(self._rates) >= RATES_MAX:
            self._rates.clear()
            self._rates_version = version
        key = (request.model, request.shape, request.workflow)
        known = self._rates.get(key)
        if known is None:
            known = self._rates[key] = self._rates_of(request)
        return known

    def predict_usable(self, request: Request, node: str, degree: int, batch: int) -> Prediction:
        """One call on the slowest kind of the usable workers that can run it."""
        rates = self.rates(request)
        key = (node, degree, batch)
        known = rates.calls.get(key)
        if known is None:
            gpus = self.gpus(self.able_names(request, node))
            known = self.predict(request, node, degree, gpus, batch)
            rates.calls[key] = known
        return known

    def _rates_of(self, request: Request) -> Rates:
        cluster = self.cluster
        able = cluster.able(request.model)
        gpus = self.gpus(cluster.able_names(request.model))
        degrees = self.degrees(request)
        workflow = self.workflow(request)
        stepped = workflow.stepped
        times = {d: self.predict(request, stepped, d, gpus) for d in degrees}
        widths = {1} | {d for w in able for d in w.models[request.model].degrees if d <= len(able)}
        mean_us = {d: t.mean_us for d, t in times.items()}
        known = Rates(
            gpus,
            degrees,
            mean_us,
            {d: t.safe_us for d, t in times.items()},
            {d: self.predict(request, stepped, d, gpus).mean_us for d in sorted(widths)},
            0,
            {},
        )
        self._rates[request.model, request.shape, request.workflow] = known  # `span` asks for it
        return known._replace(
            after_safe_us=workflow.longest_us(
                workflow.behind, lambda node: self.span(request, node).safe_us
            )
        )

    def denoise_deadline_us(self, request: Request) -> int | None:
        """Deadline of the last denoising step: time for what comes after it is reserved."""
        if request.deadline_us is None:
            return None
        return request.deadline_us - self.rates(request).after_safe_us

    def call_off(self, tracked: Tracked, now_us: int, release: bool = False) -> None:
        """Calls off all that a request has outstanding, and says so in the next plan.

        Those in a batch with it go on.
        """
        called_off = tracked.outstanding
        forecast = self.board.forecast(self.cluster, now_us) if called_off else None
        involved: set[str] = tracked.everywhere() if release else set()
        for sequence in called_off:
            assert forecast is not None
            assignment = self.board.flights[sequence].assignment
            involved.update(assignment.workers)
            if len(assignment.batch) > 1:
                self.board.leave(sequence, tracked.id)
                self.overdue.look_again((sequence,))  # it may have waited for this job alone
                continue
            free_us = self.board.step_end_us(sequence, forecast, now_us)
            flight = self.board.call_off(sequence)
            self.move(flight.assignment.workers)
            behind = self.board.behind(flight.assignment.workers, (tracked.id,))
            self.overdue.look_again(behind)
            self.cluster.abandon(flight.assignment.workers, flight.assignment.epoch)
            for name in flight.assignment.workers:
                worker = self.cluster.workers[name]
                worker.freed_us = max(worker.freed_us, free_us)
                if free_us > now_us:
                    self.parting[name] = free_us
        for job in tracked.jobs.values():
            job.outstanding.clear()
        self._touch(tracked.id)
        if called_off:
            workers = self.cluster.canonical(w for w in involved if w in self.cluster.workers)
            self.truncations.append(
                Truncation(
                    request=tracked.id, attempt=tracked.attempt, workers=workers, release=release
                )
            )
        elif release:
            self.released.append(tracked.id)

    def fall_back(self, tracked: Tracked, parked: bool = False) -> None:
        """Stands a request without outstanding work where what survived lets it go on.

        `parked`: nothing of it was called off, so that nobody else counts a new attempt.
        """
        assert not tracked.outstanding or not tracked.workflow.plain
        before = tracked.steps_over
        tracked.resume(self.cluster.living)
        if parked and tracked.steps_over < before:
            tracked.attempt += 1  # it runs steps again
        self.progress(tracked.id)
        self._touch(tracked.id)

    def move(self, workers: Iterable[str]) -> None:
        """What they have in hand ends at another time than was thought. Bounded: by who asks."""
        if self.moved is not None:
            self.moved.update(dict.fromkeys(workers))

    def progress(self, request: str) -> None:
        """What is left of it to run is not what it was."""
        if self.progressed is not None:
            self.progressed[request] = None
            if len(self.progressed) > PROGRESSED_MAX:
                self.progressed = None

    def _touch(self, request: str) -> None:
        """It changed. Where nobody asks what did, only those inside are remembered."""
        self.touched[request] = None
        if len(self.touched) > TOUCHED_MAX + 2 * len(self.tracked):
            self.touched = {r: None for r in self.touched if r in self.tracked}

    def drain(self, name: str, draining: bool) -> None:
        """Enters an operator's wish, by a worker's name, whether or not there is one."""
        self.drained.pop(name, None)
        if draining:
            while len(self.drained) >= DRAINED_MAX:
                absent = (n for n in self.drained if n not in self.cluster.workers)
                del self.drained[next(absent, next(iter(self.drained)))]
            self.drained[name] = None
        worker = self.cluster.workers.get(name)
        if worker is not None:
            worker.drain(draining)

    def next_parting_us(self, after_us: int) -> int | None:
        """When the next worker leaves a step that was called off: no report tells of it."""
        for name in [n for n, us in self.parting.items() if us <= after_us]:
            del self.parting[name]
        return min(self.parting.values(), default=None)

    def forget_workers(self, now_us: int) -> None:
        """Keeps the list of workers bounded: drops lost ones that nothing here refers to, those
        lost long ago or, where there are too many, all.
        """
        many = len(self.cluster.workers) > WORKERS_MAX
        before_us = None if many else now_us - FORGOTTEN_AFTER_US
        lost = (w for w in self.cluster.workers.values() if w.state is WorkerState.LOST)
        if not any(before_us is None or w.lost_us < before_us for w in lost):
            return
        needed: set[str] = set()
        for flight in self.board.flights.values():
            needed.update(flight.assignment.workers)
            needed.update(h.worker for m in flight.assignment.batch for h in m.holders)
        for tracked in self.tracked.values():
            needed.update(tracked.everywhere(), tracked.group)
        gone = self.cluster.forget_lost(needed, before_us)
        self.board.forget_workers(gone)
        self.residency.forget(gone)
        for name in gone:
            self.stragglers.forget(name)
            self.quarantine.forget(name)
            self.parting.pop(name, None)

    def end(self, tracked: Tracked, outcome: Outcome, at_us: int, reason: str = "") -> Ended:
        """Takes a request off the books; its latents are dropped with the next plan."""
        self.call_off(tracked, at_us, release=True)
        for job in tracked.jobs.values():
            if job.state is not JobState.DONE:
                job.move(JobState.DROPPED)
        del self.tracked[tracked.id]
        self.named.pop(tracked.id, None)
        self.quarantine.ended(tracked.id)
        self.progress(tracked.id)
        self._touch(tracked.id)
        self.board.forget(tracked.id)
        self.due = True
        deadline_us = tracked.request.deadline_us
        return Ended(
            request=tracked.id,
            outcome=outcome,
            at_us=at_us,
            on_time=outcome is Outcome.DONE and (deadline_us is None or at_us <= deadline_us),
            steps_done=tracked.steps_over,
            degree_changes=tracked.degree_changes,
            moves=tracked.moves,
            steps_lost=tracked.steps_lost,
            reason=reason,
        )
