"""Callers: each speaks the public API through a gateway, as a client library does.

When its connection breaks it tries again through the other gateway: with its idempotency key, or by
watching the request that it was told of, from the cursor that it has seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import grpc
from google.longrunning import operations_pb2 as lro
from google.longrunning import operations_pb2_grpc
from google.protobuf.message import Message

from hocket.errors import (
    BrokerUnavailable,
    CallFailed,
    NotLeader,
    NotReady,
    Refused,
    RequestFailed,
    UnknownRequest,
    from_rpc_error,
)
from hocket.v1 import control_pb2, control_pb2_grpc, generation_pb2, generation_pb2_grpc

from .loop import SimulatedProcess
from .roles import gateway_address
from .rpc.link import BROKEN, WINDOW
from .stories import ENDINGS, GATEWAYS, CallerEvent, Story

if TYPE_CHECKING:
    from .world import World

NARROW = 4  # messages that a slow caller's connection holds
_ASLEEP_S = 2.5  # in which more happens to its request than a mailbox holds
_FULL = ("QUEUE_FULL", "OVERLOADED")
_AGAIN_S = 0.3
_ANSWER_S = 20.0
_OVER = (*ENDINGS, "refused")
_NO_ANSWER = NotReady | NotLeader | BrokerUnavailable | CallFailed


class SimulatedCallers:
    """All callers of a world; one process, which no fault hits."""

    def __init__(self, world: World, stories: list[Story]) -> None:
        self._world = world
        self.stories = stories
        self._channels: dict[tuple[str, int], grpc.aio.Channel] = {}

    async def run(self, world: World, process: SimulatedProcess) -> None:
        async with asyncio.TaskGroup() as tasks:
            for story in self.stories:
                tasks.create_task(self._play(story), name=story.name)
        world.answered.set()

    @property
    def over(self) -> bool:
        return all(story.over for story in self.stories)

    async def _play(self, story: Story) -> None:
        await asyncio.sleep(max(0, story.starts_us - self._world.now_us) / 1e6)
        behaviours: dict[str, Callable[[Story], Coroutine[Any, Any, None]]] = {
            "wait": self._wait,
            "leave": self._leave,
            "move": self._move,
            "cancel": self._cancel,
            "forget": self._forget,
            "watch": self._watch,
            "delete": self._delete,
            "repeat": self._repeat,
            "burst": self._burst,
            "slow": self._slow,
        }
        await behaviours[story.behaviour](story)
        story.over = True

    # behaviours

    async def _wait(self, story: Story) -> None:
        """Wants its picture, whatever happens."""
        rng = story.draw()
        over = await self._hear(story, self._generate(story))
        while not over:
            story.gateway = (story.gateway + 1) % GATEWAYS
            await asyncio.sleep(_AGAIN_S)
            if story.request and (not story.key or rng.random() < 0.5):
                over = await self._hear(story, self._watched(story))
            elif story.key:
                over = await self._hear(story, self._generate(story))
            else:
                story.lost = over = True

    async def _leave(self, story: Story) -> None:
        """Gives up after some time."""
        await self._for_a_while(story)
        if story.ending is None:
            story.left_us = self._world.now_us

    async def _move(self, story: Story) -> None:
        """Calls again through the other gateway, with the same key, around the end of its call."""
        rng = story.draw()
        first = asyncio.ensure_future(self._for_a_while(story))
        if rng.random() < 0.5:
            await first
            await asyncio.sleep(rng.choice((0.0, 0.05, 1.0, 4.0)))
        else:
            await asyncio.sleep(rng.random() * 0.3)
        story.gateway = (story.gateway + 1) % GATEWAYS
        await asyncio.gather(first, self._wait(story))

    async def _cancel(self, story: Story) -> None:
        """Says Cancel once it was accepted, and waits for the end."""
        waiting = asyncio.ensure_future(self._wait(story))
        while not story.request and not waiting.done():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)
        await asyncio.sleep(story.draw().random() * 0.4)
        while not waiting.done():
            request = generation_pb2.CancelRequest(request_id=story.request)
            try:
                await self._stub(story.gateway).Cancel(request, timeout=_ANSWER_S)
            except grpc.aio.AioRpcError as error:
                self._failed(story, error)
                await asyncio.sleep(_AGAIN_S)
            else:
                story.cancelled_us = self._world.now_us
                break
        await waiting

    async def _forget(self, story: Story) -> None:
        """Starts it detached and goes away once it was accepted."""
        async for told in self._generate(story):
            if told.kind == "accepted":
                return

    async def _watch(self, story: Story) -> None:
        """Creates it, and watches it to its end."""
        if not await self._create(story):
            return
        while not await self._hear(story, self._watched(story)):
            story.gateway = (story.gateway + 1) % GATEWAYS
            await asyncio.sleep(_AGAIN_S)

    async def _delete(self, story: Story) -> None:
        """Creates it, waits for its end, has it forgotten."""
        if not await self._create(story):
            return
        name = f"operations/{story.request}"
        wait, delete = lro.WaitOperationRequest(name=name), lro.DeleteOperationRequest(name=name)
        wait.timeout.FromSeconds(5)
        ended = forgotten = False
        while not forgotten:
            operations = operations_pb2_grpc.OperationsStub(self._channel(story.gateway))
            try:
                if not ended:
                    operation = await operations.WaitOperation(wait, timeout=_ANSWER_S)
                    ended = operation.done
                    if ended:
                        self._note(story, _outcome(operation), cursor=1 << 62)
                else:
                    await operations.DeleteOperation(delete, timeout=_ANSWER_S)
                    forgotten = True
            except grpc.aio.AioRpcError as error:
                if ended and isinstance(from_rpc_error(error), UnknownRequest):
                    return  # an earlier try has done it
                self._failed(story, error)
                story.gateway = (story.gateway + 1) % GATEWAYS
                await asyncio.sleep(_AGAIN_S)

    async def _burst(self, story: Story) -> None:
        """Asks once, and takes what it is told."""
        if not await self._hear(story, self._generate(story)):
            story.left_us = self._world.now_us

    async def _slow(self, story: Story) -> None:
        """Reads nothing for a while once it was accepted, over a narrow connection."""
        over = False
        async for told in self._generate(story, window=NARROW):
            over = over or told.kind in _OVER
            if told.kind == "accepted":
                await asyncio.sleep(_ASLEEP_S)
                story.woke_us = self._world.now_us
        if not over:
            await self._wait(story)

    async def _repeat(self, story: Story) -> None:
        """Is a gateway that submits under a name of its own, cancels, and submits again."""
        submit = control_pb2.SubmitRequest(request_id=f"own-{story.name}", request=story.wish)
        submit.request.spec.seed = 1
        named = control_pb2.CancelRequestRequest(request_id=submit.request_id)
        pause = story.draw()
        for step in ("Submit", "CancelRequest", "Submit", "Submit"):
            for _ in range(20):
                if await self._tell_leader(step, submit if step == "Submit" else named):
                    break
                await asyncio.sleep(0.5)
            await asyncio.sleep(pause.choice((0.0, 0.3, 1.5)))
        story.left_us = self._world.now_us

    # ------------------------------------------------------------------------------------------

    async def _tell_leader(self, method: str, message: Message) -> bool:
        """Whether the leader answered, be it with a refusal: what counts is what is stored."""
        address = self._world.leader_address()
        if not address:
            return False
        stub = control_pb2_grpc.ControlServiceStub(self._channel(address))
        try:
            await getattr(stub, method)(message, timeout=5.0)
        except grpc.aio.AioRpcError as error:
            return not isinstance(from_rpc_error(error), _NO_ANSWER)
        return True

    async def _for_a_while(self, story: Story) -> None:
        """Listens for a time drawn for it."""
        rng = story.draw()
        try:
            async with asyncio.timeout(rng.choice((0.002, 0.02, 0.2, 0.5, 2.0)) * rng.random()):
                await self._hear(story, self._generate(story))
        except TimeoutError:
            pass

    async def _hear(self, story: Story, call: AsyncIterator[CallerEvent]) -> bool:
        """One call; whether it told the end, or a refusal."""
        async for told in call:
            if told.kind in _OVER:
                return True
        return False

    async def _create(self, story: Story) -> bool:
        """Whether there is an operation now."""
        request = generation_pb2.CreateGenerationRequest(request=story.wish)
        while True:
            try:
                answer = await self._stub(story.gateway).CreateGeneration(
                    request, timeout=_ANSWER_S
                )
            except grpc.aio.AioRpcError as error:
                if self._failed(story, error) is not None:
                    return False
                if not story.key:
                    story.lost = True
                    return False
                story.gateway = (story.gateway + 1) % GATEWAYS
                await asyncio.sleep(_AGAIN_S)
            else:
                name = answer.name.removeprefix("operations/")
                self._note(story, "accepted", name, cursor=1)
                return True

    async def _generate(self, story: Story, window: int = 0) -> AsyncIterator[CallerEvent]:
        stub = self._stub(story.gateway, window)
        call, chain, accepted = stub.Generate(story.wish), _chain(story), False
        try:
            async for response in call:
                kind = response.WhichOneof("event")
                if kind == "media":
                    continue
                accepted, name = True, response.accepted.request_id
                step, cursor = story.number_of(response.progress), int(response.cursor or 0)
                yield self._note(story, kind, name, step, cursor=cursor, chain=chain)
        except grpc.aio.AioRpcError as error:
            failed = self._failed(story, error)
            if failed is not None:
                yield failed
            elif accepted and error.details() not in BROKEN:
                story.dropped.append(f"{error.code().name}: {error.details()}")

    async def _watched(self, story: Story) -> AsyncIterator[CallerEvent]:
        cursor, chain = story.cursor, story.chain
        request = generation_pb2.WatchGenerationRequest(
            request_id=story.request, cursor=str(cursor or "")
        )
        try:
            async for response in self._stub(story.gateway).WatchGeneration(request):
                step, cursor = story.number_of(response.progress), int(response.cursor or 0)
                kind = response.WhichOneof("event")
                yield self._note(story, kind, "", step, cursor=cursor, chain=chain)
        except grpc.aio.AioRpcError as error:
            failed = self._failed(story, error)
            if failed is not None:
                yield failed
            elif error.details() not in BROKEN:
                story.dropped.append(f"{error.code().name}: {error.details()}")

    def _note(
        self,
        story: Story,
        kind: str,
        name: str = "",
        detail: str = "",
        *,
        cursor: int = 0,
        chain: int = 0,
    ) -> CallerEvent:
        told = CallerEvent(self._world.now_us, kind, name or story.request, detail, cursor, chain)
        story.told.append(told)
        return told

    def _failed(self, story: Story, error: grpc.aio.AioRpcError) -> CallerEvent | None:
        """What a status tells of the request; None for "try again"."""
        match typed := from_rpc_error(error):
            case RequestFailed(reason="CANCELLED"):
                return self._note(story, "cancelled")
            case RequestFailed():
                return self._note(story, "failed", detail=typed.reason)
            case Refused():
                if typed.reason in _FULL and not typed.retry_after_us:
                    story.odd.append(f"{typed.reason} without a time to try again")
                return self._note(story, "refused", detail=typed.reason)
            case NotReady() | BrokerUnavailable():
                return None
            case _ if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            case _:
                story.odd.append(f"{error.code().name}: {error.details()}")
                return None

    def _stub(self, gateway: int, window: int = 0) -> Any:
        return generation_pb2_grpc.GenerationServiceStub(self._channel(gateway, window))

    def _channel(self, where: int | str, window: int = 0) -> grpc.aio.Channel:
        address = gateway_address(where) if isinstance(where, int) else where
        key = address, window
        if key not in self._channels:
            options = [(WINDOW, window)] if window else []
            self._channels[key] = grpc.aio.insecure_channel(address, options=options)
        return self._channels[key]


def _chain(story: Story) -> int:
    story.chain += 1
    return story.chain


def _outcome(operation: lro.Operation) -> str:
    if operation.HasField("response"):
        return "finished"
    return "cancelled" if operation.error.code == grpc.StatusCode.CANCELLED.value[0] else "failed"
