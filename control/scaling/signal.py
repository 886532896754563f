"""The scaling signal of one leader: looks every second, and says how many workers are wanted.

    admission ─ newcomers ─┐
    records ── outcomes ───┤ look ──▶ pools ──▶ status, metrics, KEDA (by the gateways)
    scheduler ── work ─────┘            │
    leases ── models, kinds of GPU      └──▶ requests that waited too long for a model end

A look asks the scheduler one question, behind all facts that came before it, and rests at least
fifty times as long as the answer took. A leader that has just begun does not look before its
workers can have been heard: it would take those that it does not know of for gone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from control.driver import Driver
from control.requests.lifecycle import LifecycleState
from control.requests.records import Record, Records
from control.scaling.newcomers import Newcomers
from control.scaling.pools import Outcomes, PoolReading, Pools
from control.scaling.seen_models import ModelsSeen
from control.scaling.settings import ScalingSettings
from control.scheduler.books.lifecycle import JobState
from control.scheduler.core import Scheduler
from control.scheduler.outlook.demand import PoolWork
from control.scheduler.values import CancelRequested
from control.scheduler.views import JobView
from control.workers.leases import Leases
from control.workflows.compiled import models_of
from hocket.clock import Clock
from hocket.v1 import control_pb2, generation_pb2, types_pb2
from hocket.workflows.catalogue import OPERATIONS

log = logging.getLogger(__name__)

LOOK_EVERY_US = 1_000_000
_RESTS = 50


@dataclass(frozen=True, slots=True)
class WakeSettings:
    """Requests for models that no living worker serves."""

    models: bool = False  # they are accepted, and wait for a worker …
    wait_us: int = 600_000_000  # … so long, where they have no deadline
    kept_us: int = 7 * 86_400_000_000  # a model is listed so long after its last worker was seen


@dataclass(slots=True)
class ScalingSignal:
    """Runs while its leader leads."""

    driver: Driver
    records: Records
    leases: Leases
    clock: Clock
    scaling: ScalingSettings
    wake: WakeSettings
    unix_us: Callable[[], int]  # by the broker's clock
    settle_us: int = 0  # so long after its start a leader may not know all of its workers
    best_effort_us: int = 120_000_000  # best effort is due so long after its last progress
    readings: tuple[PoolReading, ...] = ()
    settling: bool = True  # there was no look yet
    catalogue: ModelsSeen = field(init=False)
    newcomers: Newcomers = field(init=False)
    _pools: Pools = field(init=False)
    # Requests that wait for a model without a worker: which, and since when.
    _waits_us: dict[str, tuple[str, int]] = field(default_factory=dict)
    _decided: Counter[str] = field(default_factory=Counter)  # as of the last look
    _missed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.catalogue = ModelsSeen(self.wake.kept_us)
        self.newcomers = Newcomers(self.wakeable, self.scaling.start_us)
        self._pools = Pools(self.scaling)
        self.see_models()

    def statuses(self) -> list[control_pb2.PoolStatus]:
        """Of each pool, as of the last look."""
        return [_status(reading) for reading in self.readings]

    @property
    def wakes(self) -> bool:
        """Requests for models without a worker are accepted."""
        return self.wake.models

    def see_models(self) -> None:
        """Takes what living workers serve."""
        beats = (lease.heartbeat for lease in self.leases.alive.values())
        self.catalogue.see(beats, self.unix_us())

    def listed(self) -> Sequence[generation_pb2.ModelInfo]:
        """Models that workers serve or served of late, each with its number of workers."""
        return self.catalogue.listed()

    def wakeable(self) -> Mapping[str, generation_pb2.ModelInfo]:
        """Models without a living worker that a request may name."""
        return self.catalogue.asleep() if self.wake.models else {}

    async def run(self) -> NoReturn:
        """Looks until cancelled."""
        await self.clock.sleep_until(self.clock.now_us() + self.settle_us)
        while True:
            took_us = await self.look()
            rest_us = max(LOOK_EVERY_US, _RESTS * took_us)
            await self.clock.sleep_until(self.clock.now_us() + rest_us)

    async def look(self) -> int:
        """Works out every pool's wanted workers as of now; for how long it held up planning."""
        self.see_models()
        newcomers, late = self.newcomers.take()
        kinds, due_us = self.catalogue.kinds(), self.best_effort_us
        stamped_us = self.driver.stamp()

        def ask(scheduler: Scheduler) -> tuple[dict[tuple[str, str], PoolWork], int]:
            began_us = self.clock.now_us()
            works = scheduler.demand(newcomers, kinds, stamped_us, due_us)
            return works, self.clock.now_us() - began_us

        works, took_us = await self.driver.ask_behind(ask)
        self.readings = self._pools.step(works, self._outcomes(late), kinds, stamped_us)
        self.settling = False
        if self.wake.models:
            await self._end_waits(stamped_us)
        return took_us

    def _outcomes(self, late: Counter[str]) -> dict[str, Outcomes]:
        """Since the last look, by model."""
        figures = self.records.figures
        decided = figures.decided - self._decided + late
        missed = figures.missed - self._missed + late
        self._decided, self._missed = figures.decided.copy(), figures.missed.copy()
        return {model: Outcomes(decided[model], missed[model]) for model in decided}

    async def _end_waits(self, now_us: int) -> None:
        """No worker came for them in time: for what they begin with, or for a later call."""
        asleep = self.catalogue.asleep()
        open_ones = [self.records.get(request) for request in self.records.open_ids() if asleep]
        may_wait = [
            record
            for record in open_ones
            if record is not None and not asleep.keys().isdisjoint(models_of(record.submit))
        ]

        def ask(scheduler: Scheduler) -> dict[str, str]:
            views = ((record, scheduler.job(record.id)) for record in may_wait)
            models = ((r.id, _awaited(r, view, asleep)) for r, view in views if view is not None)
            return {request: model for request, model in models if model}

        waits = await self.driver.ask_behind(ask) if may_wait else {}
        self._waits_us = {
            request: (model, self._since_us(request, model, now_us))
            for request, model in waits.items()
        }
        for request, (model, since_us) in self._waits_us.items():
            record = self.records.get(request)
            if record is None or not record.is_open:
                continue
            deadline_us = record.submit.request.slo.deadline_us
            wait_us = deadline_us or self.wake.wait_us
            if now_us - (record.accepted_us if deadline_us else since_us) >= wait_us:
                log.warning("no worker of %s came for request %s", model, request)
                cancel = CancelRequested(at_us=self.driver.stamp(), request=request)
                self.driver.post(cancel, _never_came(model, wait_us))

    def _since_us(self, request: str, model: str, now_us: int) -> int:
        """When its wait for that model began, as far as looks told."""
        before = self._waits_us.get(request)
        if before is not None and before[0] == model:
            return before[1]
        record = self.records.get(request)
        begun = record is None or record.state is not LifecycleState.PROMISED
        return now_us if begun or record is None else record.accepted_us


