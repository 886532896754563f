"""Which control replicas there are: each says so every second, all hear it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from hocket.clock import Clock
from hocket.launching.endpoints import STANDBY
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import control_pb2

_EVERY_US = 1_000_000
_GONE_US = 4_000_000  # one that was not heard for longer is not told of
_KNOWN_MAX = 64

LEADER = "leader"


@dataclass
class _Heard:
    role: str
    at_us: int


class Replicas:
    """This replica's voice, and what it hears of others."""

    def __init__(
        self, bus: Bus, subjects: Subjects, clock: Clock, address: str, incarnation: str
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._subjects = subjects
        self._subject = subjects.replica(incarnation)
        self._address = address
        self._heard: dict[str, _Heard] = {}
        self.role = STANDBY

    async def run(self) -> NoReturn:
        """Speaks and listens until cancelled."""
        everybody = self._subjects.replica("*")
        await self._bus.subscribe(everybody, control_pb2.ReplicaStatus, self._hear)
        while True:
            await self.announce()
            await self._clock.sleep_until(self._clock.now_us() + _EVERY_US)

    async def announce(self) -> None:
        """Says at once what this replica is."""
        status = control_pb2.ReplicaStatus(address=self._address, role=self.role)
        await self._bus.publish(self._subject, status)

    def alive(self) -> tuple[control_pb2.ReplicaStatus, ...]:
        """Those heard of lately, the leader first."""
        now_us = self._clock.now_us()
        found = [
            control_pb2.ReplicaStatus(
                address=address, role=heard.role, age_us=max(0, now_us - heard.at_us)
            )
            for address, heard in self._heard.items()
            if now_us - heard.at_us < _GONE_US
        ]
        return tuple(sorted(found, key=lambda status: (status.role != LEADER, status.address)))

    async def _hear(self, status: control_pb2.ReplicaStatus) -> None:
        if status.address not in self._heard and len(self._heard) >= _KNOWN_MAX:
            oldest = min(self._heard, key=lambda address: self._heard[address].at_us)
            del self._heard[oldest]
        self._heard[status.address] = _Heard(status.role, self._clock.now_us())
