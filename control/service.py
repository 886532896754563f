"""One control replica: its door, its ears, and its two roles.

    standing by ── the leader's key is free ──▶ Fence, recovery ──▶ leading
         ◀─────────────────── deposed ───────────────────────────────┘

The door is open in both roles; what outlives a role is made once. Nothing here ends because the
broker stands still or is away.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NoReturn, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from control.config import ControlSettings, profile_csv, scaling_settings, scheduler_settings
from control.entrance.door import check_heartbeat
from control.entrance.doorway import Doorway
from control.entrance.roles import RoleCheck
from control.leading.leadership import Leadership
from control.leading.promises import Deposed, Promises, open_stream
from control.leading.replicas import LEADER, Replicas
from control.leading.standby import Standby
from control.leading.term import Parts, Term, build_scheduler
from control.scaling.pools import PoolReading
from control.workers.intake import SERVICE
from control.workers.leases import Leases
from hocket.cancelling import end_if_cancelled
from hocket.clock import Clock
from hocket.errors import BrokerUnavailable, HocketError, Refused
from hocket.launching import endpoints
from hocket.launching.endpoints import STANDBY
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.leader import LEADER_KEY, LeaderWatch
from hocket.messaging.stores import LeasedKey, Log
from hocket.rpc.channels import SERVER_OPTIONS
from hocket.security.identity import Identity, add_port, broker_access, tell_if_open
from hocket.tracing.metrics import GaugeValue
from hocket.tracing.telemetry import Telemetry
from hocket.v1 import control_pb2_grpc, mesh_pb2

log = logging.getLogger(__name__)
T = TypeVar("T")

_GRACE_S = 0.5  # for answers under way; streams have ended by then
_OPEN_WAIT_S = 20.0  # for a broker whose JetStream is not ready
_AGAIN_S = 0.2
_DOOR = "control"  # as replicas are announced in their state folder


async def serve(
    settings: ControlSettings, clock: Clock, told: Telemetry, stop: asyncio.Event
) -> None:
    """Runs a control replica until `stop` is set. Raises what ended it: a HocketError, or a bug."""
    build_scheduler(scheduler_settings(settings, 1), profile_csv(settings))  # or WrongConfig, now
    scaling_settings(settings)
    access = broker_access(Identity.load(settings.tls_dir), "control")
    bus = await Bus.connect(settings.nats_url, "control", access=access)
    try:
        replica = await Replica.open(settings, clock, told, bus)
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(bus.failed()), tasks.create_task(replica.run())]
            await stop.wait()
            for task in work:
                task.cancel()
    except BaseExceptionGroup as group:
        raise _cause(group) from group
    finally:
        await bus.close()


class Replica:
    """What one process has all along."""

    def __init__(
        self,
        settings: ControlSettings,
        clock: Clock,
        told: Telemetry,
        bus: Bus,
        stream: Log,
        cell: LeasedKey,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._told = told
        self._bus = bus
        self._subjects = Subjects(settings.cluster)
        self._stream = stream
        self._cell = cell
        self._leases = Leases(settings.lease_us)
        self._health = health.aio.HealthServicer()
        self._incarnation = secrets.token_hex(8)
        self._leader = ""
        self._known_term = 0  # of any leader that was heard of
        self._term: Term | None = None
        self._promises: Promises | None = None
        self._doorway = Doorway(lambda: self._leader)

    @classmethod
    async def open(
        cls, settings: ControlSettings, clock: Clock, told: Telemetry, bus: Bus
    ) -> Replica:
        """Makes what it needs on the broker. Raises WrongConfig, BrokerUnavailable."""
        stream, cell = await _patiently(lambda: _places(bus, settings))
        return cls(settings, clock, told, bus, stream, cell)

    async def run(self) -> NoReturn:
        """Serves until cancelled."""
        server, address = await self._listen()
        replicas = Replicas(self._bus, self._subjects, self._clock, address, self._incarnation)
        parts = Parts(
            self._settings,
            self._clock,
            self._told,
            self._bus,
            self._subjects,
            self._leases,
            self._health,
            replicas,
        )
        leadership = Leadership(
            self._cell,
            self._clock,
            address,
            self._incarnation,
            ttl_us=self._settings.leader_ttl_us,
        )
        await self._hear()
        self._measure()
        self._announce(address, STANDBY)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(replicas.run())
                tasks.create_task(self._watch_leader())
                while True:
                    await self._round(parts, leadership, address)
                    end_if_cancelled()
        finally:
            endpoints.withdraw(self._settings.state_dir, _DOOR)
            await self._health.enter_graceful_shutdown()
            await server.stop(_GRACE_S)

    async def _round(self, parts: Parts, leadership: Leadership, address: str) -> None:
        """Stands by, and leads until it is deposed."""
        self._promises = None
        won = False
        try:
            async with asyncio.TaskGroup() as tasks:
                standby = Standby(self._stream, self._subjects)
                waiting = [
                    tasks.create_task(standby.run()),
                    tasks.create_task(self._end_old_leases()),
                ]
                revision = await leadership.win()
                won = True
                tasks.create_task(leadership.keep(self._is_ours))
                promises = await self._take(max(revision, self._known_term + 1))
                book = await standby.complete(promises.fence.sequence)
                for task in waiting:
                    task.cancel()
                await self._lead(await Term.begin(parts, promises, book), address, leadership)
        except* Deposed as group:
            for error in _leaves(group):
                assert isinstance(error, Deposed)
                self._known_term = max(self._known_term, error.term, error.by)
                log.warning("%s; standing by", error)
            with suppress(BrokerUnavailable):  # it may have come back without its store
                await _places(self._bus, self._settings)
        finally:
            if won:
                await leadership.resign()

    async def _take(self, term: int) -> Promises:
        settings = self._settings
        self._promises = await Promises.take(
            self._stream,
            self._subjects,
            term,
            self._clock,
            retention_s=settings.retention_s,
            ended_max=settings.ended_max,
        )
        return self._promises

    async def _lead(self, term: Term, address: str, leadership: Leadership) -> None:
        self._term = term
        term.parts.replicas.role = LEADER
        self._doorway.open(term.desk.servicer)
        try:
            await term.intake.publish_health()
            await term.parts.replicas.announce()
            await leadership.tell(term.term, self._is_ours)
            self._announce(address, LEADER)
            log.info("control leads term %d at %s, policy %s", term.term, address, term.policy)
            await term.run()
        finally:
            self._term = None
            term.parts.replicas.role = STANDBY
            self._doorway.shut()
            self._announce(address, STANDBY)
            await self._not_serving()
            await term.close()

    def _measure(self) -> None:
        """Gauges of the leader's pools; a standby has none."""

        def pools(figure: Callable[[PoolReading], float]) -> Callable[[], list[GaugeValue]]:
            def read() -> list[GaugeValue]:
                term = self._term
                found = () if term is None else term.desk.signal.readings
                return [
                    GaugeValue(figure(r), {"model": r.key.model, "gpu": r.key.gpu}) for r in found
                ]

            return read

        add = self._told.gauges.add
        add(
            "hocket.pool.workers.wanted",
            "{worker}",
            "Workers wanted, by model and kind of GPU; without a model: of the kind in all.",
            pools(lambda r: r.wanted.workers),
        )
        add(
            "hocket.pool.workers",
            "{worker}",
            "Workers that live and take work.",
            pools(lambda r: r.demand.workers),
        )
        add(
            "hocket.pool.work",
            "s",
            "What one worker would take for all requests inside.",
            pools(lambda r: r.demand.work_us / 1e6),
        )
        add(
            "hocket.pool.late_share",
            "1",
            "Of requests with a deadline, those that were or will be late.",
            pools(lambda r: r.wanted.late_share),
        )

    def _announce(self, address: str, role: str) -> None:
        """Tells other processes of this state folder."""
        endpoints.announce(self._settings.state_dir, _DOOR, address, role)

    async def _is_ours(self) -> bool:
        return self._promises is None or await self._promises.is_ours()

    # ---------------------------------------------------------------------------- ears and door

    async def _hear(self) -> None:
        subjects = self._subjects
        await self._bus.subscribe(
            subjects.heartbeat("*"), mesh_pb2.Heartbeat, self._heartbeat, speaker=_worker
        )
        await self._bus.subscribe(
            subjects.report("*"), mesh_pb2.StepReport, self._report, speaker=_worker
        )

    async def _heartbeat(self, beat: mesh_pb2.Heartbeat) -> None:
        if self._term is not None:
            await self._term.heartbeat(beat)
        else:
            wrong = check_heartbeat(beat, self._known_term)
            if wrong is not None:  # the bus counts it
                raise Refused("INVALID_HEARTBEAT", f"heartbeat of {beat.worker[:64]!r}: {wrong}")
            self._leases.heartbeat(beat, self._clock.now_us())

    async def _report(self, report: mesh_pb2.StepReport) -> None:
        if self._term is not None:
            await self._term.report(report)

    async def _end_old_leases(self) -> NoReturn:
        """What the leader's check does, for leases that nobody plans with."""
        while True:
            await self._clock.sleep_until(self._clock.now_us() + self._leases.look_every_us)
            now_us = self._clock.now_us()
            self._leases.look(now_us)
            expiry_us = self._leases.next_expiry_us()
            if expiry_us is not None and expiry_us <= now_us and await self._bus.flush():
                self._leases.expire(now_us)
            self._leases.looked(self._clock.now_us())

    async def _watch_leader(self) -> NoReturn:
        watch = LeaderWatch(self._bus, self._settings.cluster)
        try:
            while True:
                self._leader = await watch.next()
        finally:
            await watch.close()

    async def _listen(self) -> tuple[grpc.aio.Server, str]:
        identity = Identity.load(self._settings.tls_dir)
        guards = [RoleCheck()] if identity is not None else []
        server = grpc.aio.server(
            interceptors=[*self._told.server_wrappings(), *guards], options=SERVER_OPTIONS
        )
        control_pb2_grpc.add_ControlServiceServicer_to_server(self._doorway, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        port = add_port(server, self._settings.listen, identity, mutual=True)
        tell_if_open(self._settings.listen, identity, "control")
        await self._not_serving()
        await server.start()
        address = self._settings.address or f"{_host(self._settings.listen)}:{port}"
        log.info("control listens at %s", address)
        return server, address

    async def _not_serving(self) -> None:
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)


