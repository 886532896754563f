"""One leadership: everything that a leader needs, from its Fence to its end.

Made anew for each term, so that nothing of an earlier one is left in it. What outlives terms (the
bus, leases, health, the door) is handed in.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import msgspec
from grpc_health.v1 import health

from control.catalogue_store import CatalogueStore
from control.config import (
    ControlSettings,
    best_effort_wait_us_max,
    profile_csv,
    scaling_settings,
    scheduler_settings,
)
from control.desk import Desk, Wiring
from control.journal import Journal
from control.latency_store import LatencyStore
from control.leading.promises import TERM_MAX, Deposed, Promises
from control.leading.recovery import recover
from control.leading.replicas import Replicas
from control.leading.standby import Book
from control.planning import PlannerThread
from control.requests.offers import AdmissionSettings
from control.scaling.signal import WakeSettings
from control.scheduler.core import Scheduler
from control.scheduler.settings import SettingError, Settings
from control.scheduler.times.cells import LatencySnapshot
from control.scheduler.times.profile import Profile, ProfileError
from control.workers.leases import Leases
from hocket import garbage
from hocket.clock import Clock
from hocket.errors import WrongConfig
from hocket.messaging import media_bucket
from hocket.messaging.bus import Bus, Subjects
from hocket.tracing.telemetry import Telemetry
from hocket.v1 import journal_pb2, mesh_pb2

log = logging.getLogger(__name__)

_CLOSE_WAIT_S = 1.0


@dataclass(frozen=True)
class Parts:
    """What one replica has all along."""

    settings: ControlSettings
    clock: Clock
    told: Telemetry
    bus: Bus
    subjects: Subjects
    leases: Leases  # kept warm while another one leads
    health: health.aio.HealthServicer
    replicas: Replicas


class Term:
    """Leads until it is cancelled or deposed."""

    def __init__(
        self,
        parts: Parts,
        promises: Promises,
        journal: Journal,
        store: LatencyStore,
        scheduler: Scheduler,
    ) -> None:
        self.parts = parts
        self._promises = promises
        self._store = store
        self._scheduler = scheduler
        self._deposed: asyncio.Future[NoReturn] = asyncio.get_running_loop().create_future()
        settings, leases, bus, clock = parts.settings, parts.leases, parts.bus, parts.clock
        self.desk = Desk.build(
            Wiring(
                bus=bus,
                subjects=parts.subjects,
                diary=journal,
                promises=promises,
                scheduler=scheduler,
                leases=leases,
                clock=clock,
                tracer=parts.told.tracer,
                policy=settings.policy,
                planning=PlannerThread(),
                follower_grace_us=settings.follower_grace_us,
                ended_max=settings.ended_max,
                retention_us=settings.retention_s * 1_000_000,
                admission=AdmissionSettings(
                    open_max=settings.requests_open_max,
                    settle_us=settings.lease_us,
                    best_effort_wait_us_max=best_effort_wait_us_max(settings),
                ),
                replicas=parts.replicas.alive,
                stream_replicas=settings.stream_replicas,
                unix_us=lambda: promises.unix_us,
                scaling=scaling_settings(settings),
                wake=WakeSettings(
                    models=settings.wake_models,
                    wait_us=round(settings.wake_wait_s * 1e6),
                    kept_us=round(settings.models_kept_s * 1e6),
                ),
            )
        )
        self.models = CatalogueStore(bus, parts.subjects)
        self.intake = self.desk.intake(self._superseded, parts.health)

    @classmethod
    async def begin(cls, parts: Parts, promises: Promises, book: Book) -> Term:
        """Builds it and takes up what `book` (complete up to the Fence) says was promised.

        Raises WrongConfig.
        """
        settings, subjects = parts.settings, parts.subjects
        csv = profile_csv(settings)
        library = scheduler_settings(settings, promises.term)
        scheduler = build_scheduler(library, csv)
        store = await LatencyStore.open(parts.bus, subjects, settings.stream_replicas)
        learned = await store.load()
        if learned is not None:
            scheduler.restore_latencies(learned)
        journal = await Journal.open(
            parts.bus,
            subjects,
            promises.term,
            settings.diary_bytes_max,
            settings.stream_replicas,
        )
        await journal.note_start(parts.clock.now_us(), _started(library, csv, learned))
        term = cls(parts, promises, journal, store, scheduler)
        book.prune(promises.fence.unix_us, settings.retention_s * 1_000_000, settings.ended_max)
        desk = term.desk
        await term.models.load(desk.signal.catalogue, promises.unix_us)
        recover(
            book,
            promises,
            desk.driver,
            desk.records,
            parts.leases,
            desk.attachments.expect_followers,
            scheduler,
        )
        return term

    @property
    def term(self) -> int:
        """The leader's fencing number."""
        return self._promises.term

    @property
    def policy(self) -> str:
        """Name of the planning policy."""
        return self.parts.settings.policy

    async def heartbeat(self, beat: mesh_pb2.Heartbeat) -> None:
        """A worker said that it lives."""
        await self.intake.heartbeat(beat)

    async def report(self, report: mesh_pb2.StepReport) -> None:
        """A worker said what became of steps."""
        await self.intake.report(report)

    async def run(self) -> NoReturn:
        """Leads until cancelled. Raises Deposed, alone or in a group."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for part in self.desk.parts():
                    tasks.create_task(part)
                tasks.create_task(garbage.keep(self.parts.clock, self._is_idle))
                tasks.create_task(self._check())
                tasks.create_task(self.desk.signal.run())
                tasks.create_task(self.models.keep(self.desk.signal.catalogue, self.parts.clock))
                tasks.create_task(self._store.keep(self.desk.driver.ask, self.parts.clock))
                tasks.create_task(self._promises.keep_bounds())
                tasks.create_task(self._keep_media_bucket())
                tasks.create_task(self._keep_input_bucket())
                await self._deposed
            raise AssertionError("it ends by an exception")
        finally:
            self._deposed.cancel()

    async def close(self) -> None:
        """Keeps what was learned, if the broker answers; nothing is promised any more."""
        await asyncio.to_thread(self.desk.driver.close)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_WAIT_S):
                await self._store.save(self._scheduler)
                await self.models.save(self.desk.signal.catalogue)

    async def _keep_media_bucket(self) -> NoReturn:
        parts, settings = self.parts, self.parts.settings
        bounds = media_bucket.Bounds(
            settings.media_bytes_max, settings.media_kept_s, settings.stream_replicas
        )
        await media_bucket.keep(parts.bus, parts.subjects, parts.clock, bounds)

    async def _keep_input_bucket(self) -> NoReturn:
        parts, settings = self.parts, self.parts.settings
        bounds = media_bucket.Bounds(
            settings.inputs_bytes_max,
            settings.inputs_kept_s,
            settings.stream_replicas,
            bytes_most=media_bucket.INPUT_BYTES_MOST,
        )
        bucket = parts.subjects.input_bucket
        await media_bucket.keep(parts.bus, parts.subjects, parts.clock, bounds, bucket)

    def _is_idle(self) -> bool:
        return self.desk.records.open_count == 0

    async def _check(self) -> NoReturn:
        clock, every_us = self.parts.clock, self.parts.leases.look_every_us
        while True:
            await clock.sleep_until(clock.now_us() + every_us)
            await self.intake.check()

    def _superseded(self, heard: int) -> None:
        """Workers follow a later term: the broker lost its store, or another one leads."""
        if heard > TERM_MAX:
            log.warning("a worker follows term %d, which no leader can have had", heard)
        elif not self._deposed.done():
            self._deposed.set_exception(Deposed(self.term, heard))


def build_scheduler(settings: Settings, csv: str) -> Scheduler:
    """The scheduler of these settings and profile; raises WrongConfig."""
    try:
        return Scheduler(settings, Profile.from_csv(csv))
    except SettingError as error:
        raise WrongConfig(key=error.key, value=str(error.value), allowed=error.allowed) from error
    except ProfileError as error:
        raise WrongConfig(key="profiles", value=str(error), allowed="valid rows") from error


def _started(
    settings: Settings, csv: str, learned: LatencySnapshot | None
) -> journal_pb2.LeaderStarted:
    """All that the plans of this term rest on, beside the facts."""
    return journal_pb2.LeaderStarted(
        settings_json=msgspec.json.encode(settings).decode(),
        profile_csv=csv,
        latencies_json="" if learned is None else msgspec.json.encode(learned).decode(),
    )
