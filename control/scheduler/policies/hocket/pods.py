"""Pods: workers that are planned together, and the requests that each of them serves.

A large cluster is cut into pods of about eight workers that can do the same, in cluster order, so
that a host, or an island of it, is a pod where it is large enough. A request belongs to one pod; it
joins the one with the least work for each worker and changes it only while nothing of it runs.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ...books.cluster import Worker
from ...books.ledger import Ledger
from ...books.tracker import Tracked
from ...outlook.standing import next_node
from ...resilience import elsewhere
from ...values import Request

BEST_EFFORT_KEY = 1 << 62
ARRIVALS_MAX = 48  # last arrivals remembered in a pod
GROUPS_MAX = 64  # of one width, remembered in a pod


@dataclass(slots=True)
class Entry:
    """One request in a pod."""

    tracked: Tracked
    key: tuple[int, int]  # deadline, order of arrival
    work_us: int  # of all its steps on one worker, when it joined
    hopeful: bool = True  # the last decision counted on it
    need: int = 0  # smallest width that would have made the deadline from its arrival on

    @property
    def id(self) -> str:
        return self.tracked.id


@dataclass(slots=True)
class Pod:
    """Workers of one kind, and the requests they serve in deadline order."""

    index: int
    workers: list[Worker]
    gpus: tuple[str, ...]  # GPU kinds, as the ledger names them
    entries: list[Entry] = field(default_factory=list)
    sequences: dict[str, list[int]] = field(default_factory=dict)  # worker -> given to it
    groups: dict[int, dict[tuple[str, ...], None]] = field(default_factory=dict)  # by width
    work_us: int = 0  # of the entries
    # The last requests that joined it, with when they came.
    arrivals: deque[tuple[int, Request]] = field(default_factory=lambda: deque(maxlen=ARRIVALS_MAX))
    retried: tuple[int, int] = (0, 0)  # the last given-up entry that was looked at again

    def know(self, group: tuple[str, ...]) -> None:
        """A group forms: it will be warm. The oldest are forgotten."""
        if len(group) > 1:
            known = self.groups.setdefault(len(group), {})
            known[group] = None
            if len(known) > GROUPS_MAX:
                del known[next(iter(known))]

    def add(self, entry: Entry) -> None:
        insort(self.entries, entry, key=lambda e: e.key)
        self.work_us += entry.work_us

    def remove(self, entry: Entry) -> None:
        at = bisect_left(self.entries, entry.key, key=lambda e: e.key)
        assert self.entries[at] is entry, "keys are unique: they hold the order of arrival"
        del self.entries[at]
        self.work_us -= entry.work_us

    @property
    def load_us(self) -> int:
        """Work for each worker."""
        return self.work_us // len(self.workers)

    def can(self, model: str) -> bool:
        return self.workers[0].can(model)

    def fits(self, ledger: Ledger, request: Request) -> bool:
        """Has the model, and as far as is known the memory for a step of the request."""
        facts = self.workers[0].models.get(request.model)
        if facts is None or not self.can(request.model):
            return False
        stepped = ledger.workflow(request).stepped
        degrees = tuple(d for d in (1, *facts.degrees) if d <= len(self.workers))
        return not ledger.memory.hopeless(ledger.call(request, stepped), self.gpus, degrees)

    def serves(self, ledger: Ledger, entry: Entry) -> bool:
        """Fits the request, and has a worker on which it did not just fail."""
        out = elsewhere.barred(ledger, entry.id)
        return self.fits(ledger, entry.tracked.request) and not (
            out and out.issuperset(w.name for w in self.workers)
        )

    def outside(self, ledger: Ledger, tracked: Tracked) -> bool:
        """What a request runs next is a call that the pod's workers do not offer."""
        if tracked.workflow.plain and not ledger.cluster.partial:
            return False
        node = next_node(ledger, tracked)
        return not ledger.can(self.workers[0], tracked.request, node)

    def waits(self, ledger: Ledger, entry: Entry, free: Collection[str]) -> bool:
        """It failed on all workers that are free, and the pod has others."""
        out = elsewhere.barred(ledger, entry.id)
        return bool(out and free) and out.issuperset(free) and self.serves(ledger, entry)

    def running(self, ledger: Ledger, worker: str) -> list[int]:
        """Sequences that the worker has in hand, oldest first."""
        flights = ledger.board.flights
        known = self.sequences.get(worker)
        if not known:
            return []
        known[:] = [s for s in known if s in flights]
        return known


