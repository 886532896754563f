"""Fetches artifacts from the workers that hold them: the best holder first, then the next one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from gpuworker.collectives.rendezvous import BlobLost, Cancel, Rendezvous
from gpuworker.memory.latents import CalledOff, LatentMissing
from gpuworker.operations.names import CallInput
from gpuworker.state import LatentState, StateCorrupt
from gpuworker.steps.inbox import Inbox
from hocket.v1 import mesh_pb2, types_pb2

log = logging.getLogger(__name__)

# Asks a holder (worker name) for a latent and returns the store key; the third argument is looked
# at while it waits.
Ask = Callable[[str, mesh_pb2.LatentRequest, Cancel], mesh_pb2.LatentReply]
Admit = Callable[[int], None]  # returns once there is room for so many bytes


def admit_all(size_bytes: int) -> None:
    """There is always room."""


class Fetched(NamedTuple):
    """What a holder gave."""

    state: LatentState
    holder: str  # worker
    size_bytes: int  # on the wire


class Fetcher:
    """Of one worker. Thread-safe."""

    def __init__(self, worker: str, rendezvous: Rendezvous, ask: Ask) -> None:
        self._worker = worker
        self._rendezvous = rendezvous
        self._ask = ask

    def fetch(
        self,
        assignment: mesh_pb2.Assignment,
        member: mesh_pb2.BatchMember,
        wanted: CallInput,
        off: Cancel,
        admit: Admit = admit_all,
    ) -> Fetched:
        """What a job starts from; each holder waits for it half of the collectives' time-out.

        Raises `LatentMissing`, or `CalledOff` once `off` is set.
        """
        tried, timeout_us = [], assignment.collective_timeout_us
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
                blob = fetch_from(
                    self._rendezvous, self._ask, holder, asked, timeout_us / 1e6, off, admit
                )
                return Fetched(LatentState.from_bytes(blob), holder.worker, len(blob))
            except (BlobLost, StateCorrupt) as lost:
                what = wanted.artifact or "latent"
                log.warning("%s gave no %s: %s", holder.worker, what, lost)
                if off.is_set():
                    raise CalledOff(member.request_id) from lost
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
    admit: Admit = admit_all,
) -> bytes:
    """Asks a holder for a latent and fetches what it offers. Raises `BlobLost`."""
    reply = ask(holder.worker, asked, cancel)
    if reply.HasField("failure"):
        raise BlobLost(holder.worker, asked.request_id, reply.failure.message)
    admit(reply.size_bytes)
    return rendezvous.fetch(holder.store_address, reply.key, timeout_s, cancel)


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


def broadcaster(assignment: mesh_pb2.Assignment, wanted: CallInput) -> int | None:
    """Rank that broadcasts the artifact; None when every member holds it already.

    Computed from the plan alone, so that all members agree without a word. Rank 0 fetches where no
    member holds it.
    """
    holders = {h.worker for h in wanted.holders if h.steps_done == wanted.version}
    holding = [worker in holders for worker in assignment.group.members]
    if all(holding):
        return None
    return holding.index(True) if any(holding) else 0
