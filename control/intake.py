"""Turns what workers say into facts for the driver: the only writer of leases.

Heartbeats are also where control and workers are reconciled, since core NATS delivers at most once:
latents of ended requests are released, assignments that never arrived are found, and a worker that
follows a later leader makes this one step down.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from grpc_health.v1 import health, health_pb2

from control import translate
from control.driver import Driver
from control.leases import Leases
from control.lost_messages import LostMessages
from control.publisher import Publisher
from control.requests import Record, Records
from control.scheduler.drift import Shift
from control.scheduler.resilience.quarantine import Quarantined
from control.scheduler.values import WorkerLost, WorkerUp
from control.servicer import ControlServicer
from hocket import telemetry
from hocket.bus import Bus, Subjects
from hocket.errors import HocketError
from hocket.v1 import control_pb2, mesh_pb2

log = logging.getLogger(__name__)

SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
_ETA_KEPT_US = 200_000  # an estimate asks about every open request: not at each step
CHECK_EVERY_US = 200_000
_LOOP_PASSES = 10  # until every message that a flush brought has been handled


@dataclass
class Superseded(HocketError):
    """Workers follow a later term than the one this replica leads."""

    term: int
    heard: int

    def __str__(self) -> str:
        return (
            f"workers follow term {self.heard}, this replica leads term {self.term}: another one "
            "took over, or the broker came back without its store; start this replica again"
        )


@dataclass
class Intake:
    """One term's ear."""

    term: int
    bus: Bus
    subjects: Subjects
    leases: Leases
    driver: Driver
    publisher: Publisher
    servicer: ControlServicer
    records: Records
    step_down: Callable[[Superseded], None]
    health: health.aio.HealthServicer = field(default_factory=health.aio.HealthServicer)

    def __post_init__(self) -> None:
        self._lost_messages = LostMessages(self.term)
        self.leases.term = self.term

    async def heartbeat(self, beat: mesh_pb2.Heartbeat) -> None:
        if beat.term > self.term:
            self.step_down(Superseded(self.term, beat.term))
            return
        facts = self.leases.heartbeat(beat, self.driver.stamp())
        await self._changed(facts)
        awaited = self.driver.scheduler.awaits(beat.worker) and beat.worker in self.leases.alive
        if not facts and (awaited or self._holds_other_weights(beat)):
            self.driver.post(self.leases.state(beat.worker, self.driver.stamp()))
        over = [h.request_id for h in beat.latents if not self.records.is_open(h.request_id)]
        if over or beat.term < self.term:  # the worker has not heard of this leader yet
            message = mesh_pb2.Assign(term=self.term, released=over)
            await self.bus.publish(self.subjects.assign(beat.worker), message)

    async def check(self) -> None:
        """Ends leases that are too old, finds lost messages, tells what got slow. Call it every
        `CHECK_EVERY_US`.
        """
        await self._tell_notices()
        now_us = self.driver.stamp()
        self.leases.look(now_us, CHECK_EVERY_US)
        nothing_heard = self.leases.nothing_heard(now_us)
        if nothing_heard is not None:
            self.driver.post(nothing_heard)
        expiry_us = self.leases.next_expiry_us()
        if expiry_us is not None and expiry_us <= now_us:
            # Heartbeats may wait unread: this process was held up, not the workers.
            await self.bus.flush()
            for _ in range(_LOOP_PASSES):
                await asyncio.sleep(0)
            await self._changed(self.leases.expire(now_us))
        flights = self.driver.scheduler.outstanding()
        beats = {name: lease.heartbeat for name, lease in self.leases.alive.items()}
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

    async def _tell_notices(self) -> None:
        """Slow workers and drift, as log lines and to whoever watches the cluster."""
        notices = self.driver.scheduler.take_notices()
        for notice in notices:
            if isinstance(notice, Shift):
                what = "%s of %s on %s takes %.2f times what it took"
                model, gpu, node = notice.family
                log.warning(what, node, model, gpu, notice.factor)
            elif isinstance(notice, Quarantined):
                what = "worker %s failed %d times in a row: it gets no work for a while"
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
            await self.servicer.membership_changed()

    async def report(self, report: mesh_pb2.StepReport) -> None:
        if report.term != self.term:
            return  # about an assignment of an earlier leader, whose numbers mean nothing here
        event = translate.to_event(report, self.driver.stamp())
        if report.HasField("failure"):
            self._log_failure(report)
            for suspect in getattr(event, "suspects", ()):
                self.leases.suspect(suspect)
        eta_us: dict[str, int] = {}
        for result in report.results:
            record = self.records.get(result.request_id)
            job = self.driver.scheduler.job(result.request_id)
            if record is None or job is None or result.attempt != job.attempt:
                continue  # ended, or called off: the client hears of what counts
            if result.HasField("media"):
                record.media = result.media
            elif report.HasField("media") and len(report.results) == 1:  # of an older worker
                record.media = report.media
            eta_us[record.id] = self._left_us(record, event.at_us)
        self.driver.post(event)
        await self.publisher.progressed(report, eta_us)

    async def publish_health(self) -> None:
        state = (
            health_pb2.HealthCheckResponse.SERVING
            if self.leases.alive
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", SERVICE):
            await self.health.set(name, state)

    def _left_us(self, record: Record, now_us: int) -> int:
        """Predicted time until the finish."""
        if now_us - record.estimated_us >= _ETA_KEPT_US:
            finish_us = self.driver.scheduler.eta_us(record.id, now_us)
            record.estimated_us = now_us
            record.finish_us = now_us if finish_us is None else finish_us
        return max(0, record.finish_us - now_us)

    def _holds_other_weights(self, beat: mesh_pb2.Heartbeat) -> bool:
        """Than the scheduler thinks; while work is on its way they may differ."""
        if not beat.memory.budget_bytes or beat.leaving or beat.pending_sequences:
            return False
        scheduler = self.driver.scheduler
        if any(beat.worker in flight.workers for flight in scheduler.outstanding()):
            return False
        resident = {(part.model, part.node) for part in beat.memory.parts if part.resident}
        return resident != scheduler.weights_on(beat.worker)

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
            await self.servicer.membership_changed()