async def _places(bus: Bus, settings: ControlSettings) -> tuple[Log, LeasedKey]:
    """The promises stream and the leader's key. Raises WrongConfig, BrokerUnavailable."""
    subjects, copies = Subjects(settings.cluster), settings.stream_replicas
    stream = await open_stream(bus, subjects, settings.promises_bytes_max, copies)
    ttl_s = settings.leader_ttl_us / 1e6
    return stream, await LeasedKey.open(bus, subjects.leader_bucket, LEADER_KEY, ttl_s, copies)


async def _patiently(work: Callable[[], Awaitable[T]]) -> T:
    """Tries again while the broker is there and its JetStream is not ready."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_OPEN_WAIT_S):
            while True:
                try:
                    return await work()
                except BrokerUnavailable as error:
                    log.info("%s; trying again", error)
                    await asyncio.sleep(_AGAIN_S)
    return await work()


def _worker(said: mesh_pb2.Heartbeat | mesh_pb2.StepReport) -> str:
    return said.worker


def _host(listen: str) -> str:
    """Where others reach what listens there."""
    host = listen.rpartition(":")[0]
    if host not in ("0.0.0.0", "[::]", ""):
        return host
    try:
        socket.getaddrinfo(name := socket.gethostname(), None)
    except OSError:
        return "127.0.0.1"
    return name


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One typed error where nothing else happened; a bug is told whole."""
    leaves = _leaves(group)
    typed = [error for error in leaves if isinstance(error, HocketError)]
    return typed[0] if len(typed) == len(leaves) else group
