"""How plans come about: by windows (rounds) or at events.

A planner (`policies.base.Planner`) turns the ledger into starts. `WindowPlanner` serves policies
that choose widths for a span of time (`policies.base.Policy`), `EventPlanner` those that decide
what starts now (`policies.base.EventPolicy`). Both number rounds; neither changes the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..books.board import BoardForecast
from ..books.ledger import Ledger
from ..books.lifecycle import JobState
from ..outlook.rounds import RoundGrid
from ..outlook.scene import Scene
from ..outlook.standing import standing
from ..policies.base import EventPolicy, Planner, Policy
from ..policies.registry import make_policy
from ..resilience import elsewhere
from ..settings import Settings
from ..starts import Issue, Planned, Start
from . import denoise, stages


class WindowPlanner(Planner):
    """Encode and decode at once wherever there is room; denoising by windows of the round grid."""

    def __init__(self, policy: Policy, ledger: Ledger) -> None:
        self._policy = policy
        self._grid = RoundGrid(ledger.settings)
        ledger.eager = ledger.settings.amend or not ledger.settings.rounds

    def plan(self, ledger: Ledger, now_us: int, issue: Issue) -> Planned:
        """Stage jobs first, then the window's widths, bound to workers."""
        forecast = ledger.board.forecast(ledger.cluster, now_us)
        self._start_stages(ledger, forecast, now_us, issue)
        start_us = now_us
        if self._wants_denoising(ledger, forecast):
            round_us = self._round_us(ledger)
            window = self._grid.open(now_us, round_us, self._denoising(ledger))
            if window is not None:
                start_us = window.start_us
                bound = denoise.decide(ledger, self._policy, window, forecast, now_us)
                for b in bound:
                    start = Start(
                        (b.tracked.id,), b.tracked.stepped.node, b.workers, b.steps, b.choice.reason
                    )
                    issue(start, b.start_us)
        return Planned(self._grid.number, start_us)

    def wake_us(self, ledger: Ledger, planned_us: int | None) -> int | None:
        """A lead before the next boundary; without rounds, before each end."""
        s = ledger.settings
        forecast = ledger.board.forecast(ledger.cluster, planned_us or 0)
        if not self._wants_denoising(ledger, forecast):
            return None
        if s.rounds:
            boundary_us = self._grid.boundary_us
            return None if boundary_us is None else boundary_us - s.lead_us
        if planned_us is None:
            return None
        later = [e for e in lead_ends(ledger, forecast) if e > planned_us]
        return min([*later, planned_us + self._round_us(ledger)])

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        return self._policy.likely_degree(step_us)

    def _round_us(self, ledger: Ledger) -> int:
        """tau: as set, or `step_granularity` steps of the slowest shape in flight.

        At its fastest degree. TetriServe section 4.2; which shape counts, the paper leaves open.
        """
        s = ledger.settings
        slowest_us = 0
        for tracked in ledger.tracked.values():
            if tracked.stepped.state is not JobState.DONE:
                request = tracked.request
                slowest_us = max(slowest_us, denoise.fastest_us(ledger, request))
        wanted_us = s.round_us or min(
            s.round_us_max, max(s.round_us_min, s.step_granularity * slowest_us)
        )
        # A round into which no step of some shape fits would never start that shape.
        return max(wanted_us, slowest_us, 2 * s.lead_us)

    def _wants_denoising(self, ledger: Ledger, forecast: BoardForecast) -> bool:
        """Some job has steps that nobody was given yet, and somebody could take them.

        In a cluster where nothing denoises, encodes under way are no reason to begin a round: their
        end is.
        """
        usable = ledger.cluster.usable()
        denoising = ledger.board.denoising()
        for tracked in ledger.tracked.values():
            if not denoising and tracked.stepped.state is not JobState.READY:
                continue
            where = standing(ledger, tracked, forecast, 0)
            if where is None or where.first_step >= tracked.request.steps:
                continue
            if any(w.can(tracked.request.model) for w in usable):
                return True
        return False

    def _denoising(self, ledger: Ledger) -> bool:
        """The grid stands as long as steps run; as published, as long as any request is mid-way."""
        if ledger.board.denoising():
            return True
        mid_way = (t.stepped.state is JobState.READY and t.group for t in ledger.tracked.values())
        return not ledger.settings.amend and any(mid_way)

    def _start_stages(
        self, ledger: Ledger, forecast: BoardForecast, now_us: int, issue: Issue
    ) -> None:
        """Calls that can start; the forecast follows what they add."""
        room = stages.Room(ledger, forecast.free_us, now_us)
        for tracked, job in stages.waiting(ledger):
            choice = room.choose(tracked, job)
            if choice is None:
                continue
            start = Start((tracked.id,), job.node, (choice.worker,), 1, "stage")
            forecast.enter(issue(start, forecast.free_us[choice.worker]))
        ledger.stages_wait = room.short