def _awaited(record: Record, view: JobView, asleep: Container[str]) -> str:
    """The model without a worker that a call which is due needs, or the pass that it is in; empty:
    there is none.
    """
    if view.outstanding:
        return ""
    models = {
        node.id: node.model or record.spec.model if OPERATIONS[node.op].part else ""
        for node in record.submit.workflow.nodes
    }
    due = [node for node, state in view.nodes.items() if state == JobState.READY.value]
    stepped = {node.id for node in record.submit.workflow.nodes if OPERATIONS[node.op].stepped}
    left = [node for node, state in view.nodes.items() if state != JobState.DONE.value]
    due += [node for node in left if node in stepped][:1]
    needed = [models.get(node, record.spec.model) for node in due]
    return next((model for model in needed if model in asleep), "")


def _never_came(model: str, wait_us: int) -> types_pb2.Failure:
    return types_pb2.Failure(
        reason="NO_WORKERS",
        message=f"no worker that serves {model!r} came within {wait_us / 1e6:g} s",
    )


def _status(reading: PoolReading) -> control_pb2.PoolStatus:
    key, demand, wanted = reading.key, reading.demand, reading.wanted
    return control_pb2.PoolStatus(
        model=key.model,
        gpu=key.gpu,
        workers=demand.workers,
        wanted=wanted.workers,
        reason=wanted.reason,
        needed=wanted.needed,
        offered=wanted.offered,
        work_us=demand.work_us,
        late_share=wanted.late_share,
        requests=demand.requests,
    )