@dataclass(slots=True)
class Pods:
    """All pods; built anew when workers come or go."""

    size: int  # workers in a pod, about
    pods: list[Pod] = field(default_factory=list)
    where: dict[str, Pod] = field(default_factory=dict)  # by request
    entries: dict[str, Entry] = field(default_factory=dict)
    home: dict[str, Pod] = field(default_factory=dict)  # by worker
    homeless: dict[str, Entry] = field(default_factory=dict)  # no pod can run their model
    # Runs on a pod's workers of requests that went to another pod when workers came or went: by
    # sequence, the pods that hear of their end in no other way.
    guests: dict[int, list[int]] = field(default_factory=dict)
    # By model: able pods by their work. It only grows until the queues are made anew.
    _queues: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    _version: int = -1  # of the cluster
    _workers: list[tuple[object, ...]] = field(default_factory=list)

    def follow(self, ledger: Ledger, touched: Iterable[str]) -> set[int]:
        """Takes in what changed; indices of the pods concerned."""
        changed = self._follow_workers(ledger)
        for sequence in [s for s in self.guests if s not in ledger.board.flights]:
            changed.update(self.guests.pop(sequence))
        for request in touched:
            tracked = ledger.tracked.get(request)
            entry = self.entries.get(request)
            if tracked is None or (entry is not None and entry.tracked is not tracked):
                changed |= self._drop(request)
                entry = None
            if tracked is None:
                continue
            if entry is None:
                entry = self.entries[request] = _entry(ledger, tracked)
                self._house(entry)
                if request in self.where:
                    self.where[request].arrivals.append((tracked.arrived_us, tracked.request))
            pod = self.where.get(request)
            if not self._can_stay(pod, entry):
                changed |= self._rehouse(entry, pod)
                pod = self.where.get(request)
            if pod is not None:
                changed.add(pod.index)
                changed |= self._leave_small(ledger, entry, pod)
        return changed

    def move(self, entry: Entry, pod: Pod) -> None:
        """Gives a request to another pod."""
        self._queues.clear()  # a pod has less work than it says there
        self.where[entry.id].remove(entry)
        pod.add(entry)
        self.where[entry.id] = pod

    def _can_stay(self, pod: Pod | None, entry: Entry) -> bool:
        """Where it is, somebody can run its steps; or nobody can anywhere."""
        model = entry.tracked.request.model
        return self.best(model) is None if pod is None else pod.can(model)

    def _rehouse(self, entry: Entry, pod: Pod | None) -> set[int]:
        """It has come to a pass of another model, or nobody could run the one before."""
        self.homeless.pop(entry.id, None)
        changed: set[int] = set()
        if pod is not None:
            changed.add(pod.index)
            self._queues.clear()
            pod.remove(entry)
            del self.where[entry.id]
            for sequence in entry.tracked.outstanding:
                self.guests.setdefault(sequence, []).append(pod.index)
        self._house(entry)
        return changed

    def _leave_small(self, ledger: Ledger, entry: Entry, pod: Pod) -> set[int]:
        """Other workers for a request whose steps do not fit these, or that failed on them."""
        if entry.tracked.outstanding or pod.serves(ledger, entry):
            return set()
        roomier = [p for p in self.pods if p is not pod and p.serves(ledger, entry)]
        if not roomier:
            return set()
        to = min(roomier, key=lambda p: (p.load_us, p.index))
        self.move(entry, to)
        return {to.index}

    def _drop(self, request: str) -> set[int]:
        entry = self.entries.pop(request, None)
        pod = self.where.pop(request, None)
        self.homeless.pop(request, None)
        if entry is None or pod is None:
            return set()
        pod.remove(entry)
        self._queues.clear()
        return {pod.index}

    def _house(self, entry: Entry) -> None:
        """The pod with the least work for each worker, of those that have the model."""
        pod = self.best(entry.tracked.request.model)
        if pod is None:
            self.homeless[entry.id] = entry
            return
        pod.add(entry)
        self.where[entry.id] = pod

    def best(self, model: str) -> Pod | None:
        """The pod that a request of a model would join."""
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = [(p.load_us, p.index) for p in self.pods if p.can(model)]
            heapq.heapify(queue)
        while queue and queue[0][0] != self.pods[queue[0][1]].load_us:
            heapq.heapreplace(queue, (self.pods[queue[0][1]].load_us, queue[0][1]))
        return self.pods[queue[0][1]] if queue else None

    def stale(self, ledger: Ledger) -> bool:
        """Workers came or went since the last plan."""
        return ledger.cluster.version != self._version

    def _follow_workers(self, ledger: Ledger) -> set[int]:
        if not self.stale(ledger):
            return set()
        self._version = ledger.cluster.version
        usable = ledger.cluster.usable()
        workers_now: list[tuple[object, ...]] = [
            (w.name, w.gpu, w.models, w.operations) for w in usable
        ]
        if workers_now == self._workers:
            return set()
        self._workers = workers_now
        before = {r: tuple(w.name for w in p.workers) for r, p in self.where.items()}
        arrivals = [p.arrivals for p in self.pods]
        self.pods = [
            Pod(i, workers, ledger.gpus(w.name for w in workers))
            for i, workers in enumerate(cut(usable, self.size))
        ]
        for pod, known in zip(self.pods, arrivals, strict=False):
            pod.arrivals.extend(known)
        self._queues.clear()
        home = self.home = {w.name: p for p in self.pods for w in p.workers}
        self.where.clear()
        self.homeless.clear()
        for request, entry in self.entries.items():
            stays = [home[w] for w in before.get(request, ()) if w in home]
            if stays and stays[0].can(entry.tracked.request.model):
                stays[0].add(entry)
                self.where[request] = stays[0]
            else:
                self._house(entry)
        self._follow_flights(ledger)
        return {p.index for p in self.pods}

    def _follow_flights(self, ledger: Ledger) -> None:
        """What the workers of new pods have in hand, and for whom."""
        self.guests.clear()
        for sequence, flight in ledger.board.flights.items():
            pods: dict[int, None] = {}
            for worker in flight.assignment.workers:
                if (pod := self.home.get(worker)) is not None:
                    pod.sequences.setdefault(worker, []).append(sequence)
                    pods[pod.index] = None
            homes = [self.where.get(m.request) for m in flight.assignment.batch]
            # Any of a batch may leave it before its end: one at home in the pod is not enough.
            pods = {p: None for p in pods if not all(h and h.index == p for h in homes)}
            if pods:
                self.guests[sequence] = list(pods)


