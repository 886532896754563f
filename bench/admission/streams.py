"""What an open stream costs: memory of gateway and control with many callers that stay."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import msgspec

from bench.admission.callers import CallerStubs, wish
from bench.admission.tree import Started, rss_kib
from hocket.clock import steady_ns

_WAVE = 20
_SETTLE_S = 5.0
_STEPS = 1000


class Streams(msgspec.Struct, frozen=True):
    """Memory in KiB."""

    wanted: int
    open: int
    refused: int
    opening_s: float
    before_kib: dict[str, int]
    open_kib: dict[str, int]
    after_kib: dict[str, int]  # some seconds after all callers have gone
    a_stream_kib: dict[str, float]


async def measure(at: CallerStubs, mesh: Started, wanted: int, limit_s: float) -> Streams:
    """Opens `wanted` streams, in small waves, as many as come within the limit; then closes all."""
    before = _memory(mesh)
    began_ns = steady_ns()
    calls: list[Any] = []
    refused = 0

    async def one(number: int) -> bool:
        call = at.stubs[number % len(at.stubs)].Generate(wish(number, steps=_STEPS, detached=False))
        calls.append(call)
        try:
            return (await call.read()) is not grpc.aio.EOF
        except grpc.aio.AioRpcError:
            return False

    number = 0
    while number < wanted and (steady_ns() - began_ns) / 1e9 < limit_s:
        wave = range(number, min(wanted, number + _WAVE))
        refused += (await asyncio.gather(*(one(n) for n in wave))).count(False)
        number = wave.stop
    opening_s = (steady_ns() - began_ns) / 1e9
    await asyncio.sleep(_SETTLE_S)
    there = _memory(mesh)
    for call in calls:
        call.cancel()
    await asyncio.sleep(2 * _SETTLE_S)
    count = max(1, number - refused)
    return Streams(
        wanted=wanted,
        open=number - refused,
        refused=refused,
        opening_s=round(opening_s, 1),
        before_kib=before,
        open_kib=there,
        after_kib=_memory(mesh),
        a_stream_kib={name: round((there[name] - before[name]) / count, 1) for name in before},
    )


def _memory(mesh: Started) -> dict[str, int]:
    return {name: rss_kib(pid) for name, pid in mesh.pids.items()}
