"""Where a job's inputs come from: held here, broadcast by a member, or fetched from a holder.

Who broadcasts follows from the plan alone, so that all members of a group agree without a word. A
source that has no latent to hand out says so in its place: then all members know why, the group
stands, and nobody is suspected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from gpuworker.collectives.groups import BlobWithheld
from gpuworker.executor import Stopwatch
from gpuworker.memory.latents import CalledOff, LatentMissing, LatentShelf
from gpuworker.operations.names import CallInput
from gpuworker.state import LatentState
from gpuworker.steps.fetching import Fetcher, Off, broadcaster
from gpuworker.steps.inbox import Inbox
from gpuworker.steps.prefetch import IN_TURN, Prefetch
from gpuworker.steps.run import Run
from hocket.tracing import spans
from hocket.v1 import mesh_pb2

_CALLED_OFF = b"called off"
_MISSING = b"missing"


class Sources:
    """Gets artifacts onto the shelf."""

    def __init__(
        self,
        worker: str,
        inbox: Inbox,
        shelf: LatentShelf,
        fetcher: Fetcher,
        ahead: Prefetch | None = None,
    ) -> None:
        """Without `ahead` every input is fetched in its turn."""
        self._worker = worker
        self._inbox = inbox
        self._shelf = shelf
        self._fetcher = fetcher
        self._ahead = ahead or Prefetch(worker, inbox, shelf, fetcher, IN_TURN)

    @contextmanager
    def in_hand(self, assignment: mesh_pb2.Assignment) -> Iterator[None]:
        """While an assignment is in hand, the inputs of those behind it come."""
        self._ahead.begin(assignment)
        try:
            yield
        finally:
            self._ahead.over(assignment)

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
        source = broadcaster(run.assignment, wanted)
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
        """From a holder outside, by now or in the meantime."""
        began, assignment = Stopwatch(), run.assignment
        found = self._ahead.take(assignment, member, wanted)
        if found is None:
            off = Off(self._inbox, assignment, member.request_id)
            found = self._fetcher.fetch(assignment, member, wanted, off)
        told: dict[str, str | int] = {
            spans.BYTES: found.size_bytes,
            spans.FROM: found.holder,
            spans.TO: self._worker,
        }
        run.sides.append(began.side(spans.TRANSFER, told))
        return found.state


def _raise_alike(member: mesh_pb2.BatchMember, wanted: CallInput, excuse: bytes) -> NoReturn:
    """On every member of a group what the source of an artifact has met with."""
    if excuse == _CALLED_OFF:
        raise CalledOff(member.request_id)
    tried = tuple(name.decode() for name in excuse.split(b"\n")[1:])
    raise LatentMissing(member.request_id, wanted.version, tried, artifact=wanted.artifact)
