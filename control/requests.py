"""What control knows of a request beyond what the scheduler needs: its text, its caller, its trace,
its story.

Bounded: ended requests are kept, oldest dropped first, so that an idempotency key still finds them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from hocket.v1 import control_pb2, generation_pb2, journal_pb2, mesh_pb2, types_pb2


@dataclass
class Record:
    """One accepted request."""

    submit: control_pb2.SubmitRequest
    accepted: generation_pb2.Accepted
    accepted_us: int  # on control's clock
    accepted_unix_ns: int
    traceparent: str
    events: int = 0  # request events published so far
    first_run: bool = False  # an assignment was published
    last_run_sequence: int = -1
    estimated_us: int = -(1 << 60)  # when its finish was last estimated
    finish_us: int = 0  # that estimate
    media: types_pb2.MediaInfo | None = None
    ended: mesh_pb2.RequestEvent | None = None
    predicted_us: dict[int, int] = field(default_factory=dict)  # step time, by assignment

    @property
    def id(self) -> str:
        return self.submit.request_id

    @property
    def spec(self) -> types_pb2.GenerationSpec:
        return self.submit.request.spec


class Records:
    """Requests by id and by (tenant, idempotency key)."""

    def __init__(self, ended_max: int = 10_000) -> None:
        self._ended_max = ended_max
        self._open: dict[str, Record] = {}
        self._ended: OrderedDict[str, Record] = OrderedDict()
        self._by_key: dict[tuple[str, str], str] = {}

    @property
    def open_count(self) -> int:
        return len(self._open)

    @property
    def ended_count(self) -> int:
        return len(self._ended)

    def open_ids(self) -> tuple[str, ...]:
        return tuple(self._open)

    def add(self, record: Record) -> None:
        self._open[record.id] = record
        if record.submit.request.idempotency_key:
            self._by_key[_key(record.submit)] = record.id

    def restore(
        self, promise: journal_pb2.Promise, accepted_us: int, stored_unix_us: int
    ) -> Record:
        """A request of an earlier leader, as the promises stream has it."""
        record = Record(
            submit=promise.submit,
            accepted=promise.answer,
            accepted_us=accepted_us,
            accepted_unix_ns=(promise.accepted_unix_us or stored_unix_us) * 1000,
            traceparent=promise.traceparent,
        )
        self.add(record)
        if promise.HasField("ended"):
            self.end(record.id, _ending(promise.ended))
        return record

    def get(self, request: str) -> Record | None:
        return self._open.get(request) or self._ended.get(request)

    def is_open(self, request: str) -> bool:
        return request in self._open

    def same_key(self, submit: control_pb2.SubmitRequest) -> Record | None:
        """The request that an earlier call with this tenant and idempotency key made."""
        if not submit.request.idempotency_key:
            return None
        known = self._by_key.get(_key(submit))
        return None if known is None else self.get(known)

    def end(self, request: str, event: mesh_pb2.RequestEvent) -> None:
        record = self._open.pop(request)
        record.ended = event
        record.predicted_us.clear()
        self._ended[request] = record
        if event.HasField("cancelled"):  # whoever asks again wants it made, not refused
            self._by_key.pop(_key(record.submit), None)
        while len(self._ended) > self._ended_max:
            _, forgotten = self._ended.popitem(last=False)
            self._by_key.pop(_key(forgotten.submit), None)


def _key(submit: control_pb2.SubmitRequest) -> tuple[str, str]:
    return submit.request.tenant, submit.request.idempotency_key


def _ending(ended: journal_pb2.EndedRequest) -> mesh_pb2.RequestEvent:
    event = mesh_pb2.RequestEvent(request_id=ended.request_id)
    if ended.HasField("finished"):
        event.finished.CopyFrom(ended.finished)
    elif ended.HasField("failed"):
        event.failed.CopyFrom(ended.failed)
    else:
        event.cancelled.steps_done = ended.cancelled.steps_done
    return event