def cut(workers: list[Worker], size: int) -> list[list[Worker]]:
    """Pods of `size` to twice `size` less one workers that run the same things, in order."""
    alike: dict[tuple[object, ...], list[Worker]] = {}
    for worker in workers:
        models = tuple(
            (m.name, m.degrees, m.batch_max, m.operations) for m in worker.models.values()
        )
        alike.setdefault((worker.gpu, models, worker.operations), []).append(worker)
    pods: list[list[Worker]] = []
    for group in alike.values():
        count = max(1, len(group) // size)
        ends = [size * (i + 1) for i in range(count - 1)] + [len(group)]
        starts = [0, *ends[:-1]]
        pods += [group[a:b] for a, b in zip(starts, ends, strict=True)]
    return pods


def _entry(ledger: Ledger, tracked: Tracked) -> Entry:
    request = tracked.request
    deadline_us = BEST_EFFORT_KEY if request.deadline_us is None else request.deadline_us
    return Entry(tracked, (deadline_us, tracked.order), work_us(ledger, request))


def work_us(ledger: Ledger, request: Request) -> int:
    """All steps of a request on one worker."""
    gpus = ledger.rates(request).gpus
    return (
        request.steps * ledger.predict(request, ledger.workflow(request).stepped, 1, gpus).mean_us
    )


def flight_end_us(ledger: Ledger, sequence: int) -> int:
    """When an assignment will be over, by its last report or its prediction; now or past: late."""
    a = (flight := ledger.board.flights[sequence]).assignment
    if flight.reported_us is not None:
        return flight.reported_us + flight.steps_left * a.step_time_us
    freed_us = [ledger.cluster.workers[w].freed_us for w in a.workers]
    if min(freed_us) > flight.issued_us:  # what it waited for has ended: it runs since then
        return max(freed_us) + a.end_us - a.start_us
    return a.end_us
