"""A client's connections to gateways: one is used, the others stand by.

What a gateway says is the answer. When it says nothing any more (its process died, the connection
broke) the same is asked again, of the next gateway, for a while: only what may be asked twice goes
through here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.longrunning.operations_pb2_grpc import OperationsStub
from opentelemetry.trace import TracerProvider

from hocket.clock import SystemClock
from hocket.errors import CallFailed, GatewayUnreachable, HocketError, from_rpc_error
from hocket.rpc.channels import CHANNEL_OPTIONS
from hocket.security.caller import Credentials
from hocket.tracing.telemetry import client_interceptors
from hocket.v1.generation_pb2_grpc import GenerationServiceStub
from hocket.v1.workflows_pb2_grpc import WorkflowServiceStub

if TYPE_CHECKING:
    # These exist for types only.
    from hocket.v1.generation_pb2_grpc import GenerationServiceAsyncStub
    from hocket.v1.workflows_pb2_grpc import WorkflowServiceAsyncStub

T = TypeVar("T")

_BREAKS = ("CANCELLED", "UNKNOWN", "INTERNAL")  # without details of ours: nobody's answer
_PAUSES_US = (0, 100_000, 200_000, 400_000, 800_000, 1_000_000)


class Deadline:
    """How long a caller listens, over all tries together."""

    def __init__(self, timeout_s: float | None) -> None:
        self._clock = SystemClock()
        self._at_us = None if timeout_s is None else self._clock.now_us() + round(timeout_s * 1e6)

    @property
    def left_s(self) -> float | None:
        """For grpc's `timeout`; None: no bound."""
        if self._at_us is None:
            return None
        return max(0.0, (self._at_us - self._clock.now_us()) / 1e6)


class Gateways:
    """Channels to one or several gateways."""

    def __init__(
        self,
        addresses: str,
        tracer_provider: TracerProvider | None,
        patience_s: float,
        credentials: Credentials | None = None,
    ) -> None:
        """`addresses` is "host:port" or several with commas; `patience_s`: how long a connection
        that was lost is looked for."""
        self._credentials = credentials or Credentials()
        self._addresses = [part.strip() for part in addresses.split(",") if part.strip()]
        assert self._addresses, "no address of a gateway"
        self._interceptors = client_interceptors(tracer_provider)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._turn = 0
        self._clock = SystemClock()
        self._patience_us = round(patience_s * 1e6)
        self._was_there = False  # any of them, ever

    @property
    def generation(self) -> GenerationServiceAsyncStub:
        """The gateway that is used now."""
        return GenerationServiceStub(self._channel())

    @property
    def workflows(self) -> WorkflowServiceAsyncStub:
        """The same one's WorkflowService."""
        return WorkflowServiceStub(self._channel())

    @property
    def operations(self) -> Any:
        """The same one's google.longrunning.Operations (whose stubs come without types)."""
        return OperationsStub(self._channel())

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """An answer to a single question; raises typed errors."""
        search = _Search(self)
        while True:
            try:
                answer = await question()
                search.found()
                return answer
            except grpc.aio.AioRpcError as error:
                await search.goes_on(from_rpc_error(error))

    async def stream(
        self, open_: Callable[[], Any], *, enough: Callable[[], bool] = lambda: False
    ) -> AsyncGenerator[Any, None]:
        """The messages of a stream that `open_` begins anew, from where its caller stands, each
        time that it breaks; a stream that breaks when `enough()` holds is over."""
        search = _Search(self)
        while True:
            call = open_()
            try:
                async for response in call:
                    search.found()
                    yield response
                return
            except grpc.aio.AioRpcError as error:
                told = from_rpc_error(error)
                if enough() and is_break(told):
                    return
                await search.goes_on(told)
            finally:
                call.cancel()  # no effect after the end

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    def _channel(self) -> grpc.aio.Channel:
        address = self._addresses[self._turn % len(self._addresses)]
        if address not in self._channels:
            self._channels[address] = self._credentials.channel(
                address, CHANNEL_OPTIONS, self._interceptors
            )
        return self._channels[address]

    def _next(self) -> None:
        self._turn += 1


class _Search:
    """How long a gateway is looked for: a lost one for a while, one that never was not at all."""

    def __init__(self, gateways: Gateways) -> None:
        self._gateways = gateways
        self._tries = 0
        self._until_us = 0

    def found(self) -> None:
        self._tries, self._gateways._was_there = 0, True

    async def goes_on(self, error: HocketError) -> None:
        """Returns when it is time for another try; raises `error` when it is none of a break."""
        if not is_break(error):
            raise error
        clock, gateways = self._gateways._clock, self._gateways
        if self._tries == 0:
            self._until_us = clock.now_us() + gateways._patience_us
        self._tries += 1
        gateways._was_there = gateways._was_there or not _never_connected(error)
        tried_all = self._tries >= len(gateways._addresses)
        if clock.now_us() >= self._until_us or (tried_all and not gateways._was_there):
            raise error
        gateways._next()
        pause_us = _PAUSES_US[min(self._tries - 1, len(_PAUSES_US) - 1)]
        await clock.sleep_until(clock.now_us() + pause_us)


def is_break(error: HocketError) -> bool:
    """Whether no gateway answered, as against one that said no."""
    if isinstance(error, CallFailed):
        task = asyncio.current_task()
        ours = error.code == "CANCELLED" and task is not None and task.cancelling() > 0
        return error.code in _BREAKS and not ours
    return isinstance(error, GatewayUnreachable)


def _never_connected(error: HocketError) -> bool:
    return isinstance(error, GatewayUnreachable) and "failed to connect" in error.message
