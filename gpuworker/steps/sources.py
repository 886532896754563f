"""Where a job's inputs come from: held here, broadcast by a member, or fetched from a holder.

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
from gpuworker.operations.names import CallInput
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
    """Gets artifacts onto the shelf."""

    def __init__(
        self, worker: str, inbox: Inbox, shelf: LatentShelf, rendezvous: Rendezvous, ask: Ask
    ) -> None:
        self._worker = worker
        self._inbox = inbox
        self._shelf = shelf
        self._rendezvous = rendezvous
        self._ask = ask

    def obtain(self, run: Run, member: mesh_pb2.BatchMember, wanted: CallInput) -> LatentState:
        """What a job starts from: held here, broadcast by a member, or fetched from a holder
        outside.

        Raises `LatentMissing`, or `CalledOff`: the job was truncated meanwhile. In a group all
        members raise alike, but for a missing artifact that is not `agreed`.
        """
        request, artifact = member.request_id, wanted.artifact
        own = self._shelf.get(request, wanted.version, artifact)
        if run.group is None:
            if own is None:
                own = self._fetch(run, member, wanted)
                self._shelf.put(request, own, artifact)
            return own
        source = _source(run.assignment, wanted)
        if source is None:  # the plan knows that every member holds it
            if own is None:
                tried = (self._worker,)
                raise LatentMissing(request, wanted.version, tried, False, artifact)
            return own
        began = Stopwatch()
        content = self._broadcast(run, member, wanted, source, own)
        if own is None:
            own = LatentState.from_bytes(content, run.group.device)
        self._shelf.put(request, own, artifact)
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
        self,
        run: Run,
        member: mesh_pb2.BatchMember,
        wanted: CallInput,
        source: int,
        own: LatentState | None,
    ) -> bytes:
        """The artifact's bytes, from that member."""
        assert run.group is not None
        blob: bytes | None = None
        excuse: bytes | None = None
        if run.group.rank == source:
            try:
                blob = (own or self._fetch(run, member, wanted)).to_bytes()
            except LatentMissing as missing:
                excuse = b"\n".join((_MISSING, *(name.encode() for name in missing.tried)))
            except CalledOff:
                excuse = _CALLED_OFF
        try:
            return run.group.broadcast_blob(blob, source, excuse=excuse)
        except BlobWithheld as withheld:
            _raise_alike(member, wanted, withheld.excuse)

    def _fetch(self, run: Run, member: mesh_pb2.BatchMember, wanted: CallInput) -> LatentState:
        off = Off(self._inbox, run.assignment, member.request_id)
        tried, began = [], Stopwatch()
        timeout_us = run.assignment.collective_timeout_us
        for holder in wanted.holders:
            tried.append(holder.worker)
            if holder.worker == self._worker:
                continue
            asked = mesh_pb2.LatentRequest(
                request_id=member.request_id,
                steps_done=wanted.version,
                attempt=member.attempt,
                wait_us=timeout_us // 2,
                artifact=wanted.artifact,
            )
            try:
                blob = fetch_from(self._rendezvous, self._ask, holder, asked, timeout_us / 1e6, off)
                state = LatentState.from_bytes(blob)
            except (BlobLost, StateCorrupt) as lost:
                what = wanted.artifact or "latent"
                log.warning("%s gave no %s: %s", holder.worker, what, lost)
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
        raise LatentMissing(
            member.request_id, wanted.version, tuple(tried), artifact=wanted.artifact
        )


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


def _raise_alike(member: mesh_pb2.BatchMember, wanted: CallInput, excuse: bytes) -> NoReturn:
    """On every member of a group what the source of an artifact has met with."""
    if excuse == _CALLED_OFF:
        raise CalledOff(member.request_id)
    tried = tuple(name.decode() for name in excuse.split(b"\n")[1:])
    raise LatentMissing(member.request_id, wanted.version, tried, artifact=wanted.artifact)


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


def _source(assignment: mesh_pb2.Assignment, wanted: CallInput) -> int | None:
    """Rank that broadcasts the artifact; None when every member holds it already.

    Computed from the plan alone, so that all members agree without a word. Rank 0 fetches where no
    member holds it.
    """
    holders = {h.worker for h in wanted.holders if h.steps_done == wanted.version}
    holding = [worker in holders for worker in assignment.group.members]
    if all(holding):
        return None
    return holding.index(True) if any(holding) else 0