class EventPlanner(Planner):
    """Asks an event policy at every end of an assignment and every arrival."""

    def __init__(self, policy: EventPolicy, ledger: Ledger) -> None:
        self._policy = policy
        self._number = 0
        self._preloaded: dict[str, str] = {}  # worker -> incarnation
        self._wake_us: int | None = None
        ledger.eager = True

    def plan(self, ledger: Ledger, now_us: int, issue: Issue) -> Planned:
        """One scene, one decision."""
        self._number += 1
        forecast = ledger.board.forecast(ledger.cluster, now_us)
        scene = Scene(ledger, forecast, now_us)
        idle = [seat.name for seat in scene.idle()]
        if (waits := elsewhere.waiting(ledger, [w.id for w in scene.works], idle)) and idle:
            scene.works = tuple(w for w in scene.works if w.id not in waits)
        decision = self._policy.decide(scene)
        self._wake_us = decision.wake_us
        for worker, parts in decision.preloads.items():
            for model, node in parts:
                ledger.residency.preload(ledger.cluster.workers[worker], model, node)
        for worker, keep in decision.evicts.items():
            ledger.residency.evict(ledger.cluster.workers[worker], keep)
        if not self._policy.PRELOADS:
            self._preload(ledger)
        starts = elsewhere.fitting(ledger, decision.starts, idle)
        for start in elsewhere.moved(ledger, starts, idle):
            issue(start, scene.begin_us(start))
        return Planned(self._number, now_us, decision.rejects)

    def _preload(self, ledger: Ledger) -> None:
        """A worker that joins has had time to load what fits."""
        known = ledger.cluster.workers
        if len(self._preloaded) > len(known):
            self._preloaded = {w: i for w, i in self._preloaded.items() if w in known}
        for worker in ledger.cluster.usable():
            if self._preloaded.get(worker.name) != worker.incarnation:
                self._preloaded[worker.name] = worker.incarnation
                for model in worker.models:
                    for node in worker.nodes(model):
                        ledger.residency.preload(worker, model, node)

    def wake_us(self, ledger: Ledger, planned_us: int | None) -> int | None:
        """What the policy asked for; with a lead, also that long before each end."""
        times = [] if self._wake_us is None else [self._wake_us]
        parting_us = ledger.next_parting_us(planned_us or 0)
        if parting_us is not None and ledger.tracked:
            times.append(parting_us)
        if ledger.settings.lead_us and planned_us is not None:
            forecast = ledger.board.forecast(ledger.cluster, planned_us)
            times += [e for e in lead_ends(ledger, forecast) if e > planned_us]
        return min(times, default=None)

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        return self._policy.likely_degree(step_us)


def lead_ends(ledger: Ledger, forecast: BoardForecast) -> list[int]:
    """A lead before each end of a job's only assignment."""
    return [
        forecast.end_us[t.stepped.outstanding[0]] - ledger.settings.lead_us
        for t in ledger.tracked.values()
        if len(t.stepped.outstanding) == 1
    ]


def make_planner(settings: Settings, ledger: Ledger) -> Planner:
    """The planner of the policy that the settings name. Raises: SettingError."""
    policy = make_policy(settings)
    if isinstance(policy, Planner):
        return policy
    if isinstance(policy, EventPolicy):
        return EventPlanner(policy, ledger)
    return WindowPlanner(policy, ledger)
