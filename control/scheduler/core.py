"""The scheduler: facts in, plans out.

    driver ── observe(fact) ──▶ ledger ── plan(now) ──▶ encode and decode jobs: one worker each, at
    once
      ▲                                                 denoise jobs: window ▶ policy ▶ placement
      └────────────── Plan: assignments, truncations, releases ◀──────────────┘

A *request* runs three *jobs*: encode, *S* denoising *steps*, decode. An *assignment* gives some
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

from . import denoise, facts, prediction, stages
from .board import Flight, Forecast
from .cluster import Cluster
from .latency import CellSnapshot, LatencyModel
from .ledger import Ledger
from .lifecycle import JobState
from .policies import make_policy
from .profile import Profile
from .rounds import RoundGrid
from .settings import Settings
from .tracker import Tracked
from .values import DIT, TEXT, VAE, Assignment, Ended, Event, Layout, Member, Plan, Request
from .views import JobView, WorkerView, job_view, worker_views


class Scheduler:
    """One cluster's scheduler. Raises SettingError when built with settings that make no sense."""

    def __init__(self, settings: Settings, profile: Profile) -> None:
        self._settings = settings
        self._policy = make_policy(settings)
        self._grid = RoundGrid(settings)
        self._ledger = Ledger(
            settings, LatencyModel(profile, settings), Cluster(settings.epoch_base)
        )
        self._estimates = prediction.Estimates(self._ledger, self._policy)
        self._planned_us: int | None = None

    # -------------------------------------------------------------------------------- the two verbs

    def observe(self, event: Event) -> tuple[Ended, ...]:
        """Enters a fact. Facts come in the order of their stamps, each before the plan of its time.

        Duplicates, and reports of work that was called off, are harmless. Returns what ended by it.
        """
        self._estimates.forget()
        return facts.apply(self._ledger, event)

    def plan(self, now_us: int) -> Plan:
        """Decides what goes out now. To be called when `due`, or from `wake_us` on."""
        ledger = self._ledger
        ledger.due = False
        self._planned_us = now_us
        self._estimates.forget()
        start_us = now_us
        forecast = ledger.board.forecast(ledger.cluster, now_us)
        assignments = self._stage_assignments(forecast, now_us)
        if self._wants_denoising(forecast):
            round_us = self._round_us()
            window = self._grid.open(now_us, round_us, self._denoising())
            if window is not None:
                start_us = window.start_us
                bound = denoise.decide(ledger, self._policy, window, forecast, now_us)
                assignments += [self._denoise_assignment(b, now_us) for b in bound]
        truncations, ledger.truncations = ledger.truncations, []
        released, ledger.released = ledger.released, []
        return Plan(
            round=self._grid.number,
            now_us=now_us,
            start_us=start_us,
            assignments=tuple(assignments),
            truncations=tuple(truncations),
            released=tuple(released),
        )

    # -------------------------------------------------------------------------------- questions

    def due(self, now_us: int) -> bool:
        """A fact since the last plan makes one worthwhile at once."""
        return self._ledger.due

    def wake_us(self) -> int | None:
        """When to plan if no fact comes before: a lead before the boundary; None: no need."""
        ledger, s = self._ledger, self._settings
        forecast = ledger.board.forecast(ledger.cluster, self._planned_us or 0)
        if not self._wants_denoising(forecast):
            return None
        if s.rounds:
            boundary_us = self._grid.boundary_us
            return None if boundary_us is None else boundary_us - s.lead_us
        if self._planned_us is None:
            return None
        ends = [
            forecast.end_us[t.jobs[DIT].outstanding[0]] - s.lead_us
            for t in ledger.tracked.values()
            if len(t.jobs[DIT].outstanding) == 1
        ]
        later = [e for e in ends if e > self._planned_us]
        return min([*later, self._planned_us + self._round_us()])

    def predict_finish_us(self, request: Request, now_us: int) -> int:
        """When a newcomer would finish under the present load (an estimate, from mean times)."""
        return self._estimates.newcomer_finish_us(request, now_us)

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

    def outstanding(self) -> tuple[Assignment, ...]:
        """Assignments sent and not yet over, in sequence order."""
        return tuple(f.assignment for f in self._ledger.board.flights.values())

    def latencies(self) -> tuple[CellSnapshot, ...]:
        """What the latency model has learned, as plain values."""
        return self._ledger.latency.snapshot()

    def restore_latencies(self, cells: tuple[CellSnapshot, ...]) -> None:
        """Takes over what an earlier scheduler had learned; before the first fact."""
        self._estimates.forget()
        self._ledger.latency.restore(cells)

    # -------------------------------------------------------------------------------- rounds

    def _round_us(self) -> int:
        """tau: as set, or `step_granularity` steps of the slowest shape in flight.

        At its fastest degree. TetriServe section 4.2; which shape counts, the paper leaves open.
        """
        s, ledger = self._settings, self._ledger
        slowest_us = 0
        for tracked in ledger.tracked.values():
            if tracked.jobs[DIT].state is JobState.DONE:
                continue
            request = tracked.request
            able = [w for w in ledger.cluster.usable() if w.can(request.model)]
            gpus = ledger.gpus(w.name for w in able)
            degrees = {1} | {
                d for w in able for d in w.models[request.model].degrees if d <= len(able)
            }
            fastest_us = min(ledger.predict(request, DIT, d, gpus).mean_us for d in degrees)
            slowest_us = max(slowest_us, fastest_us)
        wanted_us = s.round_us or min(
            s.round_us_max, max(s.round_us_min, s.step_granularity * slowest_us)
        )
        # A round into which no step of some shape fits would never start that shape.
        return max(wanted_us, slowest_us, 2 * s.lead_us)

    def _wants_denoising(self, forecast: Forecast) -> bool:
        """Some job has steps that nobody was given yet, and somebody could take them.

        In a cluster where nothing denoises, encodes under way are no reason to begin a round: their
        end is.
        """
        ledger = self._ledger
        usable = ledger.cluster.usable()
        denoising = ledger.board.denoising()
        for tracked in ledger.tracked.values():
            if not denoising and tracked.jobs[DIT].state is not JobState.READY:
                continue
            where = denoise.standing(ledger, tracked, forecast, 0)
            if where is None or where.first_step >= tracked.request.steps:
                continue
            if any(w.can(tracked.request.model) for w in usable):
                return True
        return False

    def _denoising(self) -> bool:
        """The grid stands as long as steps run; as published, as long as any request is mid-way."""
        if self._ledger.board.denoising():
            return True
        mid_way = (
            t.jobs[DIT].state is JobState.READY and t.group for t in self._ledger.tracked.values()
        )
        return not self._settings.amend and any(mid_way)

    # -------------------------------------------------------------------------------- assignments

    def _stage_assignments(self, forecast: Forecast, now_us: int) -> list[Assignment]:
        """Encodes and decodes that can start; the forecast follows what they add."""
        ledger = self._ledger
        made: list[Assignment] = []
        room = stages.Room(ledger, forecast.free_us, now_us)
        for tracked, job in stages.waiting(ledger):
            choice = room.choose(tracked, job)
            if choice is None:
                continue
            holders = () if job.node == TEXT else tracked.latest()
            first_step = 0 if job.node == TEXT else tracked.steps_done
            workers = (choice.worker,)
            start_us = forecast.free_us[choice.worker]
            made.append(
                self._issue(
                    tracked,
                    job.node,
                    workers,
                    1,
                    "stage",
                    now_us,
                    start_us,
                    Member(
                        request=tracked.id,
                        first_step=first_step,
                        attempt=tracked.attempt,
                        holders=tuple(sorted(holders, key=lambda h: h.worker not in workers)),
                    ),
                )
            )
            forecast.enter(made[-1])
        ledger.stages_wait = room.short
        return made

    def _denoise_assignment(self, b: denoise.Bound, now_us: int) -> Assignment:
        """Sources that are in the group come first: a copy on the spot needs no transfer."""
        holders = sorted(b.standing.holders, key=lambda h: (h.worker not in b.workers, h.worker))
        member = Member(
            request=b.tracked.id,
            first_step=b.standing.first_step,
            attempt=b.tracked.attempt,
            holders=tuple(holders),
        )
        return self._issue(
            b.tracked, DIT, b.workers, b.steps, b.choice.reason, now_us, b.start_us, member
        )

    def _issue(
        self,
        tracked: Tracked,
        node: str,
        workers: tuple[str, ...],
        steps: int,
        reason: str,
        now_us: int,
        start_us: int,
        member: Member,
    ) -> Assignment:
        """Numbers an assignment, enters it on the board and moves its job."""
        ledger = self._ledger
        time = ledger.predict(tracked.request, node, len(workers), ledger.gpus(workers))
        assignment = Assignment(
            sequence=ledger.next_sequence,
            node=node,
            batch=(member,),
            steps=steps,
            workers=workers,
            epoch=ledger.cluster.epoch(workers),
            layout=Layout(ulysses=len(workers)),
            step_time_us=time.mean_us,
            step_time_us_safe=time.safe_us,
            start_us=start_us,
            end_us=start_us + steps * time.mean_us,
            reason=reason,
        )
        ledger.next_sequence += 1
        ledger.board.add(Flight(assignment, now_us))
        job = tracked.jobs[node]
        job.outstanding.append(assignment.sequence)
        job.move(JobState.ASSIGNED)
        return assignment


__all__ = ["TEXT", "VAE", "Scheduler"]
