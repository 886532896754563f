"""The cluster as gateways and operators see it: one message, made once for all who watch.

A join or a loss is told within a quarter of a second; a thousand of them take no more messages than
one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from control.driver import Driver
from control.requests.records import Records
from control.scheduler.books.quarantine import Quarantined
from control.scheduler.books.stragglers import Slowness
from control.scheduler.core import Scheduler
from control.workers.leases import Lease, Leases
from hocket.clock import Clock
from hocket.v1 import control_pb2, generation_pb2

_EVERY_US_MIN = 250_000  # between two messages to one watcher
_EVERY_US_MAX = 1_000_000  # a watcher hears at least this often
_AT_ONCE = 64  # workers, before others on the event loop have a turn


class ClusterView:
    """What living workers are and serve, and how the cluster does."""

    def __init__(
        self,
        driver: Driver,
        records: Records,
        leases: Leases,
        clock: Clock,
        signal: Signal,
        *,
        term: int,
        policy: str,
        replicas: Callable[[], Sequence[control_pb2.ReplicaStatus]] = tuple,
        troubles: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._driver = driver
        self._records = records
        self._leases = leases
        self._clock = clock
        self._signal = signal
        self._term = term
        self._policy = policy
        self._replicas = replicas
        self._troubles = troubles
        self._served: dict[str, generation_pb2.ModelInfo] | None = None
        self._changes = 0
        self._changed = asyncio.Condition()
        self._making = asyncio.Lock()
        self._made: tuple[int, int, control_pb2.WatchClusterResponse] | None = None

    def served(self) -> Mapping[str, generation_pb2.ModelInfo]:
        """Models that living workers serve, by name."""
        if self._served is None:
            self._served = {model.name: model for model in self._leases.models()}
        return self._served

    def admitted(self) -> Mapping[str, generation_pb2.ModelInfo]:
        """Models that a request may name: those, and where requests wake models, others that
        workers served of late.
        """
        return {**self._signal.wakeable(), **self.served()}

    async def changed(self) -> None:
        """Who lives, or what it serves, is another: wakes every watcher."""
        self._served = None
        self._signal.see_models()
        self._changes += 1
        async with self._changed:
            self._changed.notify_all()

    async def watch(self) -> AsyncIterator[control_pb2.WatchClusterResponse]:
        """The state now, after changes, and at least once a second."""
        while True:
            seen = self._changes
            yield await self._state()
            rested_us = self._clock.now_us() + _EVERY_US_MIN
            await self._change_after(seen)
            await self._clock.sleep_until(rested_us)

    async def _change_after(self, seen: int) -> None:
        async with self._changed:
            try:
                async with asyncio.timeout(_EVERY_US_MAX / 1e6):
                    await self._changed.wait_for(lambda: self._changes != seen)
            except TimeoutError:
                return  # the counts in the message may have changed all the same

    async def _state(self) -> control_pb2.WatchClusterResponse:
        async with self._making:
            now_us = self._clock.now_us()
            if self._made is not None:
                changes, made_us, message = self._made
                if changes == self._changes and now_us - made_us < _EVERY_US_MIN:
                    return message
            changes = self._changes
            message = await self._make(now_us)
            self._made = changes, now_us, message
            return message

    async def _make(self, now_us: int) -> control_pb2.WatchClusterResponse:
        known = await self._driver.ask(_Known.of)
        alone = self._latents_alone()
        message = control_pb2.WatchClusterResponse(
            term=self._term,
            requests_open=self._records.open_count,
            policy=self._policy,
            models=self._signal.listed(),
            pools=self._signal.statuses(),
            pools_settling=self._signal.settling,
            wake_models=self._signal.wakes,
            replicas=self._replicas(),
            promises=self._records.figures.to_message(),
            troubles=self._troubles(),
        )
        for number, (name, lease) in enumerate(sorted(self._leases.alive.items()), 1):
            message.workers.append(self._worker(name, lease, known, alone[name], now_us))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        return message

    def _worker(
        self, name: str, lease: Lease, known: _Known, alone: int, now_us: int
    ) -> control_pb2.WorkerStatus:
        beat, slowness = lease.heartbeat, known.slow.get(name)
        state, note = known.state(name, lease, now_us)
        return control_pb2.WorkerStatus(
            name=name,
            device=beat.device.name or beat.device.kind,
            state=state,
            heartbeat_age_us=max(0, now_us - lease.seen_us),
            memory_used_bytes=beat.device.memory_used_bytes,
            memory_total_bytes=beat.device.memory_total_bytes,
            memory=beat.memory,
            slowdown=1.0 if slowness is None else slowness.factor,
            latents_alone=alone,
            restarts=beat.restarts,
            note=note,
        )

    def _latents_alone(self) -> Counter[str]:
        """By worker: latents of open requests that no other living worker holds."""
        holders: dict[str, str | None] = {}
        for name, lease in self._leases.alive.items():
            for held in lease.heartbeat.latents:
                holders[held.request_id] = None if held.request_id in holders else name
        open_ones = (n for r, n in holders.items() if n is not None and self._records.is_open(r))
        return Counter(open_ones)


class Signal(Protocol):
    """The scaling signal, as far as this tells of it (see control/scaling/signal.py)."""

    @property
    def wakes(self) -> bool: ...

    @property
    def settling(self) -> bool: ...

    def see_models(self) -> None: ...

    def listed(self) -> Sequence[generation_pb2.ModelInfo]: ...

    def wakeable(self) -> Mapping[str, generation_pb2.ModelInfo]: ...

    def statuses(self) -> Sequence[control_pb2.PoolStatus]: ...


@dataclass(frozen=True, slots=True)
class _Known:
    """What the scheduler thinks of its workers."""

    slow: Mapping[str, Slowness]
    draining: frozenset[str]
    kept_out: Mapping[str, Quarantined]

    @classmethod
    def of(cls, scheduler: Scheduler) -> _Known:
        draining = frozenset(scheduler.draining())
        return cls(scheduler.slow_workers(), draining, scheduler.quarantined())

    def state(self, name: str, lease: Lease, now_us: int) -> tuple[str, str]:
        """A worker's state in a word, and why it gets no work, where the word does not say it."""
        if lease.heartbeat.stopping:
            return "draining", "it was told to stop"
        if name in self.draining:
            return "draining", ""
        if name in self.kept_out:
            out = self.kept_out[name]
            wait_s = max(0, out.retry_us - now_us) / 1e6
            return "suspect", f"{out.strikes} failures of its own; next try in {wait_s:.0f} s"
        if lease.suspect:
            return "suspect", ""
        slowness = self.slow.get(name)
        return ("slow" if slowness is not None and slowness.avoided else "alive"), ""
