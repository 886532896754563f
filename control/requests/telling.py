"""A request as askers see it: its state, and pages of many."""

from __future__ import annotations

from control.requests.lifecycle import LifecycleState, told
from control.requests.records import Record, Records
from hocket.v1 import control_pb2, generation_pb2

_PAGE, _PAGE_MAX = 100, 1000
_PAGE_BYTES_MAX = 2 << 20  # half of what a message may have


def status(record: Record) -> control_pb2.RequestStatus:
    """State of one request that was promised."""
    events = record.since(0)
    metadata = generation_pb2.GenerationMetadata(
        request_id=record.id,
        state=told(record.state),
        accepted=record.accepted,
        progress=record.progress.progress if record.progress is not None else None,
        degraded=record.degraded,
        accepted_unix_us=record.accepted_unix_us,
        ended_unix_us=record.ended_unix_us,
        cursor=str(events[-1].sequence),
    )
    return control_pb2.RequestStatus(metadata=metadata, tenant=record.tenant, ended=record.ended)


def is_known(record: Record, tenant: str | None) -> bool:
    """Whether this tenant may know of the request; None: an operator, who may know of all."""
    return record.state is not LifecycleState.RECEIVED and tenant in (None, record.tenant)


def page(
    records: Records, asked: control_pb2.ListRequestsRequest
) -> control_pb2.ListRequestsResponse:
    """Newest first; raises ValueError for a token that no page gave."""
    size = min(asked.page_size or _PAGE, _PAGE_MAX)
    tenant = asked.tenant if asked.HasField("tenant") else None
    answer, size_bytes = control_pb2.ListRequestsResponse(), 0
    for record in records.newest_first(_place(asked.page_token)):
        if not is_known(record, tenant) or (asked.state and told(record.state) != asked.state):
            continue
        if len(answer.requests) == size or size_bytes > _PAGE_BYTES_MAX:
            last = answer.requests[-1].metadata
            answer.next_page_token = f"{last.accepted_unix_us}-{last.request_id}"
            break
        answer.requests.append(status(record))
        size_bytes += answer.requests[-1].ByteSize()
    return answer


def _place(token: str) -> tuple[int, str] | None:
    if not token:
        return None
    unix_us, _, request = token.partition("-")
    return int(unix_us), request
