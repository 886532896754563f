"""Inputs of the assignments that come next, fetched while the one in hand computes.

    agent ──── want(n+1) ──▶ fetching threads: ask the holder, wait for room, fetch
                                     │
    compute ── … step n … ── take ◀──┘  what is there costs nothing, what comes is waited for

What arrives lies here, within a bound of bytes, until its assignment is in hand: the shelf shows
what a worker holds, and a copy that nobody has worked with is no news. Whatever does not come by
this way is fetched in its turn, as without it: this is never more than earlier.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from gpuworker.memory.latents import CalledOff, LatentMissing, LatentShelf
from gpuworker.operations.names import CallInput, OperationRefused, operation_of, wanted_by
from gpuworker.steps.fetching import Fetched, Fetcher, Off, broadcaster
from gpuworker.steps.inbox import Inbox
from hocket.v1 import mesh_pb2

log = logging.getLogger(__name__)

_AT_ONCE = 16  # fetches
_POLL_S = 0.02  # whether who waits for room was called off

Order = tuple[int, int]  # term and sequence of an assignment
InputKey = tuple[str, str, int]  # request, artifact, version


class Ahead(NamedTuple):
    """How far fetches go ahead of the compute thread."""

    depth: int = 2  # assignments behind the one in hand; 0: none
    bytes_max: int = 256 << 20  # that lie here


AHEAD, IN_TURN = Ahead(), Ahead(0)


class Arrivals:
    """Bytes of what has arrived before its turn. Written by `Prefetch`; whoever reads it may have
    locks that are taken inside of its own.
    """

    size_bytes = 0


class _Coming:
    """An input on its way, or here. Its state is guarded by `Prefetch`."""

    def __init__(self, off: Off) -> None:
        self._off = off
        self.done: Future[Fetched | None] = Future()
        self.size_bytes = 0  # of the room that it has
        self.urgent = False  # the compute thread waits for it
        self.dropped = False

    def called_off(self) -> bool:
        """The job was truncated."""
        return self._off.is_set()

    def is_set(self) -> bool:
        """Whether nobody will take it: cancels the fetch."""
        return self.dropped or self.called_off()


class Prefetch:
    """Thread-safe: the agent's thread wants, the compute thread takes."""

    def __init__(
        self,
        worker: str,
        inbox: Inbox,
        shelf: LatentShelf,
        fetcher: Fetcher,
        ahead: Ahead = AHEAD,
        arrivals: Arrivals | None = None,
    ) -> None:
        self._worker = worker
        self._inbox = inbox
        self._shelf = shelf
        self._fetcher = fetcher
        self._depth, self._bytes_max = ahead
        self._changed = threading.Condition()
        self._newest: Order = (0, 0)
        self._in_hand: Order = (0, 0)
        self._waiting: deque[mesh_pb2.Assignment] = deque()  # those that could want something
        self._begun: dict[Order, dict[InputKey, _Coming]] = {}
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="prefetch")
        self._arrivals = arrivals or Arrivals()
        self._closed = False
        self.taken = 0  # inputs that were here, or on their way, when their assignment began

    @property
    def size_bytes(self) -> int:
        """Of all that has room here."""
        return self._arrivals.size_bytes

    def want(self, assignment: mesh_pb2.Assignment) -> None:
        """An assignment has arrived; a repeated one is ignored."""
        with self._changed:
            order = _order(assignment)
            if not self._depth or self._closed or order <= self._newest:
                return
            self._newest = order
            if any(True for _ in self._from_others(assignment)):
                self._waiting.append(assignment)
                self._begin()

    def begin(self, assignment: mesh_pb2.Assignment) -> None:
        """The compute thread has it in hand: the next ones have their turn."""
        with self._changed:
            self._in_hand = _order(assignment)
            self._begin()

    def take(
        self, assignment: mesh_pb2.Assignment, member: mesh_pb2.BatchMember, wanted: CallInput
    ) -> Fetched | None:
        """An input of the assignment in hand, as soon as it is here; None: it does not come.

        Raises `CalledOff`.
        """
        with self._changed:
            key = _key(member, wanted)
            coming = self._begun.get(_order(assignment), {}).pop(key, None)
            if coming is None:
                return None
            coming.urgent = True
            self._changed.notify_all()
        coming.done.cancel()  # no thread has come to it: whoever is here is faster
        try:
            found = None if coming.done.cancelled() else coming.done.result()
        finally:
            self._drop(coming)
        if coming.called_off():
            raise CalledOff(member.request_id)
        with self._changed:
            self.taken += found is not None
        return found

    def over(self, assignment: mesh_pb2.Assignment) -> None:
        """It was run, or called off: what it has not taken goes."""
        with self._changed:
            order = _order(assignment)
            self._let_go(lambda other: other <= order)

    def forget_before(self, term: int) -> None:
        """A newer leader has forgotten what the older one had planned."""
        with self._changed:
            self._let_go(lambda order: order[0] < term)

    def close(self) -> None:
        """Calls everything off; waits for nothing."""
        with self._changed:
            self._closed = True
            self._let_go(lambda _: True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    # The lock is held by the caller.

    def _let_go(self, gone: Callable[[Order], bool]) -> None:
        self._waiting = deque(a for a in self._waiting if not gone(_order(a)))
        for order in [order for order in self._begun if gone(order)]:
            for coming in self._begun.pop(order).values():
                self._drop(coming)

    def _begin(self) -> None:
        while self._waiting:
            ahead = sum(order > self._in_hand for order in self._begun)
            if ahead >= self._depth and _order(self._waiting[0]) > self._in_hand:
                return
            assignment = self._waiting.popleft()
            coming = self._begun[_order(assignment)] = {}
            under_way = {key for inputs in self._begun.values() for key in inputs}
            for member, wanted in self._from_others(assignment):
                key = _key(member, wanted)
                here = self._shelf.steps_done(member.request_id, wanted.artifact) == wanted.version
                if here or key in under_way:  # then it will be on the shelf
                    continue
                one = coming[key] = _Coming(Off(self._inbox, assignment, member.request_id))
                self._threads.submit(self._fetch, assignment, member, wanted, one)

    def _from_others(
        self, assignment: mesh_pb2.Assignment
    ) -> Iterator[tuple[mesh_pb2.BatchMember, CallInput]]:
        """What this worker is to fetch: alone, or for its group."""
        try:
            operation = operation_of(assignment)
        except OperationRefused:  # told when its turn comes
            return
        members = assignment.group.members
        for member in assignment.batch:
            for wanted in wanted_by(operation, member):
                if not wanted.holders:  # told when its turn comes
                    continue
                rank = broadcaster(assignment, wanted)
                held = any(h.worker == self._worker for h in wanted.holders)
                if not held and rank is not None and members[rank] == self._worker:
                    yield member, wanted

    # Fetching threads.

    def _fetch(
        self,
        assignment: mesh_pb2.Assignment,
        member: mesh_pb2.BatchMember,
        wanted: CallInput,
        coming: _Coming,
    ) -> None:
        if not coming.done.set_running_or_notify_cancel():
            return
        found: Fetched | None = None
        try:
            admit = partial(self._admit, coming)
            found = self._fetcher.fetch(assignment, member, wanted, coming, admit)
        except CalledOff:
            pass
        except LatentMissing as missing:
            log.warning("not before its turn: %s", missing)
        except Exception:  # whatever a store or the bus has raised: it is tried again in its turn
            log.exception("%s of %s was not fetched", wanted.artifact, member.request_id)
        finally:
            with self._changed:
                if found is None or coming.dropped:
                    self._free(coming)
            coming.done.set_result(found)

    def _admit(self, coming: _Coming, size_bytes: int) -> None:
        """Waits for room; what is waited for, and what is alone, always has it."""

        def has_room() -> bool:
            here = self._arrivals.size_bytes
            fits = not here or here + size_bytes <= self._bytes_max
            return fits or coming.urgent or coming.is_set()

        with self._changed:
            while not self._changed.wait_for(has_room, _POLL_S):
                pass
            self._free(coming)  # of a holder that gave nothing
            coming.size_bytes = size_bytes
            self._arrivals.size_bytes += size_bytes

    def _drop(self, coming: _Coming) -> None:
        """Nobody takes it any more; its room is free."""
        with self._changed:
            coming.dropped = True
            self._free(coming)

    def _free(self, coming: _Coming) -> None:
        """The lock is held by the caller."""
        self._arrivals.size_bytes -= coming.size_bytes
        coming.size_bytes = 0
        self._changed.notify_all()


def _order(assignment: mesh_pb2.Assignment) -> Order:
    return assignment.term, assignment.sequence


def _key(member: mesh_pb2.BatchMember, wanted: CallInput) -> InputKey:
    return member.request_id, wanted.artifact, wanted.version
