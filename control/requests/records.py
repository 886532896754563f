"""Every request that control knows: the one owner of what it is, where it stands and what was told.

Others ask for moves (`receive`, `promise`, `run`, `progress`, `end` …) and get events back; nobody
else writes a record. Bounded: of ended requests the newest are kept, and none for longer
than the retention, with its key.

Events are numbered so that a number says more than the order. `accepted` is 1 and a `degraded` that
was promised with it 2; what follows is `term << 32 | count`; an ending has the last count there is.
So each number rises across leaders, and a leader that only read the promises stream numbers what it
finds there exactly as the one that wrote it.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from control.requests.figures import Figures
from control.requests.lifecycle import OPEN, LifecycleState, advanced
from hocket.v1 import control_pb2, generation_pb2, journal_pb2, mesh_pb2, types_pb2

ACCEPTED, DEGRADED = 1, 2  # sequences of these events
_LAST_COUNT = (1 << 32) - 1


@dataclass(slots=True)
class Record:
    """One request. Written by `Records` only."""

    submit: control_pb2.SubmitRequest
    wish: bytes  # digest of what its caller asked for
    state: LifecycleState = LifecycleState.RECEIVED
    accepted: generation_pb2.Accepted = field(default_factory=generation_pb2.Accepted)
    degraded: generation_pb2.Degraded | None = None
    accepted_us: int = 0  # on control's clock
    accepted_unix_us: int = 0  # the broker's stamp
    traceparent: str = ""
    count: int = 0  # events told under this leader
    progress: mesh_pb2.RequestEvent | None = None  # the newest
    media: types_pb2.MediaInfo | None = None  # of the newest report that counts
    ending: bool = False  # its end is on its way to the promises stream
    ended: mesh_pb2.RequestEvent | None = None
    ended_unix_us: int = 0
    predicted_us: dict[int, int] = field(default_factory=dict)  # step time, by assignment
    estimated_us: int = -(1 << 60)  # when its finish was last estimated
    finish_us: int = 0  # that estimate

    @property
    def id(self) -> str:
        return self.submit.request_id

    @property
    def tenant(self) -> str:
        return self.submit.request.tenant

    @property
    def detached(self) -> bool:
        return self.submit.request.detached

    @property
    def spec(self) -> types_pb2.GenerationSpec:
        """What is run: the variant, where it was degraded."""
        return self.submit.request.spec

    @property
    def is_open(self) -> bool:
        """Promised, and not told to have ended."""
        return self.state in OPEN

    def since(self, cursor: int) -> list[mesh_pb2.RequestEvent]:
        """What a follower that saw everything up to `cursor` has missed, in order."""
        events = [mesh_pb2.RequestEvent(request_id=self.id, sequence=ACCEPTED)]
        events[0].accepted.CopyFrom(self.accepted)
        if self.degraded is not None:
            events.append(mesh_pb2.RequestEvent(request_id=self.id, sequence=DEGRADED))
            events[-1].degraded.CopyFrom(self.degraded)
        events += [event for event in (self.progress, self.ended) if event is not None]
        return [event for event in events if event.sequence > cursor]


class Records:
    """Requests by id, by (tenant, idempotency key) and in the order of their acceptance."""

    def __init__(
        self, term: int = 0, ended_max: int = 10_000, retention_us: int = 86_400_000_000
    ) -> None:
        self._term = term
        self._ended_max = ended_max
        self._retention_us = retention_us
        self._all: dict[str, Record] = {}
        self._open: dict[str, Record] = {}
        self._received = 0
        self._ended: OrderedDict[str, Record] = OrderedDict()
        self._by_key: dict[tuple[str, str], str] = {}
        self._order: list[tuple[int, str]] = []  # (acceptance, id), ascending
        self.figures = Figures()

    # ---------------------------------------------------------------------------- questions

    @property
    def open_count(self) -> int:
        return len(self._open)

    @property
    def taken(self) -> int:
        """Places taken: open requests and those that wait for their answer."""
        return len(self._open) + self._received

    @property
    def ended_count(self) -> int:
        return len(self._ended)

    def open_ids(self) -> tuple[str, ...]:
        return tuple(self._open)

    def get(self, request: str) -> Record | None:
        return self._all.get(request)

    def is_open(self, request: str) -> bool:
        return request in self._open

    def same_key(self, submit: control_pb2.SubmitRequest) -> Record | None:
        """The request that an earlier call with this tenant and idempotency key made."""
        if not submit.request.idempotency_key:
            return None
        known = self._by_key.get(_key(submit))
        return None if known is None else self._all.get(known)

    def newest_first(self, before: tuple[int, str] | None = None) -> Iterator[Record]:
        """Promised and ended requests, from behind a place in that order on."""
        at = len(self._order) if before is None else bisect.bisect_left(self._order, before)
        while at > 0:
            at -= 1
            yield self._all[self._order[at][1]]

    # ---------------------------------------------------------------------------- moves

    def receive(self, submit: control_pb2.SubmitRequest, wish: bytes) -> Record:
        """Takes a place at the door, and the key. The id is new."""
        record = Record(submit=submit, wish=wish)
        assert record.id not in self._all, f"request {record.id} is known"
        self._all[record.id] = record
        self._received += 1
        if submit.request.idempotency_key:
            self._by_key[_key(submit)] = record.id
        return record

    def refuse(self, record: Record) -> None:
        """Gives the place back: nothing was promised, and nothing is remembered."""
        self._move(record, LifecycleState.REFUSED)
        self._received -= 1
        self._forget(record)

    def promise(
        self,
        record: Record,
        promise: journal_pb2.Promise,
        accepted_us: int,
        accepted_unix_us: int,
    ) -> None:
        """It is in the promises stream."""
        self._move(record, LifecycleState.PROMISED)
        self._received -= 1
        record.accepted = promise.answer
        record.degraded = promise.degraded if promise.HasField("degraded") else None
        record.traceparent = promise.traceparent
        record.accepted_us, record.accepted_unix_us = accepted_us, accepted_unix_us
        self._open[record.id] = record
        bisect.insort(self._order, (accepted_unix_us, record.id))

    def restore(
        self, promise: journal_pb2.Promise, accepted_us: int, stored_unix_us: int
    ) -> Record:
        """A request of an earlier leader, as the promises stream has it.

        `stored_unix_us` is the broker's stamp of that message; `accepted_us` when the request was
        accepted, on this process's clock.
        """
        record = self.receive(promise.submit, promise.wish_sha256 or b"")
        unix_us = promise.accepted_unix_us or stored_unix_us
        self.promise(record, promise, accepted_us, unix_us)
        if promise.HasField("ended"):
            event = ending_event(promise.ended)
            self.end(record.id, event, stored_unix_us, term=promise.term, counted=False)
        return record

    def detach(self, record: Record) -> None:
        """It lives by itself from now on, whoever leaves."""
        record.submit.request.detached = True

    def run(self, request: str, sequence: int, step_time_us: int) -> bool:
        """An assignment of it was sent; whether it was the first under this leader."""
        record = self._open[request]
        first = record.state is LifecycleState.PROMISED
        self._move(record, LifecycleState.RUNNING)
        record.predicted_us[sequence] = step_time_us
        return first

    def estimate(self, request: str, now_us: int, finish_us: int) -> None:
        """When it will finish, as of now."""
        record = self._open[request]
        record.estimated_us, record.finish_us = now_us, finish_us

    def made(self, request: str, media: types_pb2.MediaInfo) -> None:
        """Its media were written, says a report that counts."""
        self._open[request].media = media

    def progress(
        self, request: str, progress: generation_pb2.Progress
    ) -> mesh_pb2.RequestEvent | None:
        """The event that tells of it; None once the end is known."""
        record = self._open.get(request)
        if record is None or record.ending:
            return None
        record.count += 1
        event = mesh_pb2.RequestEvent(
            request_id=request, sequence=self._term << 32 | record.count, progress=progress
        )
        record.progress = event
        return event

    def begin_end(self, request: str) -> Record | None:
        """The record of a request that ends now; None where that is no news."""
        record = self._open.get(request)
        if record is None or record.ending:
            return None
        record.ending = True
        return record

    def end(
        self,
        request: str,
        event: mesh_pb2.RequestEvent,
        unix_us: int = 0,
        *,
        term: int | None = None,
        counted: bool = True,
    ) -> mesh_pb2.RequestEvent:
        """Its end is in the promises stream since `unix_us`; returns the event, numbered."""
        record = self._open.pop(request)
        self._move(record, _END_STATES[event.WhichOneof("event") or "failed"])
        event.request_id = request
        event.sequence = (self._term if term is None else term) << 32 | _LAST_COUNT
        record.ended, record.ended_unix_us = event, unix_us
        record.predicted_us.clear()
        if counted and record.submit.request.slo.deadline_us:
            on_time = record.accepted.predicted_on_time
            self.figures.count(event, record.spec.model, promised=on_time)
        _strip(record)
        self._ended[request] = record
        if record.state is LifecycleState.CANCELLED:  # whoever asks again wants it made
            self._drop_key(record)
        self._forget_old(unix_us)
        return event

    def forget(self, request: str) -> None:
        """An ended request and its key are no longer known."""
        self._forget(self._ended.pop(request))

    # ---------------------------------------------------------------------------- inside

    def _forget_old(self, unix_us: int) -> None:
        while self._ended:
            oldest = next(iter(self._ended.values()))
            is_kept = oldest.ended_unix_us + self._retention_us > unix_us
            if is_kept and len(self._ended) <= self._ended_max:
                return
            self.forget(oldest.id)

    def _move(self, record: Record, target: LifecycleState) -> None:
        record.state = advanced(record.id, record.state, target)

    def _forget(self, record: Record) -> None:
        del self._all[record.id]
        self._drop_key(record)
        place = (record.accepted_unix_us, record.id)
        at = bisect.bisect_left(self._order, place)
        if at < len(self._order) and self._order[at] == place:
            del self._order[at]

    def _drop_key(self, record: Record) -> None:
        """The key may belong to a newer request by now."""
        key = _key(record.submit)
        if self._by_key.get(key) == record.id:
            del self._by_key[key]


_END_STATES = {
    "finished": LifecycleState.FINISHED,
    "failed": LifecycleState.FAILED,
    "cancelled": LifecycleState.CANCELLED,
}


def ending_event(ended: journal_pb2.EndedRequest) -> mesh_pb2.RequestEvent:
    """The last event of a request, from what the promises stream keeps of it."""
    event = mesh_pb2.RequestEvent(request_id=ended.request_id)
    match ended.WhichOneof("outcome"):
        case "finished":
            event.finished.CopyFrom(ended.finished)
        case "failed":
            event.failed.CopyFrom(ended.failed)
        case _:
            event.cancelled.steps_done = ended.cancelled.steps_done
    return event


def _strip(record: Record) -> None:
    """An ended request needs its prompts and its workflow no more."""
    record.submit.ClearField("workflow")
    specs = [record.submit.request.spec, record.accepted.effective_spec]
    if record.degraded is not None:
        specs.append(record.degraded.effective_spec)
    for spec in specs:
        spec.ClearField("prompt")
        spec.ClearField("negative_prompt")


def _key(submit: control_pb2.SubmitRequest) -> tuple[str, str]:
    return submit.request.tenant, submit.request.idempotency_key
