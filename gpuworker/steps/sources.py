"""Where a job's latent comes from: held here, broadcast by a member, or fetched from a holder.

Who broadcasts follows from the plan alone, so that all members of a group agree without a word. A
source that has no latent to hand out says so in its place: then all members know why, the group
stands, and nobody is suspected.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NoReturn

from gpuworker.collectives.groups import BlobWithheld
from gpuworker.collectives.rendezvous import BlobLost, Cancel, Rendezvous
from gpuworker.executor import Stopwatch
from gpuworker.memory.latents import CalledOff, LatentMissing, LatentShelf
from gpuworker.state import LatentState, StateCorrupt
from gpuworker.steps.inbox import Inbox
from gpuworker.steps.run import Run
from hocket.tracing import spans
from hocket.v1 import mesh_pb2, types_pb2

log = logging.getLogger(__name__)

# Asks a holder (worker name) for a latent and returns the store key; the third argument is looked
# at while it waits.
Ask = Callable[[str, mesh_pb2.LatentRequest, Cancel], mesh_pb2.LatentReply]

_CALLED_OFF = b"called off"
_MISSING = b"missing"


class Sources:
    """Gets latents onto the shelf."""

    def __init__(
        self, worker: str, inbox: Inbox, shelf: LatentShelf, rendezvous: Rendezvous, ask: Ask
    ) -> None:
        self._worker = worker
        self._inbox = inbox
        self._shelf = shelf
        self._rendezvous = rendezvous
        self._ask = ask

    def obtain(self, run: Run, member: mesh_pb2.BatchMember) -> LatentState:
        """The latent to start from: held here, broadcast by a member, or fetched from a holder
        outside.

        Raises `LatentMissing`, or `CalledOff`: the job was truncated meanwhile. In a group all
        members raise alike, but for a missing latent that is not `agreed`.
        """
        steps_done = member.first_step
        own = self._shelf.get(member.request_id, steps_done)
        if run.group is None:
            if own is None:
                own = self._fetch(run, member)
                self._shelf.put(member.request_id, own)
            return own
        source = _source(run.assignment, member)
        if source is None:  # the plan knows that every member holds it
            if own is None:
                tried = (self._worker,)
                raise LatentMissing(member.request_id, steps_done, tried, agreed=False)
            return own
        began = Stopwatch()
        content = self._broadcast(run, member, source, own)
        if own is None:
            own = LatentState.from_bytes(content, run.group.device)
        self._shelf.put(member.request_id, own)
        if run.leads(self._worker):
            members = run.assignment.group.members
            holder = members[source]
            others = ",".join(name for name in members if name != holder)
            run.sides.append(
                began.side(
                    spans.TRANSFER,
                    {spans.BYTES: len(content), spans.FROM: holder, spans.TO: others},
                )
            )
        return own

    def _broadcast(
        self, run: Run, member: mesh_pb2.BatchMember, source: int, own: LatentState | None
    ) -> bytes:
        """The latent's bytes, from that member."""
        assert run.group is not None
        blob: bytes | None = None
        excuse: bytes | None = None
        if run.group.rank == source:
            try:
                blob = (own or self._fetch(run, member)).to_bytes()
            except LatentMissing as missing:
                excuse = b"\n".join((_MISSING, *(name.encode() for name in missing.tried)))
            except CalledOff:
                excuse = _CALLED_OFF
        try:
            return run.group.broadcast_blob(blob, source, excuse=excuse)
        except BlobWithheld as withheld:
            _raise_alike(member, withheld.excuse)

    def _fetch(self, run: Run, member: mesh_pb2.BatchMember) -> LatentState:
        off = Off(self._inbox, run.assignment, member.request_id)
        tried, began = [], Stopwatch()
        timeout_us = run.assignment.collective_timeout_us
        for holder in member.holders:
            tried.append(holder.worker)
            if holder.worker == self._worker:
                continue
            asked = mesh_pb2.LatentRequest(
                request_id=member.request_id,
                steps_done=member.first_step,
                attempt=member.attempt,
                wait_us=timeout_us // 2,
            )
            try:
                blob = fetch_from(self._rendezvous, self._ask, holder, asked, timeout_us / 1e6, off)
                state = LatentState.from_bytes(blob)
            except (BlobLost, StateCorrupt) as lost:
                log.warning("%s gave no latent: %s", holder.worker, lost)
                if off.is_set():
                    raise CalledOff(member.request_id) from lost
                continue
            run.sides.append(
                began.side(
                    spans.TRANSFER,
                    {spans.BYTES: len(blob), spans.FROM: holder.worker, spans.TO: self._worker},
                )
            )
            return state
        raise LatentMissing(member.request_id, member.first_step, tuple(tried))


def fetch_from(
    rendezvous: Rendezvous,
    ask: Ask,
    holder: types_pb2.LatentHolder,
    asked: mesh_pb2.LatentRequest,
    timeout_s: float,
    cancel: Cancel,
) -> bytes:
    """Asks a holder for a latent and fetches what it offers. Raises `BlobLost`."""
    reply = ask(holder.worker, asked, cancel)
    if reply.HasField("failure"):
        raise BlobLost(holder.worker, asked.request_id, reply.failure.message)
    return rendezvous.fetch(holder.store_address, reply.key, timeout_s, cancel)


def _raise_alike(member: mesh_pb2.BatchMember, excuse: bytes) -> NoReturn:
    """On every member of a group what the source of a latent has met with."""
    if excuse == _CALLED_OFF:
        raise CalledOff(member.request_id)
    tried = tuple(name.decode() for name in excuse.split(b"\n")[1:])
    raise LatentMissing(member.request_id, member.first_step, tried)


class Off(threading.Event):
    """Looks like an event; is set once the assignment, or one job of it, has been truncated."""

    def __init__(self, inbox: Inbox, assignment: mesh_pb2.Assignment, request: str = "") -> None:
        super().__init__()
        self._inbox = inbox
        self._assignment = assignment
        self._request = request

    def is_set(self) -> bool:
        staying = self._inbox.staying(self._assignment)
        return self._request not in staying if self._request else not staying


def _source(assignment: mesh_pb2.Assignment, member: mesh_pb2.BatchMember) -> int | None:
    """Rank that broadcasts the latent; None when every member holds it already.

    Computed from the plan alone, so that all members agree without a word. Rank 0 fetches where no
    member holds it.
    """
    holders = {h.worker for h in member.holders if h.steps_done == member.first_step}
    holding = [worker in holders for worker in assignment.group.members]
    if all(holding):
        return None
    return holding.index(True) if any(holding) else 0
