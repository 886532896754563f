"""What the cluster has written down about its requests, read from the broker's streams.

Each request's newest promise is its state. A cluster of before the promises stream has `accepted`
and `ended` entries in its journal instead; both are read, so that the same run judges both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

import nats
import nats.errors
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from bench.chaos.checks import OPEN, Written
from bench.chaos.history import CANCELLED, FAILED, FINISHED
from hocket.v1.journal_pb2 import EndedRequest, JournalEntry, Promise

_OUTCOMES = {"finished": FINISHED, "failed": FAILED, "cancelled": CANCELLED}
_ANSWER_S = 10.0


async def written(nats_url: str, cluster: str) -> list[Written]:
    """The state of every request that is kept."""
    client = await nats.connect(nats_url.split(","), connect_timeout=5)
    try:
        stream = client.jetstream(timeout=_ANSWER_S)
        subject = f"hocket.v1.{cluster}.promise.request.>"
        promises = [m async for m in _messages(stream, f"hocket-{cluster}-promises", subject)]
        if promises:
            return [promised(data) for data in promises]
        journal = f"hocket.v1.{cluster}.journal.>"
        entries = [m async for m in _messages(stream, f"hocket-{cluster}-journal", journal)]
        return journalled([JournalEntry.FromString(data) for data in entries])
    finally:
        await client.close()


def promised(data: bytes) -> Written:
    """The state that a promise says."""
    promise = Promise.FromString(data)
    request = promise.submit.request
    ended = promise.HasField("ended")
    return Written(
        request_id=promise.submit.request_id,
        state=_outcome(promise.ended) if ended else OPEN,
        key=request.idempotency_key,
        endings=int(ended),
    )


def journalled(entries: list[JournalEntry]) -> list[Written]:
    """The states that a journal of facts says, in the order of acceptance."""
    accepted = {
        e.accepted.submit.request_id: e.accepted.submit.request.idempotency_key
        for e in entries
        if e.HasField("accepted")
    }
    endings = Counter(e.ended.request_id for e in entries if e.HasField("ended"))
    states = {e.ended.request_id: _outcome(e.ended) for e in entries if e.HasField("ended")}
    return [
        Written(name, states.get(name, OPEN), key, endings[name]) for name, key in accepted.items()
    ]


def _outcome(ended: EndedRequest) -> str:
    return _OUTCOMES.get(ended.WhichOneof("outcome") or "", FAILED)


async def _messages(stream: JetStreamContext, name: str, subject: str) -> AsyncIterator[bytes]:
    """All messages of a stream, oldest first; none where there is no such stream."""
    try:
        last = (await stream.stream_info(name)).state.last_seq
    except NotFoundError:
        return
    sequence = 1
    while sequence <= last:
        try:
            found = await stream.get_msg(name, seq=sequence, subject=subject, next=True)
        except NotFoundError:
            return
        assert found.seq is not None
        yield found.data or b""
        sequence = found.seq + 1
