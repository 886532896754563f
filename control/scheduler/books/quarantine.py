"""Workers that fail whatever they are given: found by their strikes, kept out, tried again.

Who fails fast is always free first, so one bad worker would take most requests down. Whose fault a
failure is nobody knows; but a bad worker fails with *different requests*, which go on elsewhere,
and a bad request fails on *different workers*.

    strike  counts against the worker   while its request has failed there only, or once it got on
                                        elsewhere
            does not count (contested)  while its request has failed on other workers, too
            is taken back               when the request ends without having got on, or when the
                                        worker ends a step of the same part (model and node)

    failures_max counting strikes ──▶ out for a while ──▶ trial ──▶ one run of a part that failed
                                           ▲                │             │ well: in again
                                           └── twice as long┴─────────────┘ failed

Never out: the last worker that can serve a model. A strike is one of (request, node, step): a
request that fails again where it failed before says nothing new. Several bad workers (a host) look
like a bad request: before that is believed, it is tried on a worker that was well with others.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..settings import Settings
from ..values import Assignment
from ..workflow import Section, Workflow
from .cluster import Cluster, Worker
from .lifecycle import WorkerState

STRIKES_MAX = 64  # remembered of a worker: more say nothing new
PARTS_MAX = 256  # of which it is known how they went on a worker
FAILED, UNTRIED, WELL = range(3)
GROWTH_MAX = 16  # the longest wait, in first waits

Part = tuple[str, str]  # model, operation
Place = tuple[int, int]  # rank of the node in its workflow, steps done


class Quarantined(NamedTuple):
    """A worker is kept out, or (with no strikes) in again."""

    worker: str
    strikes: int
    retry_us: int  # when it is tried again


class _Key(NamedTuple):
    request: str
    place: Place


@dataclass(slots=True)
class _Failing:
    """A request that failed and has not got on since."""

    place: Place  # the furthest one
    workers: dict[str, None] = field(default_factory=dict)  # that it failed on
    trust: int = 0  # most that was known for any of these before


@dataclass(slots=True)
class _Record:
    """One worker's."""

    strikes: dict[Part, dict[_Key, bool]] = field(default_factory=dict)  # confirmed?
    out: bool = False  # or on trial
    trial: bool = False
    probe: int | None = None  # sequence of the run that decides
    retry_us: int = 0
    wait_us: int = 0

    @property
    def total(self) -> int:
        return sum(map(len, self.strikes.values()))


