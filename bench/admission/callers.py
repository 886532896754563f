"""Callers at the door: many at once, many a second, many that stay."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from bench.admission.tree import MODEL
from hocket.clock import steady_ns
from hocket.errors import HocketError, from_rpc_error
from hocket.rpc.channels import CHANNEL_OPTIONS
from hocket.v1.generation_pb2 import CreateGenerationRequest, GenerateRequest
from hocket.v1.generation_pb2_grpc import GenerationServiceStub
from hocket.v1.types_pb2 import GenerationSpec, Shape, Slo

if TYPE_CHECKING:
    from hocket.v1.generation_pb2_grpc import GenerationServiceAsyncStub  # for types only

_CHANNELS = 8
_CALL_S = 120.0


@dataclass
class CallerStubs:
    """Connections that the callers share."""

    stubs: list[GenerationServiceAsyncStub]
    create: bool  # by CreateGeneration instead of a detached Generate

    async def ask(self, number: int, wanted: GenerateRequest) -> None:
        """Returns once the request is accepted. Raises HocketError."""
        stub = self.stubs[number % len(self.stubs)]
        try:
            if self.create:
                await stub.CreateGeneration(
                    CreateGenerationRequest(request=wanted), timeout=_CALL_S
                )
                return
            call = stub.Generate(wanted, timeout=_CALL_S)
            await call.read()
            call.cancel()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


@dataclass
class Burst:
    """What became of some callers."""

    callers: int
    took_ms: list[float] = field(default_factory=list)  # to accepted
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    span_s: float = 0.0  # from the first call to the last acceptance
    stalls_ms: dict[str, list[float]] = field(default_factory=dict)  # health answers, by service
    cpu_ms: dict[str, float] = field(default_factory=dict)  # processor time, by process


@asynccontextmanager
async def doors(address: str, create: bool) -> AsyncIterator[CallerStubs]:
    """Connected channels to a gateway."""
    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        stubs: list[Any] = []
        for _ in range(_CHANNELS):
            channel = grpc.aio.insecure_channel(address, options=options)
            await stack.enter_async_context(channel)
            await asyncio.wait_for(channel.channel_ready(), _CALL_S)
            stubs.append(GenerationServiceStub(channel))
        yield CallerStubs(stubs, create)


def wish(seed: int, *, steps: int, detached: bool, deadline_s: float = 0.0) -> GenerateRequest:
    """One small picture."""
    return GenerateRequest(
        spec=GenerationSpec(
            model=MODEL, prompt="x", shape=Shape(width=64, height=64), steps=steps, seed=seed
        ),
        slo=Slo(deadline_us=round(deadline_s * 1e6)),
        detached=detached,
    )


async def burst(at: CallerStubs, callers: int, deadline_s: float) -> Burst:
    """So many callers in one instant."""
    found = Burst(callers)
    began_ns = steady_ns()

    async def one(number: int) -> None:
        asked_ns = steady_ns()
        try:
            await at.ask(number, wish(number, steps=4, detached=True, deadline_s=deadline_s))
        except HocketError as error:
            found.refused[_reason(error)] += 1
            return
        now_ns = steady_ns()
        found.took_ms.append((now_ns - asked_ns) / 1e6)
        found.span_s = (now_ns - began_ns) / 1e9

    await asyncio.gather(*(one(number) for number in range(callers)))
    return found


async def paced(at: CallerStubs, callers: int, a_second: float, seconds: float) -> Burst:
    """Callers that ask again and again, so many calls a second together, evenly spread.

    A caller whose call takes longer than its interval asks next when that call ends.
    """
    found = Burst(callers)
    interval_s = callers / a_second
    began_ns = steady_ns()

    async def one(number: int) -> None:
        turn = 0
        while (due_s := (number / callers + turn) * interval_s) < seconds:
            await asyncio.sleep(max(0.0, due_s - (steady_ns() - began_ns) / 1e9))
            if (steady_ns() - began_ns) / 1e9 > 2 * seconds:
                return  # far behind: what was accepted so far says so
            asked_ns = steady_ns()
            try:
                await at.ask(number, wish(number, steps=1, detached=True))
            except HocketError as error:
                found.refused[_reason(error)] += 1
            else:
                found.took_ms.append((steady_ns() - asked_ns) / 1e6)
                found.span_s = (steady_ns() - began_ns) / 1e9
            turn += 1

    await asyncio.gather(*(one(number) for number in range(callers)))
    return found


def _reason(error: HocketError) -> str:
    return f"{error.reason}: {str(error)[:60]}"


@asynccontextmanager
async def probed(services: dict[str, str], into: dict[str, list[float]]) -> AsyncIterator[None]:
    """Measures the health answers of services by name while the block runs."""
    named = [f"{name}={address}" for name, address in services.items()]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.admission.probe", *named, stdin=pipe, stdout=pipe
    )
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        yield
    finally:
        told, _ = await process.communicate(b"")
    into.update(json.loads(told))
