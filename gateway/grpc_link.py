"""The line over gRPC: control's Attach stream, and the channel that it shares with other calls."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from gateway.line import LinkBroken
from hocket.errors import NotLeader, from_rpc_error
from hocket.rpc.channels import CHANNEL_OPTIONS
from hocket.security.identity import Identity, open_channel
from hocket.v1.control_pb2 import AttachRequest, AttachResponse
from hocket.v1.control_pb2_grpc import ControlServiceStub

if TYPE_CHECKING:
    from hocket.v1.control_pb2_grpc import ControlServiceAsyncStub  # exists for types only


class Doors:
    """Channels to control replicas: to one at a time, since one of them leads."""

    def __init__(
        self,
        interceptors: Sequence[grpc.aio.ClientInterceptor],
        identity: Identity | None = None,
    ) -> None:
        """`interceptors` are for single questions; the line goes without."""
        self._interceptors = interceptors
        self._identity = identity
        self._address = ""
        self._channels: list[grpc.aio.Channel] = []

    async def at(self, address: str) -> ControlServiceAsyncStub:
        """A stub of the replica there; channels to another one are closed, with their calls."""
        await self._move(address)
        return ControlServiceStub(self._channels[0])

    async def dial(self, address: str) -> GrpcLink:
        """A stream to the replica there; whether it answers is seen when one receives."""
        await self._move(address)
        return GrpcLink(ControlServiceStub(self._channels[1]).Attach())

    async def close(self) -> None:
        channels, self._channels = self._channels, []
        for channel in channels:
            await channel.close()

    async def _move(self, address: str) -> None:
        if address == self._address and self._channels:
            return
        await self.close()
        self._address = address
        self._channels = [  # of one connection: grpc shares it among channels of equal options
            open_channel(address, CHANNEL_OPTIONS, self._identity, "control", interceptors)
            for interceptors in (self._interceptors, ())
        ]


class GrpcLink:
    """One Attach stream."""

    def __init__(self, call: Any) -> None:
        self._call = call  # grpc's StreamStreamCall; with interceptors around it has no one type

    async def send(self, message: AttachRequest) -> None:
        try:
            await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise _broken(error) from error
        except asyncio.InvalidStateError as error:  # the stream is over; `receive` says why
            raise LinkBroken("the stream is over") from error
        except asyncio.CancelledError:
            _raise_if_ours()

    async def receive(self) -> AttachResponse:
        try:
            message: object = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _broken(error) from error
        except asyncio.CancelledError:
            _raise_if_ours()
        if not isinstance(message, AttachResponse):
            raise LinkBroken("control ended the stream")
        return message

    async def close(self) -> None:
        self._call.cancel()


def _raise_if_ours() -> NoReturn:
    """A cancel of ours goes on; grpc's own (the channel was closed) means that the link broke."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise
    raise LinkBroken("the channel was closed") from None


def _broken(error: grpc.aio.AioRpcError) -> LinkBroken:
    told = from_rpc_error(error)
    return LinkBroken(str(told), told.leader if isinstance(told, NotLeader) else "")
