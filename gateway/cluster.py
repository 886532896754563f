"""What this gateway knows of the cluster, and its single questions to control.

The line (`gateway.line`) finds the leader; everything here goes to whom it found.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import grpc

from gateway.grpc_link import Doors
from hocket.errors import BrokerAway, ControlUnavailable, NotLeader, NoWorkers, from_rpc_error
from hocket.v1.control_pb2 import (
    CancelRequestRequest,
    DeleteRequestRequest,
    GetRequestRequest,
    ListRequestsRequest,
    ListRequestsResponse,
    RequestStatus,
    WatchClusterRequest,
    WatchClusterResponse,
)
from hocket.v1.generation_pb2 import ModelInfo

if TYPE_CHECKING:
    from hocket.v1.control_pb2_grpc import ControlServiceAsyncStub  # exists for types only

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_S = 0.1
_ASK_S = 10.0
_SILENCE_S_MAX = 5.0  # control says how the cluster stands at least every second
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class ClusterWatch:
    """Kept up to date by `watch`, which runs as long as the gateway does."""

    def __init__(
        self,
        doors: Doors,
        on_change: Callable[[bool], Awaitable[None]],
        broker_away: Callable[[], bool] = lambda: False,
    ) -> None:
        """`on_change(ready)` hears when the cluster begins or ceases to be able to serve."""
        self._doors = doors
        self._on_change = on_change
        self._broker_away = broker_away
        self._leader = ""
        self._moved = asyncio.Event()
        self._state: WatchClusterResponse | None = None
        self._models: tuple[ModelInfo, ...] = ()  # that requests may name, of that state
        self._is_working = False
        self._is_fresh = False  # control is heard now
        self._heard = asyncio.Event()  # set, and replaced, by each of its words
        self.ready = False  # control leads, and requests are taken: a worker, or a model to wake

    @property
    def models(self) -> tuple[ModelInfo, ...]:
        """What requests may name, as control said last: while it is away for a moment its last
        word holds. Raises NoWorkers, or ControlUnavailable where control has not said anything."""
        state = self._known()
        if not self._is_working:
            raise NoWorkers("every worker is drained") if state.workers else NoWorkers()
        return self._models

    @property
    def listed(self) -> tuple[ModelInfo, ...]:
        """The same, and models that workers served of late, with 0 workers. Raises the same, but
        NoWorkers only where there is no such model."""
        state = self._known()
        return tuple(state.models) or self.models

    @property
    def fresh(self) -> WatchClusterResponse:
        """Control's last word. Raises ControlUnavailable while it cannot be heard."""
        if not self._is_fresh:
            raise ControlUnavailable()
        return self._known()

    async def heard(self) -> None:
        """Returns when control has said something more."""
        await self._heard.wait()

    def _known(self) -> WatchClusterResponse:
        if self._state is None:
            raise ControlUnavailable("the control plane has not been found yet")
        return self._state

    def leader_is(self, address: str) -> None:
        """The line stands, or is down (empty)."""
        self._leader = address
        self._moved.set()

    async def watch(self) -> None:
        """Follows the cluster's state until cancelled."""
        while True:
            self._moved.clear()
            if not self._leader:
                await self._set_ready(False)
                await self._moved.wait()
                continue
            try:
                await self._follow(self._leader)
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                log.debug("watching the cluster: %s", error)
            except asyncio.CancelledError:
                _raise_if_cancelled()
            await asyncio.sleep(_RETRY_S)

    async def ask(
        self, question: Callable[[ControlServiceAsyncStub], Awaitable[T]], timeout_s: float = _ASK_S
    ) -> T:
        """Asks the leader, and asks again when the connection is lost or another one leads.

        Only for questions that may be asked twice. Raises control's own typed errors, and when it
        does not answer within `timeout_s` BrokerAway (what it answers must be stored first) or
        ControlUnavailable.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if self._leader:
                        try:
                            return await question(await self._doors.at(self._leader))
                        except grpc.aio.AioRpcError as error:
                            told = from_rpc_error(error)
                            if error.code() not in _LOST and not isinstance(told, NotLeader):
                                raise told from error
                        except asyncio.CancelledError:
                            _raise_if_cancelled()
                    await asyncio.sleep(_RETRY_S)
        except TimeoutError:
            raise (BrokerAway() if self._broker_away() else ControlUnavailable()) from None

    async def get(self, request_id: str, tenant: str | None) -> RequestStatus:
        """State of one request; raises UnknownRequest."""
        asked = GetRequestRequest(request_id=request_id, tenant=tenant)
        return (await self.ask(lambda control: control.GetRequest(asked))).status

    async def cancel(self, request_id: str, tenant: str | None) -> bool:
        """Whether the request had not ended before; raises UnknownRequest."""
        asked = CancelRequestRequest(request_id=request_id, tenant=tenant)
        return (await self.ask(lambda control: control.CancelRequest(asked))).was_running

    async def delete(self, request_id: str, tenant: str | None) -> None:
        """Lets control forget an ended request; raises UnknownRequest, NotFinished."""
        asked = DeleteRequestRequest(request_id=request_id, tenant=tenant)
        await self.ask(lambda control: control.DeleteRequest(asked))

    async def list(self, request: ListRequestsRequest) -> ListRequestsResponse:
        """One page of requests."""
        return await self.ask(lambda control: control.ListRequests(request))

    async def _follow(self, leader: str) -> None:
        stream = (await self._doors.at(leader)).WatchCluster(WatchClusterRequest())
        try:
            while self._leader == leader:
                async with asyncio.timeout(_SILENCE_S_MAX):
                    state = await stream.read()
                if not isinstance(state, WatchClusterResponse):
                    return
                self._state, self._is_fresh = state, True
                self._models = tuple(state.models) if state.wake_models else _served(state)
                self._is_working = _works(state)
                self._heard.set()
                self._heard = asyncio.Event()
                await self._set_ready(self._is_working)
        finally:
            self._is_fresh = False
            stream.cancel()

    async def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            log.info("the cluster is %s", "ready" if ready else "not ready")
            await self._on_change(ready)


def _works(state: WatchClusterResponse) -> bool:
    if state.wake_models and state.models:
        return True
    working = any(worker.state != "draining" for worker in state.workers)
    return working and bool(_served(state))


def _served(state: WatchClusterResponse) -> tuple[ModelInfo, ...]:
    """Models that living workers serve."""
    return tuple(m for m in state.models if m.workers or not m.HasField("workers"))


def _raise_if_cancelled() -> None:
    # grpc raises it too when a channel is closed under a call.
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise
