"""Wires one control replica together: broker, journal, leases, driver, ControlService, health."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from control import translate
from control.config import ControlSettings, profile_csv, scheduler_settings
from control.driver import Driver
from control.journal import Journal
from control.leases import Leases
from control.lost_messages import LostMessages
from control.publisher import Publisher
from control.recovery import recover
from control.requests import Records
from control.scheduler.core import Scheduler
from control.scheduler.profile import Profile, ProfileError
from control.scheduler.settings import SettingError, Settings
from control.scheduler.values import WorkerLost, WorkerUp
from control.servicer import ControlServicer
from hocket import endpoints, telemetry
from hocket.bus import Bus, Subjects
from hocket.channels import SERVER_OPTIONS
from hocket.clock import Clock
from hocket.errors import WrongConfig
from hocket.telemetry import Telemetry
from hocket.v1 import control_pb2, control_pb2_grpc, journal_pb2, mesh_pb2

log = logging.getLogger(__name__)

_SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
_GRACE_S = 2.0


@dataclass
class Intake:
    """Turns what workers say into facts: the only writer of leases."""

    term: int
    leases: Leases
    driver: Driver
    publisher: Publisher
    servicer: ControlServicer
    records: Records
    health: health.aio.HealthServicer
    lost_messages: LostMessages

    async def heartbeat(self, beat: mesh_pb2.Heartbeat) -> None:
        now_us = self.driver.stamp()
        await self._changed(self.leases.heartbeat(beat, now_us))
        for lost in self.lost_messages.check(beat, self.driver.scheduler.outstanding(), now_us):
            log.warning(
                "assignment %d never reached %s, or its report us", lost.sequence, beat.worker
            )
            self.driver.post(lost)

    async def expire(self) -> None:
        await self._changed(self.leases.expire(self.driver.stamp()))

    async def report(self, report: mesh_pb2.StepReport) -> None:
        if report.term != self.term:
            return  # about an assignment of an earlier leader, whose numbers mean nothing here
        event = translate.to_event(report, self.driver.stamp())
        if report.HasField("failure"):
            self._log_failure(report)
            for suspect in getattr(event, "suspects", ()):
                self.leases.suspect(suspect)
        if report.HasField("media"):
            for result in report.results:
                record = self.records.get(result.request_id)
                if record is not None:
                    record.media = report.media
        self.driver.post(event)
        eta_us = {r.request_id: self._left_us(r.request_id, event.at_us) for r in report.results}
        await self.publisher.progressed(report, eta_us)

    def _left_us(self, request: str, now_us: int) -> int:
        finish_us = self.driver.scheduler.eta_us(request, now_us)
        return 0 if finish_us is None else max(0, finish_us - now_us)

    def _log_failure(self, report: mesh_pb2.StepReport) -> None:
        for result in report.results:
            record = self.records.get(result.request_id)
            with telemetry.within(record.traceparent if record is not None else ""):
                log.warning(
                    "assignment %d (%s of %s) failed on %s after step %d: %s",
                    report.sequence,
                    report.node,
                    result.request_id,
                    report.worker,
                    result.steps_done,
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

    async def publish_health(self) -> None:
        state = (
            health_pb2.HealthCheckResponse.SERVING
            if self.leases.alive
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", _SERVICE):
            await self.health.set(name, state)


async def serve(
    settings: ControlSettings, clock: Clock, told: Telemetry, stop: asyncio.Event
) -> None:
    """Runs a control replica until `stop` is set."""
    bus = await Bus.connect(settings.nats_url, "control")
    try:
        await _lead(settings, clock, told, stop, bus)
    finally:
        await bus.close()


async def _lead(
    settings: ControlSettings, clock: Clock, told: Telemetry, stop: asyncio.Event, bus: Bus
) -> None:
    subjects = Subjects(settings.cluster)
    journal = await Journal.open(bus, subjects)
    csv = profile_csv(settings)
    library = scheduler_settings(settings, journal.term)
    scheduler = build_scheduler(library, csv)
    records, leases = Records(), Leases(settings.lease_us)
    publisher = Publisher(bus, subjects, journal, records, leases, told.tracer)
    driver = Driver(scheduler, clock, publisher)
    servicer = ControlServicer(
        driver,
        journal,
        records,
        leases,
        clock,
        told.tracer,
        policy=settings.policy,
        requests_open_max=settings.requests_open_max,
    )
    await recover(bus, subjects, driver, records, clock)
    await journal.note(
        journal_pb2.JournalEntry(
            stamped_us=clock.now_us(),
            leader_started=journal_pb2.LeaderStarted(
                settings_json=msgspec.json.encode(library).decode(), profile_csv=csv
            ),
        )
    )
    intake = Intake(
        journal.term,
        leases,
        driver,
        publisher,
        servicer,
        records,
        health.aio.HealthServicer(),
        LostMessages(journal.term),
    )
    server, port = await _listen(settings, told, servicer, intake)
    await bus.subscribe(subjects.heartbeat("*"), mesh_pb2.Heartbeat, intake.heartbeat)
    await bus.subscribe(subjects.report("*"), mesh_pb2.StepReport, intake.report)
    endpoints.announce(settings.state_dir, "control", f"{_host(settings.listen)}:{port}")
    log.info("control leads term %d on port %d, policy %s", journal.term, port, settings.policy)
    try:
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(driver.run()), tasks.create_task(_expire(intake, clock))]
            await stop.wait()
            await intake.health.enter_graceful_shutdown()
            await server.stop(_GRACE_S)
            for task in work:
                task.cancel()
    finally:
        endpoints.withdraw(settings.state_dir, "control")


async def _listen(
    settings: ControlSettings, told: Telemetry, servicer: ControlServicer, intake: Intake
) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(interceptors=told.server_interceptors(), options=SERVER_OPTIONS)
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(intake.health, server)
    reflection.enable_server_reflection(
        (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    port = server.add_insecure_port(settings.listen)
    await intake.publish_health()
    await server.start()
    return server, port


async def _expire(intake: Intake, clock: Clock) -> None:
    while True:
        due_us = intake.leases.next_expiry_us()
        await clock.sleep_until(min(due_us or 1 << 62, clock.now_us() + 100_000))
        await intake.expire()


def build_scheduler(settings: Settings, csv: str) -> Scheduler:
    """The scheduler of these settings and profile; raises WrongConfig."""
    try:
        return Scheduler(settings, Profile.from_csv(csv))
    except SettingError as error:
        raise WrongConfig(key=error.key, value=str(error.value), allowed=error.allowed) from error
    except ProfileError as error:
        raise WrongConfig(key="profiles", value=str(error), allowed="valid rows") from error


def _host(listen: str) -> str:
    host = listen.rpartition(":")[0]
    return "127.0.0.1" if host in ("0.0.0.0", "[::]", "") else host