class Quarantine:
    """The strikes of all workers."""

    def __init__(self, settings: Settings) -> None:
        self._max = settings.quarantine_failures
        self._retry_us = settings.quarantine_retry_us
        self._records: dict[str, _Record] = {}
        self._failing: dict[str, _Failing] = {}  # by request
        self._trust: dict[str, dict[Part, int]] = {}  # by worker: how the last call of a part went
        self._kept_out: dict[str, None] = {}
        self._due = False
        self._version = -1  # of the cluster, when that was decided
        self.notices: list[Quarantined] = []  # untold ones; whoever settles takes them

    # ------------------------------------------------------------------------------ what happens

    def strike(
        self, worker: str, part: Part, request: str, place: Place, at_us: int, others: bool
    ) -> None:
        """A request failed on a worker; `others` were as likely to blame."""
        failing = self._failing.setdefault(request, _Failing(place))
        failing.place = max(failing.place, place)
        failing.workers[worker] = None
        failing.trust = max(failing.trust, self._trusted(worker, part))
        self._went(worker, part, FAILED)
        self._due = True
        if not self._max:
            return
        record = self._records.setdefault(worker, _Record())
        if record.total < STRIKES_MAX:
            record.strikes.setdefault(part, {}).setdefault(_Key(request, place), False)
        if record.trial and not others and len(failing.workers) == 1:
            record.trial, record.probe = False, None
            record.wait_us = min(2 * record.wait_us, GROWTH_MAX * self._retry_us)
            record.retry_us = at_us + record.wait_us

    def shun(self, worker: str, request: str, place: Place) -> None:
        """A request goes elsewhere, with no strike: others failed with it."""
        failing = self._failing.setdefault(request, _Failing(place))
        failing.workers[worker] = None

    def succeeded(self, workers: tuple[str, ...], part: Part) -> None:
        """These workers ended a step, or a call, of the part."""
        for name in workers:
            self._went(name, part, WELL)
            record = self._records.get(name)
            if record is not None and record.strikes.pop(part, None) is not None:
                self._due = True

    def got_on(self, request: str, place: Place) -> None:
        """A request got to a place: what it failed on before that was not its own fault."""
        failing = self._failing.get(request)
        if failing is None or place <= failing.place:
            return
        del self._failing[request]
        for name in failing.workers:
            record = self._records.get(name)
            for strikes in () if record is None else record.strikes.values():
                strikes.update({key: True for key in strikes if key.request == request})
        self._due = True

    def ended(self, request: str) -> None:
        """A request is over; had it not got on since it failed, that was its own fault."""
        failing = self._failing.pop(request, None)
        for name in () if failing is None else failing.workers:
            record = self._records.get(name)
            for part in () if record is None else list(record.strikes):
                assert record is not None
                kept = {k: c for k, c in record.strikes[part].items() if c or k.request != request}
                record.strikes[part] = kept
                if not kept:
                    del record.strikes[part]
        self._due = self._due or failing is not None

    def issued(self, assignment: Assignment, part: Part) -> None:
        """Work goes out: on trial, one run of a part that failed decides."""
        for name in assignment.workers if self._records else ():
            record = self._records.get(name)
            if record is None or not record.trial or record.probe is not None:
                continue
            if part in record.strikes:
                record.probe = assignment.sequence
                self._due = True

    def forget(self, worker: str) -> None:
        """It is another process now, or gone for good."""
        self._trust.pop(worker, None)
        if self._records.pop(worker, None) is not None:
            self._due = True

    # ------------------------------------------------------------------------------ questions

    @property
    def any_failing(self) -> bool:
        """Some request failed and has not got on since."""
        return bool(self._failing)

    def failed_on(self, request: str) -> Mapping[str, None]:
        """Workers on which a request failed since it last got on."""
        failing = self._failing.get(request)
        return {} if failing is None else failing.workers

    def may_end(self, request: str, part: Part, able: Iterable[str]) -> bool:
        """A request that failed often enough need not be tried on yet another worker: there is none
        that is better known for being well with others than those it failed on.
        """
        failing = self._failing.get(request)
        if failing is None:
            return True
        others = (self._trusted(w, part) for w in able if w not in failing.workers)
        return failing.trust >= max(others, default=FAILED)

    def bad(self, worker: str) -> bool:
        """Kept out or on trial: failures there are nobody else's."""
        record = self._records.get(worker)
        return record is not None and record.out and (record.trial or worker in self._kept_out)

    def on_trial(self) -> list[str]:
        """Workers that are being tried again."""
        return [w for w, r in self._records.items() if r.trial]

    def kept_out(self) -> dict[str, Quarantined]:
        """Workers that get nothing new, by name."""
        return {
            w: Quarantined(w, self._counting(self._records[w]), self._records[w].retry_us)
            for w in sorted(self._kept_out)
        }

    # ------------------------------------------------------------------------------ decisions

    def settle(self, cluster: Cluster, flights: Container[int], at_us: int) -> bool:
        """Keeps out whom it must, as far as others can serve; whether anything changed."""
        records = self._records
        if not records and not self._due:
            return False
        waits = any(r.out and not r.trial and at_us >= r.retry_us for r in records.values())
        gone = any(r.probe is not None and r.probe not in flights for r in records.values())
        if not (self._due or waits or gone or (records and cluster.version != self._version)):
            return False
        for name in [n for n in records if not _inside(cluster, n)]:
            del records[name]
        for name, record in list(records.items()):
            self._judge(name, record, flights, at_us)
        changed = self._keep_out(cluster, at_us)
        self._version, self._due = cluster.version, False
        return changed

    def _judge(self, name: str, record: _Record, flights: Container[int], at_us: int) -> None:
        if record.probe is not None and record.probe not in flights:
            record.probe = None  # called off: the next one decides
        if record.out and self._counting(record) < self._max:
            record.out = record.trial = False
            record.strikes.clear()
            self.notices.append(Quarantined(name, 0, 0))
        if not record.out and not record.strikes:
            del self._records[name]
        elif record.out and not record.trial and at_us >= record.retry_us:
            record.trial = True

    def _keep_out(self, cluster: Cluster, at_us: int) -> bool:
        counts = {n: self._counting(r) for n, r in self._records.items()}
        kept_out: dict[str, None] = {}
        for name in sorted(counts, key=lambda n: (-counts[n], n)):
            record = self._records[name]
            if counts[name] < self._max or (record.trial and record.probe is None):
                continue
            if not _others_serve(cluster, cluster.workers[name], kept_out):
                continue
            kept_out[name] = None
            if not record.out:
                record.out, record.wait_us = True, self._retry_us
                record.retry_us = at_us + self._retry_us
                self.notices.append(Quarantined(name, counts[name], record.retry_us))
        changed = False
        for worker in cluster.workers.values():
            if worker.quarantined != (worker.name in kept_out):
                worker.quarantine(worker.name in kept_out)
                changed = True
        self._kept_out = kept_out
        return changed

    def _trusted(self, worker: str, part: Part) -> int:
        return self._trust.get(worker, {}).get(part, UNTRIED)

    def _went(self, worker: str, part: Part, how: int) -> None:
        known = self._trust.setdefault(worker, {})
        if part not in known and len(known) >= PARTS_MAX:
            known.clear()
        known[part] = how

    def _counting(self, record: _Record) -> int:
        """Strikes that speak against the worker."""
        return sum(
            confirmed or len(self._failing[key.request].workers) == 1
            for strikes in record.strikes.values()
            for key, confirmed in strikes.items()
            if confirmed or key.request in self._failing
        )


def place(workflow: Workflow, node: str, steps_done: int) -> Place:
    """Where a request stands; they compare in the order in which it goes on."""
    before = workflow.section[node] is Section.BEFORE
    return (workflow.rank[node], 0 if before else steps_done)


def _inside(cluster: Cluster, name: str) -> bool:
    worker = cluster.workers.get(name)
    return worker is not None and worker.state is not WorkerState.LOST


def _others_serve(cluster: Cluster, worker: Worker, kept_out: Container[str]) -> bool:
    """All that it runs has another worker that gets work."""
    return all(
        any(
            w is not worker
            and w.name not in kept_out
            and w.state is WorkerState.UP
            and not (w.draining or w.stopping)
            and w.can(model, 1, op)
            for w in cluster.workers.values()
        )
        for model, op in worker.serves()
    )
