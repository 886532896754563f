"""The scheduler: facts in, plans out.

    driver ── observe(fact) ──▶ ledger ── plan(now) ──▶ encode and decode jobs: one worker each, at
    once
      ▲                                                 denoise jobs: window ▶ policy ▶ placement
      └────────────── Plan: assignments, truncations, releases ◀──────────────┘

A *request* runs a *job* for each node of its *workflow*: encode, *S* denoising *steps*, decode,
unless it names another. An *assignment* gives some
steps of a job to an ordered list of *workers*; every worker runs its assignments in the order of
their sequence numbers, so no two groups ever wait for each other. Denoising is planned by *round*:
once each round for all jobs, a lead time before its boundary and on the state predicted there; in
between, idle workers take waiting jobs at events (*amendments*), through the same code.

This object knows no clock, no thread and no network. The live driver and the simulator drive it
alike:

    for fact in facts: ended = scheduler.observe(fact)
    if scheduler.due(now) or now >= scheduler.wake_us(): publish(scheduler.plan(now))

Same facts and same times give the same plans, digit for digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from . import facts
from .books.board import Flight
from .books.cluster import Cluster
from .books.commitments import Commitments, PromiseFigures
from .books.ledger import Ledger, Notice
from .books.lifecycle import JobState, WorkerState
from .books.loads import LoadTable
from .books.moving import Moving
from .books.quarantine import Quarantined
from .books.residency import Residency
from .books.stragglers import Slowness
from .books.tracker import Tracked
from .outlook.demand import DemandCensus, PoolWork
from .outlook.scene import Start
from .outlook.standing import inputs_of, standing_for, workers_before
from .planning import prediction
from .planning.planners import make_planner
from .resilience import evacuation, failures
from .settings import Settings
from .times.cells import LatencySnapshot
from .times.latency import LatencyModel, Prediction
from .times.profile import Profile
from .values import (
    Arrived,
    Assignment,
    Ended,
    Event,
    Forecast,
    Layout,
    Load,
    Member,
    Outcome,
    Plan,
    Request,
)
from .views import JobView, WorkerView, job_view, worker_views
from .workflow import NodeKind, Workflow


class Scheduler:
    """One cluster's scheduler. Raises SettingError when built with settings that make no sense."""

    def __init__(
        self,
        settings: Settings,
        profile: Profile,
        loads: LoadTable | None = None,
        workflows: Iterable[Workflow] = (),
    ) -> None:
        """`workflows` are those that requests may name, beside the chain. Raises: WorkflowTaken."""
        self._ledger = Ledger(
            settings,
            LatencyModel(profile, settings),
            Cluster(settings.epoch_base),
            Moving(settings),
            Residency(loads or LoadTable({})),
        )
        for workflow in workflows:
            self._ledger.catalogue.learn(workflow)
        self._planner = make_planner(settings, self._ledger)
        self._ledger.likely_degree = self._planner.likely_degree
        self._estimates = prediction.Estimates(self._ledger, self._planner)
        self._commitments = Commitments()
        self._loads: list[Load] = []
        self._planned_us: int | None = None

    def learn(self, *workflows: Workflow) -> None:
        """Requests may name them from now on. Where many are known, the oldest that no request
        inside uses, and that are not among these, are forgotten. Raises: WorkflowTaken, where
        others are known by a name.
        """
        self._ledger.learn(workflows)

    # -------------------------------------------------------------------------------- the two verbs

    def observe(self, event: Event) -> tuple[Ended, ...]:
        """Enters a fact. Facts come in the order of their stamps, each before the plan of its time.

        Duplicates, and reports of work that was called off, are harmless. Returns what ended by it.
        Raises UnknownWorkflow or PassesFault, and changes nothing, where a request arrives that
        cannot be run.
        """
        self._estimates.forget()
        if isinstance(event, Arrived) and event.request.id not in self._ledger.tracked:
            self._ledger.enter(event.request)
            self._commitments.told(event)
        ended = facts.apply(self._ledger, event)
        for end in ended:
            self._commitments.ended(end)
        return ended

    def plan(self, now_us: int) -> Plan:
        """Decides what goes out now. To be called when `due`, or from `wake_us` on."""
        ledger = self._ledger
        self._estimates.forget()
        ended = list(failures.overdue(ledger, now_us))
        ledger.quarantine.settle(ledger.cluster, ledger.board.flights, now_us)
        ledger.due = False
        self._planned_us = now_us
        assignments: list[Assignment] = []

        def issue(start: Start, begin_us: int) -> Assignment:
            assignments.append(self._issue(start, begin_us, now_us))
            return assignments[-1]

        planned = self._planner.plan(ledger, now_us, issue)
        ended += [
            ledger.end(ledger.tracked[request], Outcome.REJECTED, now_us, reason)
            for request, reason in planned.rejects.items()
        ]
        for end in ended:
            self._commitments.ended(end)
        truncations, ledger.truncations = ledger.truncations, []
        released, ledger.released = ledger.released, []
        loads, self._loads = self._loads, []
        ledger.quarantine.settle(ledger.cluster, ledger.board.flights, now_us)  # trials are given
        return Plan(
            round=planned.round,
            now_us=now_us,
            start_us=planned.start_us,
            assignments=tuple(assignments),
            truncations=tuple(truncations),
            released=tuple(released),
            loads=tuple(loads),
            ended=tuple(ended),
            fetches=evacuation.plan(ledger, now_us),
        )

    # -------------------------------------------------------------------------------- questions

    def due(self, now_us: int) -> bool:
        """A fact since the last plan makes one worthwhile at once."""
        return self._ledger.due

    def wake_us(self) -> int | None:
        """When to plan if no fact comes before; None: no need."""
        ledger = self._ledger
        times = (
            self._planner.wake_us(ledger, self._planned_us),
            ledger.overdue.next_us(ledger.board, ledger.cluster),
            ledger.fetches.next_us(),
        )
        return min((us for us in times if us is not None), default=None)

    def predict_finish_us(self, request: Request, now_us: int) -> int:
        """When a newcomer would finish under the present load (an estimate, from mean times)."""
        return self.forecast((request,), now_us)[0].finish_us

    def forecast(self, requests: Sequence[Request], now_us: int) -> tuple[Forecast, ...]:
        """When newcomers of one instant would finish, each behind those before it.

        A firm one may be promised exactly where its `finish_us_p95` is not after its deadline.
        Changes nothing: not what is planned, and not what is answered next.
        """
        told = self._commitments.finish_us_p95
        entered = [self._ledger.enter(request)[0] for request in requests]
        finishes = self._estimates.newcomers_finish_us(entered, now_us)
        return tuple(
            Forecast(finish_us=finish_us, finish_us_p95=told(request, now_us, finish_us))
            for request, finish_us in zip(requests, finishes, strict=True)
        )

    def forecast_alone(self, request: Request, now_us: int) -> Forecast:
        """When a newcomer would finish if nobody else wanted anything: no wait makes it sooner."""
        finish_us = now_us + self._estimates.alone_us(self._ledger.enter(request)[0])
        told_us = self._commitments.finish_us_p95(request, now_us, finish_us)
        return Forecast(finish_us=finish_us, finish_us_p95=told_us)

    def promise_figures(self) -> PromiseFigures:
        """What became of the requests that were told a finish when they arrived."""
        return self._commitments.figures()

    def demand(
        self,
        newcomers: Sequence[tuple[Request, int]],
        kinds: Mapping[str, Sequence[str]],
        now_us: int,
        best_effort_us: int,
    ) -> dict[tuple[str, str], PoolWork]:
        """What is asked of the workers, by model and kind of GPU (see `outlook.demand`)."""
        return DemandCensus(self._ledger, kinds).of(newcomers, now_us, best_effort_us)

    def eta_us(self, request_id: str, now_us: int) -> int | None:
        """When a request inside will finish, by the same estimate; None if it is not inside."""
        tracked = self._ledger.tracked.get(request_id)
        if tracked is None:
            return None
        return self._estimates.finish_us(tracked, now_us)

    def job(self, request_id: str) -> JobView | None:
        """State of a request inside; None once it ended."""
        tracked = self._ledger.tracked.get(request_id)
        return None if tracked is None else job_view(tracked)

    def jobs(self) -> tuple[JobView, ...]:
        """All requests inside, in order of arrival."""
        return tuple(job_view(t) for t in self._ledger.tracked.values())

    def workers(self) -> tuple[WorkerView, ...]:
        """All workers seen and not forgotten, in cluster order."""
        return worker_views(self._ledger)

    def weights_on(self, worker: str) -> frozenset[str]:
        """The parts that are thought to lie on a worker."""
        known = self._ledger.cluster.workers.get(worker)
        return frozenset() if known is None else frozenset(self._ledger.residency.parts(known))

    def outstanding(self) -> tuple[Assignment, ...]:
        """Assignments sent and not yet over, in sequence order."""
        return tuple(f.assignment for f in self._ledger.board.flights.values())

    def latencies(self) -> LatencySnapshot:
        """What the latency model has learned, as a plain value."""
        return self._ledger.latency.snapshot()

    @property
    def learned(self) -> int:
        """Counts what changed in the latency model."""
        return self._ledger.latency.learned

    def restore_latencies(self, snapshot: LatencySnapshot) -> None:
        """Takes over what an earlier scheduler had learned; before the first fact."""
        self._estimates.forget()
        self._ledger.latency.restore(snapshot)

    def restore_promises(self, past: Iterable[tuple[Arrived, Ended | None]]) -> None:
        """Learns from what was told before: arrivals as they were, in the order of their ends, with
        what became of them (None: they are inside still); before the first fact.
        """
        self._commitments.restore(past)

    def slow_workers(self) -> dict[str, Slowness]:
        """The workers known to be slower than their peers, by name."""
        workers = self._ledger.cluster.workers
        factors = self._ledger.stragglers.factors()
        return {w: Slowness(f, workers[w].avoided) for w, f in factors.items() if w in workers}

    def draining(self) -> tuple[str, ...]:
        """Names that are to get no work by an operator's wish, whether or not they live."""
        return tuple(sorted(self._ledger.drained))

    def quarantined(self) -> dict[str, Quarantined]:
        """Workers that get no work since they failed too often, by name."""
        return self._ledger.quarantine.kept_out()

    def safe_to_release(self, worker: str) -> tuple[str, ...]:
        """Requests whose latest latent a worker holds and a staying one, too: it may drop them."""
        return evacuation.safe(self._ledger, worker)

    def latents_alone(self, worker: str) -> tuple[str, ...]:
        """Requests whose latest latent would be lost with a worker."""
        return evacuation.alone(self._ledger, worker)

    def awaits(self, worker: str) -> bool:
        """What a worker's next heartbeat says is news, though nothing in it changed: it is under
        suspicion, or a latent is to be copied to it. May be asked while a plan is being made.
        """
        known = self._ledger.cluster.workers.get(worker)
        suspect = known is not None and known.state is WorkerState.SUSPECT
        return suspect or self._ledger.fetches.awaits(worker)

    def take_notices(self) -> tuple[Notice, ...]:
        """Who turned out to be slow or fine, or fails too often, and what got slower or faster for
        good, since the last call; the newest, where nobody asked for long.
        """
        taken = tuple(self._ledger.notices)
        self._ledger.notices.clear()
        return taken

    @property
    def operations(self) -> int:
        """Elementary steps of the last plan, where its planner counts them."""
        return self._planner.operations

    # -------------------------------------------------------------------------------- assignments

    def _issue(self, start: Start, begin_us: int, now_us: int) -> Assignment:
        """Numbers an assignment, enters it on the board and moves its jobs."""
        ledger = self._ledger
        members = [ledger.tracked[r] for r in start.requests]
        first = members[0]
        time = ledger.predict(
            first.request,
            start.node,
            len(start.workers),
            ledger.gpus(start.workers),
            len(members),
        )
        slowdown = ledger.stragglers.factor(start.workers)
        if slowdown > 1.0:
            time = Prediction(round(time.mean_us * slowdown), round(time.safe_us * slowdown))
        batch = tuple(self._member(t, start) for t in members)
        setup_us = self._setup_us(first, start)
        assignment = Assignment(
            sequence=ledger.next_sequence,
            node=start.node,
            batch=batch,
            steps=start.steps,
            workers=start.workers,
            epoch=ledger.cluster.epoch(start.workers),
            layout=self._layout(start, members),
            step_time_us=time.mean_us,
            step_time_us_safe=time.safe_us,
            start_us=begin_us,
            end_us=begin_us + setup_us + start.steps * time.mean_us,
            reason=start.reason,
        )
        ledger.next_sequence += 1
        kind = first.workflow.node[start.node].kind
        ledger.board.add(Flight(assignment, now_us, kind, setup_us))
        call = ledger.call(first.request, start.node)
        ledger.overdue.issued(assignment, call.model, now_us)
        ledger.quarantine.issued(assignment, (call.model, call.op))
        for tracked in members:
            job = tracked.jobs[start.node]
            job.outstanding.append(assignment.sequence)
            job.move(JobState.ASSIGNED)
            ledger.touched[tracked.id] = None
        return assignment

    def _layout(self, start: Start, members: Sequence[Tracked]) -> Layout:
        """Halves of guidance only where every worker says that it obeys them."""
        if members[0].workflow.node[start.node].kind is not NodeKind.STEPPED:
            return Layout.of(len(start.workers))
        model, workers = members[0].request.model, self._ledger.cluster.workers
        halves = all(workers[name].models[model].halves for name in start.workers)
        branches = min(t.request.branches for t in members)
        return Layout.of(len(start.workers), branches if halves else 1)

    def _member(self, tracked: Tracked, start: Start) -> Member:
        """Sources that are in the group come first: a copy on the spot needs no transfer."""
        first_step, holders = standing_for(self._ledger, tracked, start.node)
        here = start.workers
        inputs = () if tracked.workflow.plain else inputs_of(self._ledger, tracked, start.node)
        return Member(
            request=tracked.id,
            first_step=first_step,
            attempt=tracked.attempt,
            holders=tuple(sorted(holders, key=lambda h: (h.worker not in here, h.worker))),
            inputs=tuple(
                [
                    replace(i, holders=tuple(sorted(i.holders, key=lambda w: (w not in here, w))))
                    for i in inputs
                ]
            ),
        )

    def _setup_us(self, tracked: Tracked, start: Start) -> int:
        """Loads, the latent's move, a new group: before the first step. Enters the loads."""
        ledger, workflow, node = self._ledger, tracked.workflow, tracked.workflow.node[start.node]
        call = ledger.call(tracked.request, node.id)
        loads = [
            ledger.residency.bring(
                ledger.cluster.workers[w], call.model, node.part, ledger.next_sequence
            )
            for w in (start.workers if node.part else ())
        ]
        self._loads += [load for each in loads for load in each]
        load_us = max([sum(load.load_us for load in each) for each in loads], default=0)
        if not workflow.makers[node.id]:
            return load_us
        if node.id == workflow.stepped or (workflow.plain and node.id in workflow.on_latents):
            where = workers_before(ledger, tracked)
        else:
            where = tuple(h.worker for h in standing_for(ledger, tracked, node.id)[1])
        return load_us + ledger.moving.cost_us(
            ledger.cluster, where, start.workers, decode=node.kind is NodeKind.ONCE
        )


__all__ = ["Scheduler"]
