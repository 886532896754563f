"""What this gateway knows of the cluster, and its line to control.

One channel, which reconnects by itself. When control comes back at another address (its endpoint
file says so) a new channel replaces the old one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import grpc

from hocket.channels import CHANNEL_OPTIONS
from hocket.errors import HocketError, NotReady, from_rpc_error
from hocket.v1.control_pb2 import WatchClusterRequest, WatchClusterResponse
from hocket.v1.control_pb2_grpc import ControlServiceStub
from hocket.v1.generation_pb2 import ModelInfo

if TYPE_CHECKING:
    from hocket.v1.control_pb2_grpc import ControlServiceAsyncStub  # exists for types only

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_S = 0.2
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_FIRST_WORD_S = 3.0


class Cluster:
    """Kept up to date by `watch`, which runs as long as the gateway does."""

    def __init__(
        self,
        address: Callable[[], str],
        interceptors: Sequence[grpc.aio.ClientInterceptor],
        on_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        """`address` names control's door, or "" while it is not known; `on_change(ready)`."""
        self._address_now = address
        self._interceptors = interceptors
        self._on_change = on_change
        self._address = ""
        self._channel: grpc.aio.Channel | None = None
        self._stub: ControlServiceAsyncStub | None = None
        self._models: tuple[ModelInfo, ...] = ()
        self.ready = False  # a worker is alive and a model is served

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        """What living workers serve; raises NotReady when there are none."""
        if not self.ready:
            raise NotReady()
        return self._models

    @property
    def control(self) -> ControlServiceAsyncStub:
        """The stub of control; raises NotReady until its address is known."""
        if self._stub is None:
            raise NotReady("the control plane has not been found yet")
        return self._stub

    async def watch(self) -> None:
        """Follows the cluster's state until cancelled.

        A stream that breaks is opened again at once; only when that fails is the cluster lost.
        """
        while True:
            heard = False
            try:
                await self._connect()
                stream = self.control.WatchCluster(WatchClusterRequest())
                async with asyncio.timeout(_FIRST_WORD_S):
                    first = await stream.read()
                if isinstance(first, WatchClusterResponse):
                    heard = True
                    await self._take(first)
                    async for state in stream:
                        await self._take(state)
            except grpc.aio.AioRpcError as error:
                log.debug("control: %s", from_rpc_error(error))
            except (HocketError, TimeoutError) as error:
                log.debug("control: %s", error or "does not answer")
            if not heard:
                await self._set_ready(False)
                await asyncio.sleep(_RETRY_S)

    async def ask(
        self, question: Callable[[ControlServiceAsyncStub], Awaitable[T]], timeout_s: float
    ) -> T:
        """Asks control, and asks again when the connection is lost or control moves.

        Only for questions that may be asked twice. Raises control's own typed errors, and NotReady
        when it does not answer within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        return await question(self.control)
                    except grpc.aio.AioRpcError as error:
                        if error.code() not in _LOST:
                            raise from_rpc_error(error) from error
                    except asyncio.CancelledError:
                        # grpc raises it too when `_connect` closes the channel under a call.
                        task = asyncio.current_task()
                        if task is None or task.cancelling():
                            raise
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            raise NotReady("the control plane does not answer") from None

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def _connect(self) -> None:
        address = self._address_now() or self._address
        if address == self._address:
            return
        previous, self._address = self._channel, address
        self._channel = grpc.aio.insecure_channel(
            address, options=CHANNEL_OPTIONS, interceptors=self._interceptors
        )
        self._stub = ControlServiceStub(self._channel)
        log.info("control is at %s", address)
        if previous is not None:
            await previous.close()

    async def _take(self, state: WatchClusterResponse) -> None:
        self._models = tuple(state.models)
        working = any(worker.state != "draining" for worker in state.workers)
        await self._set_ready(working and bool(self._models))

    async def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            log.info("the cluster is %s", "ready" if ready else "not ready")
            await self._on_change(ready)
