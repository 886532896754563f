"""`python -m bench.admission.probe NAME=ADDRESS …`: how long event loops stand still.

Asks each health service every 50 ms until its input ends; then it writes, by name, the answer times
in milliseconds as JSON. Its first line, empty, says that all have answered once. A process of its
own: the load generator's loop stands still, too.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hocket.clock import steady_ns

_EVERY_S = 0.05
_ANSWER_S = 30.0


async def _ask(address: str, took_ms: list[float]) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            began_ns = steady_ns()
            try:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.CANCELLED:
                    raise
            took_ms.append((steady_ns() - began_ns) / 1e6)
            await asyncio.sleep(_EVERY_S)


async def _probe(named: dict[str, str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in named}
    asking = [asyncio.ensure_future(_ask(named[name], found[name])) for name in named]
    while not all(found.values()):  # noqa: ASYNC110  each answer is a poll already
        await asyncio.sleep(_EVERY_S)
    print(flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    return found


if __name__ == "__main__":
    pairs = dict(argument.split("=", 1) for argument in sys.argv[1:])
    print(json.dumps(asyncio.run(_probe(pairs))))
