"""The asyncio side of a worker: broker in, executor, broker out. It never runs a step and never
blocks.

    assign / truncate ──▶ executor ──▶ RunNote ──▶ report (+ media into the object store, + spans)
    heartbeat every few hundred ms, whatever the executor is doing

Told to stop, a worker says so in its next heartbeat, runs on what control leaves it, lends its
latents to whom control sends, and goes once it has nothing that only it has, or after `drain_s`.
Whatever ends the executor, and a refusal of its name by control, ends `run` with that error.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from typing import NoReturn

import nats.errors
from opentelemetry.trace import Tracer

from gpuworker.config import WorkerSettings
from gpuworker.executor import Executor
from gpuworker.mesh.door import WAIT_US_MAX, Door
from gpuworker.mesh.media_bucket import MediaBucket
from gpuworker.mesh.naming import NameRefused
from gpuworker.mesh.reports import Reports
from hocket.clock import Clock
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import mesh_pb2, types_pb2

log = logging.getLogger(__name__)

_GOODBYE_S = 1.0
_LAST_REPORTS_S = 2.0  # for what is still to be told when the executor has failed
_LEAVE_POLL_US = 20_000


class Agent:
    """One worker's voice on the bus."""

    def __init__(
        self,
        name: str,
        settings: WorkerSettings,
        bus: Bus,
        executor: Executor,
        clock: Clock,
        tracer: Tracer,
        restarts: int = 0,
    ) -> None:
        """`restarts`: how often this worker's supervisor has started it again."""
        self.name = name
        self.incarnation = secrets.token_hex(8)
        self._settings = settings
        self._bus = bus
        self._subjects = Subjects(settings.cluster)
        self._executor = executor
        self._clock = clock
        self._restarts = restarts
        self._door = Door(name, self.incarnation)
        bucket = MediaBucket(
            bus, self._subjects, clock, settings.media_bytes_max, settings.media_kept_s
        )
        self._reports = Reports(name, self.incarnation, bus, self._subjects, clock, tracer, bucket)
        self._beats = 0
        self._stopping = asyncio.Event()
        self._refused = asyncio.Event()
        self._why_refused = ""

    async def run(self) -> None:
        """Serves until `stop` was called and the worker could leave, or until cancelled; then says
        goodbye, so that the lease ends at once.

        Raises `NameRefused`, or what has ended the executor.
        """
        try:
            await self._serve()
        except ExceptionGroup as group:  # of one task group, whose first error ended the others
            error: Exception = group
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            raise error from None

    def stop(self) -> None:
        """Leaves as soon as nothing is lost by it, or after `drain_s`."""
        self._stopping.set()

    async def _serve(self) -> None:
        outbox, subjects = self._reports.outbox, self._subjects
        self._executor.start(outbox.put, outbox.room)
        await self._bus.subscribe(subjects.assign(self.name), mesh_pb2.Assign, self._on_assign)
        await self._bus.subscribe(
            subjects.truncate(self.name), mesh_pb2.Truncate, self._on_truncate
        )
        await self._bus.serve(subjects.latent(self.name), mesh_pb2.LatentRequest, self._on_request)
        try:
            async with asyncio.TaskGroup() as tasks:
                works = (self._beat(), self._reports.run(), self._fail(), self._refuse())
                serving = [tasks.create_task(work) for work in (*works, self._bus.failed())]
                await self._leave()
                for task in serving:
                    task.cancel()
        finally:
            outbox.close()
            if not self._refused.is_set():  # it would be taken for that of the other process
                await self._say_goodbye()

    # ------------------------------------------------------------------------------------------
    # what control says

    async def _on_assign(self, assign: mesh_pb2.Assign) -> None:
        if not self._door.takes_assign(assign, self._executor.progress()[0]):
            return
        if assign.refused and assign.incarnation == self.incarnation:
            self._why_refused = assign.refused
            self._refused.set()
            return
        if not self._executor.accept_term(assign.term):
            return
        self._executor.plan_loads(assign.loads)
        for assignment in assign.assignments:
            self._executor.submit(assignment)
        for request in assign.released:
            self._executor.release(request)
        if not self._stopping.is_set():
            for fetch in assign.fetches:
                self._executor.fetch(fetch)

    async def _on_truncate(self, truncate: mesh_pb2.Truncate) -> None:
        if not self._door.takes_truncate(truncate, self._executor.progress()[0]):
            return
        if self._executor.accept_term(truncate.term):
            self._executor.truncate(truncate)

    async def _on_request(self, asked: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        if not self._door.takes_request(asked):
            why = types_pb2.Failure(reason="INVALID_REQUEST", message="no request for a latent")
            return mesh_pb2.LatentReply(failure=why)
        asked.wait_us = min(asked.wait_us, WAIT_US_MAX)
        return await self._executor.offer_latent(asked)

    # ------------------------------------------------------------------------------------------
    # what ends it

    async def _fail(self) -> None:
        """Ends the worker with its executor, once what that told last is on its way."""
        try:
            await self._executor.failed()
        except Exception as error:
            log.error("the executor has failed: %s", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_REPORTS_S):
                    await self._until_told()
                    await self._bus.flush()
            raise

    async def _refuse(self) -> NoReturn:
        await self._refused.wait()
        raise NameRefused(self.name, self._why_refused)

    async def _until_told(self) -> None:
        while not self._reports.is_idle:
            await self._clock.sleep_until(self._clock.now_us() + _LEAVE_POLL_US)

    async def _leave(self) -> None:
        """Waits for `stop`, and until nothing is lost by leaving, or too long has passed."""
        await self._stopping.wait()
        log.info("told to stop: %s hands over what only it has", self.name)
        await self._publish_heartbeat()
        end_us = self._clock.now_us() + int(self._settings.drain_s * 1e6)
        while not (self._executor.is_idle() and self._reports.is_idle):
            if self._clock.now_us() >= end_us:
                held = len(self._executor.held())
                log.warning("%s leaves with %d latents not handed over", self.name, held)
                return
            await self._executor.tidy()
            await self._clock.sleep_until(self._clock.now_us() + _LEAVE_POLL_US)

    # ------------------------------------------------------------------------------------------
    # heartbeats

    async def _beat(self) -> None:
        while True:
            await self._publish_heartbeat()
            await self._clock.sleep_until(self._clock.now_us() + self._settings.heartbeat_us)
            await self._executor.tidy()

    async def _publish_heartbeat(self, leaving: bool = False) -> None:
        """A broker that is away, or takes no message so large, ends nobody."""
        try:
            await self._bus.publish(
                self._subjects.heartbeat(self.name), self._heartbeat(leaving=leaving)
            )
        except (nats.errors.Error, OSError, TimeoutError) as error:
            log.warning("a heartbeat of %s was not sent: %s", self.name, error)

    def _heartbeat(self, leaving: bool = False) -> mesh_pb2.Heartbeat:
        self._beats += 1
        term, sequence = self._executor.progress()
        return mesh_pb2.Heartbeat(
            worker=self.name,
            incarnation=self.incarnation,
            sequence=self._beats,
            device=self._executor.device,
            models=self._executor.models,
            operations=self._executor.operations,
            latents=self._executor.held(),
            store_address=self._executor.store_address,
            term=term,
            assignment_sequence=sequence,
            leaving=leaving,
            host=self._settings.host,
            pending_sequences=sorted({*self._executor.pending(), *self._reports.pending(term)}),
            memory=self._executor.memory,
            groups=self._executor.groups(),
            stopping=self._stopping.is_set(),
            restarts=self._restarts,
        )

    async def _say_goodbye(self) -> None:
        with suppress(nats.errors.Error, OSError, TimeoutError):  # the lease ends by itself too
            async with asyncio.timeout(_GOODBYE_S):
                await self._publish_heartbeat(leaving=True)
                await self._bus.flush()


def void(_: object) -> None:
    """Takes a result that nobody wants, so that a callback's type stays honest."""
