"""The promises stream: the durable state of every request, written by one leader at a time.

The newest entry of a subject *is* the state: of a request (open, or with how it ended), of an
operator's wish about a worker, of the leadership (Fences). House rules: nothing is answered before
it is stored; every append says which Fence it knows, so that the broker refuses whoever another
leader has deposed, however many appends were under way; an append of unknown outcome is settled
before anything is said of it.

                  old leader                      broker                     new leader
    append(r1, fence 7) ─────────────────────▶ stored as 8
    append(r2, fence 7) ──────────────╮        stored as 9 ◀───────────── Fence(term 12)
                                      ╰──────▶ refused: the fence is 9

Numbers cannot be the fence (`Nats-Expected-Last-Sequence`, counted by the leader): an old leader's
third append under way expects just the number that the new leader's Fence got. And a cluster of
brokers lets one append at a time pass that expects the same Fence: so there are `LANES` of them,
each with its own Fence and one append under way.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from control.leading.fence_room import FenceRoom
from control.leading.room import StreamRoom, no_room
from hocket.clock import Clock
from hocket.errors import BrokerUnavailable, HocketError, WrongConfig
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.deliveries import StreamEntry
from hocket.messaging.stores import (
    AppendCondition,
    Log,
    LogFull,
    LogMoved,
    LogShape,
    NoRoom,
    OutcomeUnknown,
)
from hocket.v1 import journal_pb2

log = logging.getLogger(__name__)
T = TypeVar("T")
Shaped = Callable[[int], LogShape]  # of a size in bytes

LANES = 32
TERM_MAX = 1 << 30  # cursors and epochs are terms times 2^32
_AGAIN_US = 200_000  # between two tries while the broker is away
# What is gone leaves a mark for those who follow; of the oldest ended requests everybody knows.
_MARK_S, _OLDEST_MARK_S = 3600.0, 5.0
_FAILURE_BYTES_MAX = 8192
_SHARE_FORGOTTEN = 10  # a tenth of the ended requests makes room
_DERIVED_MAX, _DERIVED_MIN = 256 << 20, 16 << 20  # bytes, where the setting is 0


@dataclass
class Deposed(HocketError):
    """This replica does not lead any more."""

    term: int
    by: int  # term that owns the stream, or that workers follow; 0: nobody's

    def __str__(self) -> str:
        who = f"term {self.by} leads" if self.by else "its Fence is not the newest"
        return f"term {self.term} is over: {who}"


async def open_stream(bus: Bus, subjects: Subjects, bytes_max: int = 0, replicas: int = 1) -> Log:
    """Makes the promises stream where needed; 0 bytes: what the broker has room for, up to 256 MiB.

    Raises WrongConfig when it has no room, BrokerUnavailable.
    """
    return await open_bounded(
        bus,
        lambda size: LogShape(
            name=subjects.promises_stream,
            subjects=(subjects.promises,),
            bytes_max=size,
            newest_only=True,
            replicas=replicas,
        ),
        bytes_max,
        "promises_bytes_max",
    )


async def open_bounded(bus: Bus, shape: Shaped, bytes_max: int, setting: str) -> Log:
    """A stream of that size; 0: the size it has, else what there is room for.

    Raises WrongConfig, which names the setting, and BrokerUnavailable.
    """
    size = bytes_max or await Log(bus, shape(0).name).bytes_max() or _DERIVED_MAX
    while True:
        try:
            return await Log.open(bus, shape(size))
        except NoRoom as error:
            if bytes_max or size <= _DERIVED_MIN:
                allowed = (
                    "no more than the broker's JetStream has free (nats-server: max_file_store)"
                )
                raise WrongConfig(key=setting, value=str(size), allowed=allowed) from error
            size //= 2


@dataclass(frozen=True)
class _Lane:
    guard: AppendCondition
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Promises:
    """One leader's pen."""

    def __init__(
        self,
        stream: Log,
        subjects: Subjects,
        term: int,
        fences: Sequence[StreamEntry],
        clock: Clock,
        *,
        retention_s: float = 86_400.0,
        ended_max: int = 10_000,
    ) -> None:
        self.term = term
        self.fence = max(fences, key=lambda fence: fence.sequence)  # before it is all that was
        self._log = stream
        self._subjects = subjects
        self._lanes = [_Lane(AppendCondition(fence.subject, fence.sequence)) for fence in fences]
        self._clock = clock
        self._fenced_us = clock.now_us()
        self._retention_s = retention_s
        self._ended_max = ended_max
        self._ended: OrderedDict[str, None] = OrderedDict()  # as the stream has them, oldest first
        self._count = 0
        self._probing = asyncio.Lock()
        self._answers = 0  # probes that the broker answered
        self._over = asyncio.Event()
        self._room = StreamRoom(lambda: self._asked(stream.room_and_bound), clock)

    @classmethod
    async def take(
        cls,
        stream: Log,
        subjects: Subjects,
        term: int,
        clock: Clock,
        *,
        retention_s: float = 86_400.0,
        ended_max: int = 10_000,
    ) -> Promises:
        """Takes the stream over: from now on nobody else's appends are stored.

        The term is raised where the stream knows a later one. Waits while the broker is away.
        Raises Deposed when another one has taken it over meanwhile.
        """
        fence = journal_pb2.Fence(term=term, owner=secrets.token_hex(8))
        room = FenceRoom(stream, subjects, clock, LANES)
        while True:
            try:
                fences = await _write_fences(stream, subjects, fence)
            except LogFull as full:
                fences = None
                await room.make(full)
            except (OutcomeUnknown, BrokerUnavailable) as error:
                log.debug("the promises stream was not taken over: %s", error)
                fences = None
                await clock.sleep_until(clock.now_us() + _AGAIN_US)
            if fences is not None:
                break
        return cls(
            stream,
            subjects,
            fence.term,
            fences,
            clock,
            retention_s=retention_s,
            ended_max=ended_max,
        )

    @property
    def unix_us(self) -> int:
        """Now by the broker's clock: the Fence's stamp and the time since, on our own clock."""
        return self.fence.unix_us + self._clock.now_us() - self._fenced_us

    def at_us(self, unix_us: int) -> int:
        """A stamp of the broker's, on our own clock."""
        return self._fenced_us + unix_us - self.fence.unix_us

    def restore(self, ended: Iterable[str]) -> None:
        """Requests that the stream keeps as ended, oldest first."""
        self._ended.update(dict.fromkeys(ended))
        self._over.set()

    async def append(self, promise: journal_pb2.Promise) -> int:
        """Stores the state of `promise.submit.request_id`; returns when, in µs since 1970 by the
        broker's clock. Of an ended one prompts and workflow go, and it goes after the retention.

        Waits as long as the broker is away. Raises Deposed, and Refused when there is no room for
        an open one.
        """
        promise.term = self.term
        request = promise.submit.request_id
        if not promise.HasField("ended"):
            if promise.accepted_unix_us:  # it is there already, and may end next
                await self._write(self._subjects.promise(request), promise)
                return self.unix_us
            async with self._room.taken(promise.ByteSize(), self._forget_some):
                await self._write(self._subjects.promise(request), promise)
            return self.unix_us
        _shorten(promise)
        await self._write(self._subjects.promise(request), promise, self._retention_s)
        self._ended[request] = None
        if len(self._ended) > self._ended_max:
            self._over.set()
        return self.unix_us

    async def forget(self, request_id: str) -> None:
        """A request that has ended is known no longer. Raises Deposed."""
        await self._forget(request_id, _MARK_S)

    async def drain(self, worker: str, draining: bool) -> None:
        """Stores an operator's wish about a worker. Raises Deposed."""
        wish = journal_pb2.DrainWish(worker=worker, draining=draining)
        ttl_s = 0.0 if draining else _MARK_S
        await self._write(self._subjects.drain(worker), wish, ttl_s)

    async def is_ours(self) -> bool:
        """Whether no other leader has come in between. Raises BrokerUnavailable."""
        return await self._owns(self._lanes[0])

    async def keep_bounds(self) -> None:
        """Forgets the oldest ended requests beyond the bound, until cancelled. Raises Deposed."""
        while True:
            await self._over.wait()
            self._over.clear()
            while len(self._ended) > self._ended_max:
                await self._forget(next(iter(self._ended)), _OLDEST_MARK_S)

    async def _forget(self, request_id: str, mark_s: float) -> None:
        self._ended.pop(request_id, None)
        mark = journal_pb2.Promise(term=self.term)
        await self._write(self._subjects.promise(request_id), mark, mark_s)

    async def _write(self, subject: str, message: Message, ttl_s: float = 0.0) -> None:
        data = message.SerializeToString()
        self._count += 1
        name, tries = f"{self.term}-{self._count}", 0
        lane = self._lanes[zlib.crc32(subject.encode()) % LANES]
        async with lane.turn:
            while True:
                tries, answers = tries + 1, self._answers
                try:
                    await self._log.append(
                        subject, data, guard=lane.guard, ttl_s=ttl_s, message_id=name
                    )
                    return
                except OutcomeUnknown as error:
                    log.debug("%s", error)
                    await self._wait_for_broker(answers)
                except LogFull as error:
                    await self._make_room(message, error)
                except LogMoved as moved:
                    if await self._asked(lambda: self._owns(lane)):
                        continue  # an append of this lane that was given up is on its way yet
                    # Of an append that was tried before, the first try may have been stored.
                    if tries > 1 and await self._is_stored(subject, data, lane):
                        return
                    raise Deposed(self.term, await self._leading()) from moved

    async def _owns(self, lane: _Lane) -> bool:
        found = await self._log.newest(lane.guard.subject)
        return found is not None and found.sequence == lane.guard.sequence

    async def _wait_for_broker(self, answers: int) -> None:
        """Returns once the broker has answered since; of many who wait one asks.

        Raises Deposed when it came back without its store.
        """
        async with self._probing:
            while self._answers == answers:
                try:
                    if await self._log.last_sequence() < self.fence.sequence:
                        raise Deposed(self.term, 0)
                    self._answers += 1
                except BrokerUnavailable:
                    await self._clock.sleep_until(self._clock.now_us() + _AGAIN_US)

    async def _make_room(self, message: Message, full: LogFull) -> None:
        if await self._forget_some(full):
            return
        if isinstance(message, journal_pb2.Promise) and _is_open(message):
            raise no_room() from full
        # Nothing that stands there may go before this is stored: other ends make room.
        await self._clock.sleep_until(self._clock.now_us() + _AGAIN_US)

    async def _forget_some(self, full: object = "its last part is for ends") -> bool:
        """Whether there was an ended request to forget."""
        count = len(self._ended) // _SHARE_FORGOTTEN or len(self._ended)
        oldest = [request for request, _ in zip(self._ended, range(count), strict=False)]
        if oldest:
            log.warning("promises: %s; forgetting the oldest %d ended requests", full, len(oldest))
        for request in oldest:
            self._ended.pop(request, None)
            await self._purge(self._subjects.promise(request))
        return bool(oldest)

    async def _purge(self, subject: str) -> None:
        await self._asked(lambda: self._log.purge(subject))

    async def _is_stored(self, subject: str, data: bytes, lane: _Lane) -> bool:
        found = await self._asked(lambda: self._log.newest(subject))
        return found is not None and found.data == data and found.sequence > lane.guard.sequence

    async def _leading(self) -> int:
        first = self._lanes[0].guard.subject
        found = await self._asked(lambda: self._log.newest(first))
        return _fence(found).term if found is not None else 0

    async def _asked(self, question: Callable[[], Awaitable[T]]) -> T:
        """The broker's answer, asked again while it is away."""
        while True:
            answers = self._answers
            try:
                return await question()
            except BrokerUnavailable:
                await self._wait_for_broker(answers)


