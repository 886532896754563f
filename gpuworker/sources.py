"""Where a job's latent comes from: held here, broadcast by a member, or fetched from a holder.

Who broadcasts follows from the plan alone, so that all members of a group agree without a word.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from gpuworker.executor import Stopwatch
from gpuworker.inbox import Inbox
from gpuworker.latents import LatentMissing, LatentShelf
from gpuworker.rendezvous import BlobLost, Rendezvous
from gpuworker.run import Run
from gpuworker.state import LatentState
from hocket import spans
from hocket.v1 import mesh_pb2

log = logging.getLogger(__name__)

# Asks a holder (worker name) for a latent and returns the store key, or raises LatentMissing.
Ask = Callable[[str, mesh_pb2.LatentRequest], mesh_pb2.LatentReply]


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
                raise LatentMissing(member.request_id, steps_done, (self._worker,))
            return own
        began = Stopwatch()
        if run.group.rank == source and own is None:
            own = self._fetch(run, member)
        blob = own.to_bytes() if own is not None and run.group.rank == source else None
        content = run.group.broadcast_blob(blob, source)
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

    def _fetch(self, run: Run, member: mesh_pb2.BatchMember) -> LatentState:
        tried, began = [], Stopwatch()
        for holder in member.holders:
            if holder.worker == self._worker:
                continue
            tried.append(holder.worker)
            reply = self._ask(
                holder.worker,
                mesh_pb2.LatentRequest(
                    request_id=member.request_id,
                    steps_done=member.first_step,
                    attempt=member.attempt,
                    wait_us=run.assignment.collective_timeout_us // 2,
                ),
            )
            if reply.HasField("failure"):
                log.warning("%s gave no latent: %s", holder.worker, reply.failure.message)
                continue
            try:
                blob = self._rendezvous.fetch(
                    holder.store_address,
                    reply.key,
                    run.assignment.collective_timeout_us / 1e6,
                    Off(self._inbox, run.assignment, member.request_id),
                )
            except BlobLost as lost:
                log.warning("the latent of %s was lost: %s", member.request_id, lost)
                break
            run.sides.append(
                began.side(
                    spans.TRANSFER,
                    {spans.BYTES: len(blob), spans.FROM: holder.worker, spans.TO: self._worker},
                )
            )
            return LatentState.from_bytes(blob)
        raise LatentMissing(member.request_id, member.first_step, tuple(tried))


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
