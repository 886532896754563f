"""Callers: what they do, and what they were told.

Each speaks the public API through a gateway, as a client library does: it tries again through
another gateway when the connection breaks, with its idempotency key. What it was told stands in its
`Story`, which the checks compare with what was stored.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from hocket.errors import (
    BrokerUnavailable,
    HocketError,
    NotReady,
    Refused,
    RequestFailed,
    UnknownRequest,
    from_rpc_error,
)
from hocket.v1 import (
    control_pb2,
    control_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    types_pb2,
)

from .link import BROKEN
from .loop import Process
from .roles import MODEL, gateway_address

if TYPE_CHECKING:
    from .world import World

GATEWAYS = 2
_AGAIN_S = 0.3
_ANSWER_S = 20.0
Stub = Any


@dataclass(frozen=True)
class Told:
    """Something that a caller heard."""

    at_us: int
    kind: str  # accepted, progress, degraded, finished, failed, cancelled, refused
    request: str
    detail: str = ""
    cursor: int = 0


@dataclass
class Story:
    """One caller."""

    name: str
    behaviour: str
    wish: generation_pb2.GenerateRequest
    starts_us: int
    gateway: int
    told: list[Told] = field(default_factory=list)
    left_us: int | None = None  # it gave up then
    over: bool = False  # it learned an end, or gave up
    lost: bool = False  # its stream broke, and it had no way back
    untyped: list[str] = field(default_factory=list)  # statuses that say nothing
    dropped: list[str] = field(default_factory=list)  # by a gateway that lives, once accepted

    @property
    def key(self) -> str:
        return self.wish.idempotency_key

    @property
    def request(self) -> str:
        """Name of its request, as last told; "" while it knows none."""
        return next((t.request for t in reversed(self.told) if t.request), "")

    @property
    def ending(self) -> Told | None:
        return next((t for t in self.told if t.kind in ENDINGS), None)

    def was_told(self, kind: str) -> bool:
        return any(t.kind == kind for t in self.told)


ENDINGS = ("finished", "failed", "cancelled")


class Callers:
    """All callers of a world; one process, which no fault hits."""

    def __init__(self, world: World, stories: list[Story]) -> None:
        self._world = world
        self.stories = stories
        self._stubs: dict[int, Stub] = {}
        self._controls: dict[str, Stub] = {}

    async def run(self, world: World, process: Process) -> None:
        async with asyncio.TaskGroup() as tasks:
            for story in self.stories:
                tasks.create_task(self._play(story), name=story.name)

    @property
    def over(self) -> bool:
        return all(story.over for story in self.stories)

    async def _play(self, story: Story) -> None:
        await self._sleep_until(story.starts_us)
        behaviours: dict[str, Callable[[Story], Coroutine[Any, Any, None]]] = {
            "wait": self._wait,
            "leave": self._leave,
            "move": self._move,
            "cancel": self._cancel,
            "forget": self._forget,
            "repeat": self._repeat,
        }
        await behaviours[story.behaviour](story)
        story.over = True

    # behaviours

    async def _wait(self, story: Story) -> None:
        """Wants its picture, whatever happens."""
        while not await self._listen(story):
            if not story.key:
                story.lost = True
                return
            story.gateway = (story.gateway + 1) % GATEWAYS
            await asyncio.sleep(_AGAIN_S)

    async def _leave(self, story: Story) -> None:
        """Gives up after some time."""
        await self._for_a_while(story)
        if story.ending is None:
            story.left_us = self._world.now_us

    async def _move(self, story: Story) -> None:
        """Calls again through the other gateway, with the same key, around the end of its call."""
        rng = _draw(story)
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
        rng = _draw(story)
        while not story.request and not waiting.done():  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)
        await asyncio.sleep(rng.random() * 0.4)
        while not waiting.done():
            request = generation_pb2.CancelRequest(request_id=story.request)
            try:
                await self._stub(story.gateway).Cancel(request, timeout=_ANSWER_S)
            except grpc.aio.AioRpcError as error:
                self._failed(story, error, telling=False)
                await asyncio.sleep(_AGAIN_S)
            else:
                break
        await waiting

    async def _forget(self, story: Story) -> None:
        """Starts it detached and goes away once it was accepted."""
        async for told in self._generate(story):
            if told.kind == "accepted":
                return

    async def _repeat(self, story: Story) -> None:
        """Is a gateway that submits under a name of its own, cancels, and submits again."""
        submit = control_pb2.SubmitRequest(request_id=f"own-{story.name}", request=story.wish)
        submit.request.spec.seed = 1
        named = control_pb2.CancelRequestRequest(request_id=submit.request_id)
        pause = _draw(story)
        for step in ("Submit", "CancelRequest", "Submit", "Submit"):
            for _ in range(20):
                stub = self._control()
                try:
                    if stub is not None:
                        message = submit if step == "Submit" else named
                        await getattr(stub, step)(message, timeout=5.0)
                        break
                except grpc.aio.AioRpcError:
                    pass  # whatever it says: what counts is what is stored
                await asyncio.sleep(0.5)
            await asyncio.sleep(pause.choice((0.0, 0.3, 1.5)))
        story.left_us = self._world.now_us

    def _control(self) -> Stub | None:
        address = self._world.leader_address()
        if not address:
            return None
        if address not in self._controls:
            channel = grpc.aio.insecure_channel(address)
            self._controls[address] = control_pb2_grpc.ControlServiceStub(channel)
        return self._controls[address]

    # ------------------------------------------------------------------------------------------

    async def _for_a_while(self, story: Story) -> None:
        """Listens for a time drawn for it."""
        rng = _draw(story)
        try:
            async with asyncio.timeout(rng.choice((0.002, 0.02, 0.2, 0.5, 2.0)) * rng.random()):
                await self._listen(story)
        except TimeoutError:
            pass

    async def _listen(self, story: Story) -> bool:
        """One call; whether it learned the end, or a refusal."""
        async for told in self._generate(story):
            if told.kind in (*ENDINGS, "refused"):
                return True
        return False

    async def _generate(self, story: Story) -> AsyncIterator[Told]:
        stub = self._stub(story.gateway)
        call, accepted = stub.Generate(story.wish), False
        try:
            async for response in call:
                kind = response.WhichOneof("event")
                accepted = True
                if kind == "media":
                    continue
                named = response.accepted.request_id if kind == "accepted" else story.request
                step = response.progress.step if response.progress.node == "dit" else 0
                told = Told(self._world.now_us, kind, named, str(step or ""))
                story.told.append(told)
                yield told
        except grpc.aio.AioRpcError as error:
            failed = self._failed(story, error, telling=True)
            if failed is not None:
                yield failed
            elif accepted and error.details() not in BROKEN:
                story.dropped.append(f"{error.code().name}: {error.details()}")

    def _failed(self, story: Story, error: grpc.aio.AioRpcError, *, telling: bool) -> Told | None:
        """What a status tells of the request; None for "try again"."""
        typed = from_rpc_error(error)
        told: Told | None = None
        match typed:
            case RequestFailed(reason="CANCELLED"):
                told = Told(self._world.now_us, "cancelled", story.request, str(typed))
            case RequestFailed():
                told = Told(self._world.now_us, "failed", story.request, typed.reason)
            case Refused():
                told = Told(self._world.now_us, "refused", "", typed.reason)
            case NotReady() | BrokerUnavailable():
                pass
            case UnknownRequest() if not telling:
                pass  # a cancel may come before its Submit, or behind the retention
            case HocketError() if error.code() is grpc.StatusCode.UNAVAILABLE:
                pass
            case _:
                story.untyped.append(f"{error.code().name}: {error.details()}")
        if told is not None and telling:
            story.told.append(told)
        return told if telling else None

    def _stub(self, gateway: int) -> Stub:
        if gateway not in self._stubs:
            channel = grpc.aio.insecure_channel(gateway_address(gateway))
            self._stubs[gateway] = generation_pb2_grpc.GenerationServiceStub(channel)
        return self._stubs[gateway]

    async def _sleep_until(self, at_us: int) -> None:
        await asyncio.sleep(max(0, at_us - self._world.now_us) / 1e6)


def draw_stories(rng: random.Random, count: int, start_us: int) -> list[Story]:
    """Callers and their times, as the seed says."""
    stories: list[Story] = []
    while len(stories) < count:
        number = len(stories)
        behaviour = rng.choice(("wait", "wait", "leave", "move", "cancel", "forget", "repeat"))
        starts_us = start_us + rng.randrange(6_000_000)
        twins = 2 if behaviour == "wait" and rng.random() < 0.3 else 1
        key = f"key-{number}" if behaviour == "move" or rng.random() < 0.8 else ""
        steps = rng.randrange(2, 9)
        deadline_us = rng.choice((0, 0, 2_000_000, 500_000))
        for twin in range(twins):
            wish = generation_pb2.GenerateRequest(
                spec=types_pb2.GenerationSpec(
                    model=MODEL,
                    prompt="a fox",
                    shape=types_pb2.Shape(width=64, height=64),
                    steps=steps,
                ),
                slo=types_pb2.Slo(deadline_us=deadline_us),
                idempotency_key=key or (f"twins-{number}" if twins > 1 else ""),
                detached=behaviour == "forget",
                progress_every=rng.choice((1, 1, 3)),
            )
            gateway = rng.randrange(GATEWAYS)
            stories.append(Story(f"c{number}.{twin}", behaviour, wish, starts_us, gateway))
            starts_us += rng.choice((0, 0, 1_000, 300_000))
    return stories


def _draw(story: Story) -> random.Random:
    return random.Random(f"{story.name} {story.starts_us}")
