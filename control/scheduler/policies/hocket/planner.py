"""`hocket`: one joint plan over all jobs of all requests, made anew at every event.

What it joins: TetriServe's degree for each step, GENSERVE's preemption at step boundaries and
batching, DiFlow's nodes and model residency, and the exact question that each of them asks only of
one request at a time: who makes the deadline if all known requests are served from here on?

    facts ──▶ pods ──▶ roster ──▶ kernel: give up, start, improve, fill ──▶ binding ──▶ starts
              (about 8 workers      (rollouts of all known jobs, step by step)
               planned together)

Rounds: a round begins with its first plan after a boundary; between boundaries every event amends
the standing plan by the same code. Steps are committed one at a time (or as many as `commit_us`
takes), so a pause, a move or another degree is simply the next start; a job that is not started
stays parked with those who hold its latent.

Nobody gets a worker for a deadline that is lost: the hopeless, and those whose giving up keeps more
others on time, become best effort. Best effort fills what is left with short steps, and goes first
on a few workers once it has not moved for `patience_us`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from ...books.ledger import Ledger
from ...outlook.standing import next_node, workers_before
from ...settings import Settings, SettingValue, Spec
from ...starts import Issue, Planned, Start
from ...values import Request
from ...workflow import Section
from ..base import Newcomer, Planner
from . import outside
from .binding import Binder, Wish
from .filling import SlowSteps, fill, first_come
from .forecast import Forecaster
from .improve import Limits, start_space
from .keeping import keep
from .kernel import (
    COLUMNS,
    Floats,
    Rules,
    scratch,
)
from .pods import Entry, Pod, Pods, flight_end_us
from .roster import Guard, Patience, Roster, RosterMaker
from .search import decide
from .wakes import Wakes
from .wishes import wanted

ENTRY_OPERATIONS = 200  # what a row of the roster costs, in operations of the kernel


class Hocket(Planner):
    """The joint planner."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        "passes": Spec(2, low=0, high=10),  # of the search over what starts now; 0: base rule
        "yielding": Spec(6, low=0, high=64),  # of lower worth, compared with a late one
        "operations_max": Spec(200_000, low=1_000),  # of the kernel, in a pod
        "plan_operations_max": Spec(300_000, low=1_000),  # then a plan leaves pods to the next
        "afresh_max": Spec(24, low=1),  # up to so many jobs, giving up is decided afresh each time
        "retries": Spec(
            4, low=0
        ),  # given-up jobs looked at again in each plan, where they are more
        "slack_sat_us": Spec(250_000, low=0),  # slack beyond this is worth nothing
        # Of a microsecond of it, while all are on time; a deadline is worth 1e9.
        "slack_worth": Spec(0.001, low=0.0),
        "coarseness": Spec(0.05, low=0.0, high=1.0),  # steps bunched by part of time looked ahead
        "fill_step_us": Spec(145_000, low=0),  # longer best-effort steps wait for an empty pod
        "slow_step_us": Spec(1_000_000, low=0),  # not even where no newcomer needs the worker
        "reserve": Spec(2, low=0),  # workers that long best-effort steps leave, beside such need
        "patience_us": Spec(300_000_000, low=0),  # without progress; then best effort goes first
        # Best effort goes first, too, once it has waited so long and so many times its own time.
        "best_effort_wait_us_max": Spec(60_000_000, low=0),  # 0: never
        "best_effort_slowdown": Spec(100.0, low=0.0),
        "aged_workers": Spec(1, low=0),  # for such best effort, in each pod
        "priority_worth": Spec(0.1, low=0.0),  # of one level of priority, in deadlines
        "guard": Spec(0.05, low=0.0, high=0.5),  # part of a firm promise's time kept in hand
        "guard_us_max": Spec(6_000_000, low=0),
        # Of those like the last arrivals, a firm promise may cost so many (in deadlines) their
        # place beyond its own; below 0: any number.
        "echo_loss": Spec(1.5, low=-1.0),
        "batch_max": Spec(0, low=0, high=4096),  # jobs that step together; 0: what the workers take
        "commit_us": Spec(30_000, low=0),  # as many steps are committed as fit; at least one
        "commit_leads": Spec(5, low=0),  # it is at least so many leads: what is short is all way
        "pod_workers": Spec(8, low=1),
        "steal": Spec(True),  # an idle pod takes waiting requests from others
        "preload": Spec(True),  # workers hold the weights that fit before the first request
    }
    foresees = True

    def __init__(self, settings: Settings, read: Mapping[str, SettingValue]) -> None:
        self._settings = settings
        self._read = dict(read)
        self._pods = Pods(int(read["pod_workers"]))
        self._maker = RosterMaker(
            float(read["priority_worth"]),
            int(read["fill_step_us"]),
            int(read["batch_max"]),
            Guard(float(read["guard"]), int(read["guard_us_max"])),
            Patience(
                int(read["patience_us"]),
                int(read["best_effort_wait_us_max"]),
                float(read["best_effort_slowdown"]),
                int(read["aged_workers"]),
            ),
        )
        self._rules = Rules(
            float(read["slack_sat_us"]),
            float(read["slack_worth"]),
            float(read["coarseness"]),
        )
        self._limits = Limits(
            int(read["passes"]),
            int(read["yielding"]),
            int(read["operations_max"]),
            float(read["fill_step_us"]),
            int(read["aged_workers"]),
        )
        self._may_steal = bool(read["steal"])
        self._slow = SlowSteps(int(read["slow_step_us"]), int(read["reserve"]))
        least_us = int(read["commit_leads"]) * settings.lead_us
        self._commit_us = max(least_us, int(read["commit_us"]))
        self._round = 0
        self._boundary_us = -1
        self._preloaded: dict[str, str] = {}  # worker -> incarnation
        self._on = np.zeros(0, np.int64)
        self._start = start_space(0)
        self._scratch = scratch(0)
        self._trial = np.zeros((0, COLUMNS))
        self._move = np.zeros((0, 16))
        self._room(16)
        self.operations = 0
        self._wakes = Wakes(settings.lead_us)
        self._left: dict[int, None] = {}  # pods that the last plan did not come to
        self._planned_us: int | None = None
        self._allowed = self._limits  # in the pod at hand

    def plan(self, ledger: Ledger, now_us: int, issue: Issue) -> Planned:
        """Decides for the pods that something happened to."""
        if now_us >= self._boundary_us:
            self._round += 1
            self._boundary_us = now_us + (self._settings.round_us or 1_000_000)
        touched, ledger.touched = ledger.touched, {}
        changed = self._pods.follow(ledger, touched)
        changed |= self._parted(ledger, now_us)
        self._preload(ledger)
        self._maker.forget()
        self.operations = 0
        outside.start(ledger, self._pods, self._maker, now_us, issue)
        self._plan_pods(ledger, self._concerned(ledger, changed, now_us), now_us, issue)
        self._planned_us = now_us
        return Planned(self._round, now_us)

    def _concerned(self, ledger: Ledger, changed: set[int], now_us: int) -> list[Pod]:
        """Pods that the last plans left, then those with news or, with a lead, a run that soon
        ends; all, where nothing says which.
        """
        changed.update(self._wakes.due(ledger, self._pods, self._planned_us, now_us))
        if not changed and not self._left:
            changed = set(range(len(self._pods.pods)))
        left = [i for i in self._left if i < len(self._pods.pods)]
        return [self._pods.pods[i] for i in (*left, *sorted(changed.difference(left)))]

    def _plan_pods(self, ledger: Ledger, concerned: list[Pod], now_us: int, issue: Issue) -> None:
        """Decides for one pod after the other until a plan's budget is spent; the rest is due at
        once.
        """
        budget, spent = int(self._read["plan_operations_max"]), 0
        done = 0
        for pod in concerned:
            if done and spent >= budget:
                break
            most = min(int(self._read["operations_max"]), budget - spent)
            self._allowed = self._limits._replace(operations_max=max(1_000, most))
            before = self.operations
            while self._decide(ledger, pod, now_us, issue):  # what soon ends is followed at once
                if not self._maker.free(ledger, pod, now_us):
                    break
            spent += self.operations - before
            spent += ENTRY_OPERATIONS * (len(pod.entries) + len(pod.workers))
            done += 1
        self._left = {pod.index: None for pod in concerned[done:]}
        self._wakes.planned(ledger, self._pods, concerned[:done], now_us)
        ledger.touched.clear()  # this plan's own starts are no news to the next
        ledger.due = ledger.due or bool(self._left)

    def wake_us(self, ledger: Ledger, planned_us: int | None) -> int | None:
        """At once where a plan left pods; when a worker leaves a called-off step; with a lead, that
        long before each end.
        """
        if self._left:
            return planned_us
        parting_us = ledger.next_parting_us(planned_us or 0)
        times = [] if parting_us is None or not ledger.tracked else [parting_us]
        soon_us = self._wakes.next_us(ledger, self._pods, planned_us)
        return min([*times, *([] if soon_us is None else [soon_us])], default=None)

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """The widest that is not wasteful: it doubles the speed of half as many by two thirds."""
        best = min(step_us)
        for k in sorted(step_us):
            if step_us[k] * k <= 1.5 * step_us[best] * best and step_us[k] < step_us[best]:
                best = k
        return best

    def _parted(self, ledger: Ledger, now_us: int) -> set[int]:
        """Pods whose workers have left a called-off step since the last plan."""
        left = [w for w, us in ledger.parting.items() if us <= now_us]
        return {self._pods.home[w].index for w in left if w in self._pods.home}

    def newcomers(self, ledger: Ledger, requests: Sequence[Request], now_us: int) -> list[Newcomer]:
        """When requests that arrived now would be done; changes nothing."""
        pods, seen = self._pods, self._pods.entries
        if pods.stale(ledger):
            pods = Pods(pods.size)
            pods.follow(ledger, [r for r in ledger.tracked if r in seen])
        unseen = [
            tracked.request
            for r in ledger.touched
            if r not in seen and (tracked := ledger.tracked.get(r)) is not None
        ]
        loss = float(self._read["echo_loss"])
        asked = Forecaster(ledger, pods, self._maker, self._rules, self._limits, loss, now_us)
        return asked.ask(unseen, requests)

    # ------------------------------------------------------------------------------ one pod

    def _decide(self, ledger: Ledger, pod: Pod, now_us: int, issue: Issue) -> bool:
        """Starts what can start; whether some of it ends within the lead: two runs at most are in a
        worker's hands, so this comes to an end.
        """
        roster = self._maker.make(ledger, pod, now_us)
        nothing = len(roster.entries) == roster.running and not roster.spare
        if nothing and roster.free and self._may_steal and self._steal(ledger, pod):
            roster = self._maker.make(ledger, pod, now_us)
        if not roster.free:
            return False
        soon = False

        def starts(limits: Limits) -> tuple[list[Wish], int]:
            return self._starts(ledger, pod, roster, limits, now_us)

        wishes, used = keep(pod, roster, starts, self._allowed, self._rules, now_us)
        self.operations += used
        for wish, workers in Binder(ledger, pod, list(roster.free)).bind(wishes):
            before = [t.outstanding[-1] for t in wish.members if t.outstanding]
            ready_us = [flight_end_us(ledger, sequence) for sequence in before]
            begin_us = max(now_us, *ready_us, *(roster.free[w] for w in workers))
            requests = tuple(t.id for t in wish.members)
            start = Start(requests, wish.node, workers, wish.steps, wish.reason)
            issued = issue(start, begin_us)
            pod.know(workers)
            for worker in workers:
                pod.sequences.setdefault(worker, []).append(issued.sequence)
            soon = soon or issued.end_us <= now_us + self._settings.lead_us
        return soon

    def _starts(
        self, ledger: Ledger, pod: Pod, roster: Roster, limits: Limits, now_us: int
    ) -> tuple[list[Wish], int]:
        """What the search wants, and best effort on what that leaves; operations."""
        wishes: list[Wish] = []
        operations = 0
        if len(roster.entries) > roster.running:
            operations = self._search(ledger, pod, roster, limits, now_us)
            n = len(roster.entries)
            wishes = wanted(ledger, roster, self._start.choice[:n], self._start.head[:n])
        room = len(roster.free) - sum(w.width for w in wishes)
        wishes += fill(ledger, pod, roster, room, self._limits, self._slow)
        first_come(ledger, roster, wishes, now_us)
        for wish in wishes:
            wish.steps = self._steps(wish)
        return wishes, operations

    def _search(self, ledger: Ledger, pod: Pod, roster: Roster, limits: Limits, now_us: int) -> int:
        """Runs the kernel: `_start` holds what it wants. Operations."""
        n = len(roster.entries)
        self._room(n)
        on = self._on[:n]
        on[:] = self._considered(pod, roster)
        operations: int = decide(
            float(now_us),
            len(pod.workers),
            len(roster.free),
            roster.jobs,
            on,
            self._moves(ledger, roster),
            roster.tables(),
            self._rules._replace(slack_worth=0.0) if roster.crowded else self._rules,
            roster.saving,
            limits,
            self._trial,
            type(self._start)(*(a[:n] for a in self._start)),
            self._scratch,
        )
        for entry, hopeful in zip(roster.entries, on.tolist(), strict=True):
            entry.hopeful = bool(hopeful)
        return operations

    def _considered(self, pod: Pod, roster: Roster) -> list[bool]:
        """Who may be counted on: all, or in a crowd those counted on before and a few others."""
        if len(roster.entries) <= int(self._read["afresh_max"]):
            return [True] * len(roster.entries)
        given_up = [e.key for e in roster.entries if not e.hopeful]
        retries = int(self._read["retries"])
        first = next((i for i, key in enumerate(given_up) if key > pod.retried), 0)
        again = (given_up[first:] + given_up[:first])[:retries]
        pod.retried = again[-1] if again else pod.retried
        return [e.hopeful or e.tracked.promised or e.key in again for e in roster.entries]

    def _steps(self, wish: Wish) -> int:
        """How many of those left are committed at once."""
        if wish.node != wish.first.stepped.node:
            return 1
        return max(1, min(wish.steps, int(self._commit_us // wish.took_us)))

    def _moves(self, ledger: Ledger, roster: Roster) -> Floats:
        """What starting at each width costs before the first step: moving, loading."""
        moving = ledger.moving
        moves = self._move[: len(roster.entries), : len(roster.widths)]
        moves[:] = 0.0
        bounded = any(ledger.residency.bounded(ledger.cluster.workers[w]) for w in roster.free)
        if not moving.change_us and not bounded:
            return moves
        for i, entry in enumerate(roster.entries):
            tracked = entry.tracked
            group = workers_before(ledger, tracked)
            stays = all(w in roster.free for w in group)
            node = next_node(ledger, tracked)
            behind = tracked.workflow.section[node] is Section.AFTER
            for k, width in enumerate(roster.widths):
                same = width == len(group) and stays
                if behind:
                    same = any(w in roster.free for w in group)
                if group and not same:
                    moves[i, k] = moving.change_us
            if bounded:
                node = node if behind else tracked.stepped.node
                moves[i] += self._loads_us(ledger, roster, tracked.request, node)
        return moves

    def _loads_us(self, ledger: Ledger, roster: Roster, request: Request, node: str) -> list[float]:
        """By width: loading on the free workers that need it least."""
        workers = ledger.cluster.workers
        each = sorted(ledger.load_us(workers[w], request, node) for w in roster.free)
        return [float(each[min(k, len(each)) - 1]) for k in roster.widths]

    def _steal(self, ledger: Ledger, pod: Pod) -> bool:
        """Takes a waiting request from the pod with the most work; those it gave up on first."""
        others = [p for p in self._pods.pods if p is not pod and len(p.entries) > len(p.workers)]
        for other in sorted(others, key=lambda p: (-p.work_us // len(p.workers), p.index))[:4]:
            waiting = [e for e in other.entries if self._may_leave(ledger, e, pod)]
            if waiting:
                entry: Entry = min(waiting, key=lambda e: (e.hopeful, e.key))
                self._pods.move(entry, pod)
                return True
        return False

    def _may_leave(self, ledger: Ledger, entry: Entry, pod: Pod) -> bool:
        return not entry.tracked.outstanding and pod.serves(ledger, entry)

    def _preload(self, ledger: Ledger) -> None:
        """A worker that joins has had time to load what fits."""
        if not self._read["preload"]:
            return
        known = ledger.cluster.workers
        if len(self._preloaded) > len(known):
            self._preloaded = {w: i for w, i in self._preloaded.items() if w in known}
        for pod in self._pods.pods:
            for worker in pod.workers:
                if self._preloaded.get(worker.name) == worker.incarnation:
                    continue
                self._preloaded[worker.name] = worker.incarnation
                for model in worker.models:
                    for node in worker.nodes(model):
                        ledger.residency.preload(worker, model, node)

    def _room(self, n: int) -> None:
        """Work space for n jobs."""
        if len(self._on) >= n:
            return
        size = 2 * n
        self._on = np.zeros(size, np.int64)
        self._start = start_space(size)
        self._scratch = scratch(size)
        self._trial = np.zeros((size, COLUMNS))
        self._move = np.zeros((size, 16))