def _is_open(promise: journal_pb2.Promise) -> bool:
    """Neither ended nor the mark of what is gone."""
    return promise.HasField("submit") and not promise.HasField("ended")


def _shorten(promise: journal_pb2.Promise) -> None:
    """Drops what a user wrote, the workflow, and of a failure what no broker might take."""
    promise.submit.ClearField("workflow")
    failed = promise.ended.failed
    if promise.ended.HasField("failed") and failed.ByteSize() > _FAILURE_BYTES_MAX:
        failed.message = failed.message[: _FAILURE_BYTES_MAX // 4]
        failed.ClearField("metadata")
    specs = [promise.submit.request.spec]
    if promise.HasField("answer"):
        specs.append(promise.answer.effective_spec)
    if promise.HasField("degraded"):
        specs.append(promise.degraded.effective_spec)
    for spec in specs:
        spec.ClearField("prompt")
        spec.ClearField("negative_prompt")


async def _write_fences(
    stream: Log, subjects: Subjects, fence: journal_pb2.Fence
) -> list[StreamEntry] | None:
    """The Fences of all lanes once they are the new leader's; None: try again."""
    names = [subjects.fence(lane) for lane in range(LANES)]
    known = {f.subject: f async for f in stream.read(subjects.fence("*"))}

    async def write(subject: str) -> None:
        last = known[subject].sequence if subject in known else 0
        content = fence.SerializeToString()
        with suppress(LogMoved):  # somebody else was quicker: read again
            try:
                await stream.append(subject, content, guard=AppendCondition(subject, last))
            except LogFull:  # without the one that it replaces there is room
                if not last:
                    raise
                await stream.purge(subject, last)
                await stream.append(subject, content, guard=AppendCondition(subject, 0))

    owners = {subject: _fence(entry).owner for subject, entry in known.items()}
    if owners.get(names[0]) != fence.owner:  # of two new leaders only one has the first lane
        if fence.owner in owners.values():
            by = max(_fence(entry).term for entry in known.values())
            raise Deposed(fence.term, by)
        fence.term = max(fence.term, 1 + max((_fence(f).term for f in known.values()), default=0))
        await write(names[0])
        return None
    missing = [subject for subject in names if owners.get(subject) != fence.owner]
    results = await asyncio.gather(*map(write, missing), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return None if missing else [known[subject] for subject in names]


def _fence(entry: StreamEntry) -> journal_pb2.Fence:
    return journal_pb2.Fence.FromString(entry.data)
