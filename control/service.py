"""Wires one control replica together: broker, journal, leases, driver, ControlService, health."""

from __future__ import annotations

import asyncio
import logging

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from control.admission import AdmissionSettings
from control.config import ControlSettings, profile_csv, scheduler_settings
from control.desk import Desk, Wiring
from control.intake import CHECK_EVERY_US, SERVICE, Intake, Superseded
from control.journal import Journal
from control.latency_store import LatencyStore
from control.leases import Leases
from control.planning import PlannerThread
from control.recovery import recover
from control.scheduler.cells import LatencySnapshot
from control.scheduler.core import Scheduler
from control.scheduler.profile import Profile, ProfileError
from control.scheduler.settings import SettingError, Settings
from control.servicer import ControlServicer
from hocket import endpoints
from hocket.bus import Bus, Subjects
from hocket.channels import SERVER_OPTIONS
from hocket.clock import Clock, unix_ns
from hocket.errors import WrongConfig
from hocket.telemetry import Telemetry
from hocket.v1 import control_pb2_grpc, journal_pb2, mesh_pb2

log = logging.getLogger(__name__)

_GRACE_S = 2.0


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
    store = await LatencyStore.open(bus, subjects)
    learned = await store.load()
    if learned is not None:
        scheduler.restore_latencies(learned)
    leases = Leases(settings.lease_us)
    desk = Desk.build(
        Wiring(
            bus=bus,
            subjects=subjects,
            diary=journal,
            promises=_JournalPromises(journal),
            scheduler=scheduler,
            leases=leases,
            clock=clock,
            tracer=told.tracer,
            policy=settings.policy,
            planning=PlannerThread(),
            follower_grace_us=settings.follower_grace_us,
            admission=AdmissionSettings(
                open_max=settings.requests_open_max, settle_us=settings.lease_us
            ),
        )
    )
    driver = desk.driver
    await recover(bus, subjects, driver, desk.records, clock, desk.attachments.expect_followers)
    await journal.note(_started(clock.now_us(), library, csv, learned))
    superseded: list[Superseded] = []

    def step_down(why: Superseded) -> None:
        superseded.append(why)
        stop.set()

    intake = desk.intake(step_down)
    server, port = await _listen(settings, told, desk.servicer, intake)
    await bus.subscribe(subjects.heartbeat("*"), mesh_pb2.Heartbeat, intake.heartbeat)
    await bus.subscribe(subjects.report("*"), mesh_pb2.StepReport, intake.report)
    endpoints.announce(settings.state_dir, "control", f"{_host(settings.listen)}:{port}")
    log.info("control leads term %d on port %d, policy %s", journal.term, port, settings.policy)
    try:
        async with asyncio.TaskGroup() as tasks:
            work = [
                *(tasks.create_task(part) for part in desk.parts()),
                tasks.create_task(_check(intake, clock)),
                tasks.create_task(store.keep(scheduler, clock)),
            ]
            await stop.wait()
            await intake.health.enter_graceful_shutdown()
            await server.stop(_GRACE_S)
            for task in work:
                task.cancel()
        if superseded:
            await journal.raise_term(superseded[-1].heard)
            raise superseded[-1]
        await store.save(scheduler)
    finally:
        driver.close()
        endpoints.withdraw(settings.state_dir, "control")


class _JournalPromises:
    """Promises in the old journal, until they have a stream of their own."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.term = journal.term

    async def append(self, promise: journal_pb2.Promise) -> int:
        entry = journal_pb2.JournalEntry(stamped_us=0)
        if promise.HasField("ended"):
            entry.ended.CopyFrom(promise.ended)
        else:
            entry.accepted.CopyFrom(
                journal_pb2.AcceptedRequest(
                    submit=promise.submit, answer=promise.answer, traceparent=promise.traceparent
                )
            )
        kind = entry.WhichOneof("entry")
        await self._journal.append(entry, f"{self.term}-{kind}-{promise.submit.request_id}")
        return unix_ns() // 1000

    async def forget(self, request_id: str) -> None:
        """The old journal forgets nothing."""

    async def drain(self, worker: str, draining: bool) -> None:
        """Nor does it keep wishes."""


def _started(
    at_us: int, settings: Settings, csv: str, learned: LatencySnapshot | None
) -> journal_pb2.JournalEntry:
    """All that the plans of this term rest on, beside the facts."""
    return journal_pb2.JournalEntry(
        stamped_us=at_us,
        leader_started=journal_pb2.LeaderStarted(
            settings_json=msgspec.json.encode(settings).decode(),
            profile_csv=csv,
            latencies_json="" if learned is None else msgspec.json.encode(learned).decode(),
        ),
    )


async def _listen(
    settings: ControlSettings, told: Telemetry, servicer: ControlServicer, intake: Intake
) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(interceptors=told.server_interceptors(), options=SERVER_OPTIONS)
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(intake.health, server)
    reflection.enable_server_reflection(
        (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    port = server.add_insecure_port(settings.listen)
    await intake.publish_health()
    await server.start()
    return server, port


async def _check(intake: Intake, clock: Clock) -> None:
    while True:
        await clock.sleep_until(clock.now_us() + CHECK_EVERY_US)
        await intake.check()


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
