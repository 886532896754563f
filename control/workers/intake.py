"""Turns what workers say into facts for the driver: the only writer of leases.

Heartbeats are also where control and workers are reconciled, since core NATS delivers at most once:
latents of ended requests are released, assignments that never arrived are found, and a worker that
follows a later leader ends this one's term.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from grpc_health.v1 import health, health_pb2

from control import translate
from control.driver import Driver
from control.entrance.door import check_heartbeat, check_report
from control.publisher import Publisher
from control.requests.records import Record, Records
from control.scheduler.books.ledger import Notice
from control.scheduler.books.loads import own_part
from control.scheduler.books.quarantine import Quarantined
from control.scheduler.core import Scheduler
from control.scheduler.times.drift import Shift
from control.scheduler.values import Assignment, WorkerLost, WorkerUp
from control.workers.cluster_view import ClusterView
from control.workers.leases import Leases
from control.workers.lost_messages import LostMessages
from hocket.messaging.bus import Bus, Subjects
from hocket.tracing import telemetry
from hocket.v1 import control_pb2, mesh_pb2

log = logging.getLogger(__name__)

SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
_ETA_KEPT_US = 200_000  # an estimate asks about every open request: not at each step
_LOOP_PASSES = 10  # until every message that a flush brought has been handled
_TOLD_MAX = 1024  # incarnations and payloads whose refusal was logged


@dataclass
class Intake:
    """One term's ear."""

    term: int
    bus: Bus
    subjects: Subjects
    leases: Leases
    driver: Driver
    publisher: Publisher
    view: ClusterView
    records: Records
    superseded: Callable[[int], None]  # by a term that a worker follows
    workers_came: Callable[[], None]
    health: health.aio.HealthServicer = field(default_factory=health.aio.HealthServicer)
    troubles: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._lost_messages = LostMessages(self.term)
        self._told: dict[tuple[str, str], None] = {}  # what was logged, oldest first
        self.leases.term = self.term

    async def heartbeat(self, beat: mesh_pb2.Heartbeat) -> None:
        wrong = check_heartbeat(beat, self.term)
        if wrong is not None:
            self._turned_away("refused heartbeats", beat.worker[:64], wrong)
            return
        if beat.term > self.term:
            self.superseded(beat.term)
            return
        refused = self.leases.refused(beat)
        if refused is not None:
            await self._refuse(beat, refused)
            return
        now_us = self.driver.stamp()
        facts = self.leases.heartbeat(beat, now_us)
        await self._changed(facts)
        if not facts and beat.worker in self.leases.alive:
            if self.driver.awaits(beat.worker):
                self.driver.post(self.leases.state(beat.worker, now_us))
            elif _tells_weights(beat):  # no news unless the scheduler thinks otherwise
                state = self.leases.state(beat.worker, now_us)
                self.driver.post(state, unless=lambda s: _as_thought(s, beat))
        over = [h.request_id for h in beat.latents if not self.records.is_open(h.request_id)]
        if over or beat.term < self.term:  # the worker has not heard of this leader yet
            message = mesh_pb2.Assign(term=self.term, released=over, incarnation=beat.incarnation)
            await self.bus.publish(self.subjects.assign(beat.worker), message)

    async def check(self) -> None:
        """Ends leases that are too old, finds lost messages, tells what got slow. Call it every
        `leases.look_every_us`.
        """
        now_us = self.driver.stamp()
        self.leases.look(now_us)
        nothing_heard = self.leases.nothing_heard(now_us)
        if nothing_heard is not None:
            self.driver.post(nothing_heard)
        expiry_us = self.leases.next_expiry_us()
        # Heartbeats may wait unread: this process was held up, not the workers. If the broker does
        # not answer either, nobody's lease ends now.
        if expiry_us is not None and expiry_us <= now_us and await self.bus.flush():
            for _ in range(_LOOP_PASSES):
                await asyncio.sleep(0)
            await self._changed(self.leases.expire(now_us))
        # Behind what workers had reported before these heartbeats, however long a plan takes.
        beats = {name: lease.heartbeat for name, lease in self.leases.alive.items()}
        stopping = [n for n, lease in self.leases.alive.items() if lease.heartbeat.stopping]
        notices, flights, safe = await self.driver.ask_behind(partial(_taken, stopping))
        for worker, released in safe.items():
            await self._release(worker, released)
        await self._tell(notices)
        for worker in self._lost_messages.still_running(beats, flights):
            await self.publisher.truncate_again(worker)
        now_us = self.driver.stamp()
        found = self._lost_messages.check(beats, flights, now_us)
        if found:  # reports were lost too: what workers hold is news
            for up in self.leases.restate(now_us):
                self.driver.post(up)
        for lost in found:
            log.warning(
                "assignment %d never reached %s, or its report us", lost.sequence, lost.worker
            )
            self.driver.post(lost)
        self.leases.looked(self.driver.stamp())

    async def _release(self, worker: str, released: Sequence[str]) -> None:
        """A worker that stops may drop these latents: it leaves when it holds nothing else."""
        lease = self.leases.alive.get(worker)
        if lease is not None and released:
            incarnation = lease.heartbeat.incarnation
            message = mesh_pb2.Assign(term=self.term, released=released, incarnation=incarnation)
            await self.bus.publish(self.subjects.assign(worker), message)

    async def _tell(self, notices: tuple[Notice, ...]) -> None:
        """Slow workers and drift, as log lines and to whoever watches the cluster."""
        for notice in notices:
            if isinstance(notice, Shift):
                what = "%s of %s on %s takes %.2f times what it took"
                model, gpu, node = notice.family
                log.warning(what, node, model, gpu, notice.factor)
            elif isinstance(notice, Quarantined):
                what = "worker %s failed %d times where others did not: it gets no work for a while"
                if notice.strikes:
                    log.warning(what, notice.worker, notice.strikes)
                else:
                    log.info("worker %s gets work again: it is well", notice.worker)
            elif notice.factor > 1.0:
                what = "worker %s is slow: its steps take %.2f times as long as its peers'"
                log.warning(what, notice.worker, notice.factor)
            else:
                log.info("worker %s is as fast as its peers again", notice.worker)
        if notices:
            await self.view.changed()

    async def report(self, report: mesh_pb2.StepReport) -> None:
        wrong = check_report(report, self.term)
        if wrong is not None:
            self._turned_away("refused reports", report.worker[:64], wrong)
            return
        if report.term != self.term:
            return  # about an assignment of an earlier leader, whose numbers mean nothing here
        event = translate.to_event(report, self.driver.stamp())
        if report.HasField("failure"):
            self._log_failure(report)
            for suspect in getattr(event, "suspects", ()):
                self.leases.suspect(suspect)
        records = (self.records.get(result.request_id) for result in report.results)
        ask = [r.id for r in records if r is not None and self._is_old(r, event.at_us)]
        self.driver.post(event, report, estimate=ask)

    async def publish_health(self) -> None:
        state = (
            health_pb2.HealthCheckResponse.SERVING
            if self.leases.alive
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", SERVICE):
            await self.health.set(name, state)

    def _is_old(self, record: Record, now_us: int) -> bool:
        """Whether the estimate of its finish is worth another."""
        return record.is_open and now_us - record.estimated_us >= _ETA_KEPT_US

    async def _refuse(self, beat: mesh_pb2.Heartbeat, why: str) -> None:
        """A second process of a name that lives: it is told so, and ends."""
        self._turned_away("refused incarnations", f"{beat.worker} ({beat.incarnation})", why)
        message = mesh_pb2.Assign(term=self.term, incarnation=beat.incarnation, refused=why)
        await self.bus.publish(self.subjects.assign(beat.worker), message)

    def _turned_away(self, kind: str, who: str, why: str) -> None:
        """Counts it, and says it once."""
        self.troubles[kind] += 1
        if (kind, who) in self._told:
            return
        self._told[kind, who] = None
        while len(self._told) > _TOLD_MAX:
            del self._told[next(iter(self._told))]
        log.error("%s of %r: %s", kind, who, why)

    def _log_failure(self, report: mesh_pb2.StepReport) -> None:
        if report.failure.reason == "TRUNCATED":
            return  # as told
        record = self.records.get(report.results[0].request_id) if report.results else None
        with telemetry.within(record.traceparent if record is not None else ""):
            log.warning(
                "assignment %d (%s) failed on %s: %s: %s",
                report.sequence,
                report.node,
                report.worker,
                report.failure.reason,
                report.failure.message,
            )

    async def _changed(self, facts: tuple[WorkerUp | WorkerLost, ...]) -> None:
        for fact in facts:
            self.driver.post(fact)
            if isinstance(fact, WorkerLost):
                log.warning("worker %s is gone (%s)", fact.worker, fact.reason)
            else:
                log.info("worker %s is up", fact.worker)
        if facts:
            await self.publish_health()
            await self.view.changed()
            self.workers_came()


def _taken(
    stopping: Sequence[str], scheduler: Scheduler
) -> tuple[tuple[Notice, ...], tuple[Assignment, ...], dict[str, tuple[str, ...]]]:
    """Notices, assignments that are out, and by stopping worker what has a copy elsewhere."""
    safe = {worker: scheduler.safe_to_release(worker) for worker in stopping}
    return scheduler.take_notices(), scheduler.outstanding(), safe


def _tells_weights(beat: mesh_pb2.Heartbeat) -> bool:
    """Of a worker that has nothing to do: while work is on its way, what is loaded changes."""
    return beat.memory.budget_bytes > 0 and not beat.leaving and not beat.pending_sequences


def _as_thought(scheduler: Scheduler, beat: mesh_pb2.Heartbeat) -> bool:
    """Whether the worker has the weights that the scheduler thinks, or work on its way to it."""
    if any(beat.worker in flight.workers for flight in scheduler.outstanding()):
        return True
    resident = {
        part.part or own_part(part.model, part.node) for part in beat.memory.parts if part.resident
    }
    return resident == scheduler.weights_on(beat.worker)
