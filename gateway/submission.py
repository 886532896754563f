"""Handing a request to control and following what becomes of it, without a gap between the two.

Control tells each event once, on the request's subject, and repeats nothing. So the subject is
followed before Submit; when an idempotency key leads to an earlier request, that one's subject is
followed and control is asked again. The same question closes any gap that a lost broker connection
may have torn: a request without a key gets its own id as the key, which makes Submit repeatable.

    follow(own) -> Submit -> same id:    events are complete
                          -> other id:   follow(other) -> Submit -> already finished, or events
    silence for `recheck_s` ------------------------------> Submit -> already finished, or wait on
"""

from __future__ import annotations

import asyncio

import nats.errors

from gateway.mesh import Mesh
from hocket.bus import Feed
from hocket.errors import BrokerUnavailable, NotReady
from hocket.v1.control_pb2 import SubmitRequest, SubmitResponse
from hocket.v1.generation_pb2 import GenerateRequest
from hocket.v1.mesh_pb2 import RequestEvent

_REATTACHES_MAX = 3
_BACKLOG_MAX = 32  # events; beyond it a slow caller's progress is dropped


class Submission:
    """One request on its way through control. Close it when the caller is gone or served."""

    def __init__(self, mesh: Mesh, request_id: str, request: GenerateRequest) -> None:
        self._mesh = mesh
        self._submit = SubmitRequest(request_id=request_id, request=request)
        if not request.idempotency_key:
            self._submit.request.idempotency_key = request_id
        self._feed: Feed[RequestEvent] | None = None
        self.request_id = request_id  # of the request that answers
        self.progress_dropped = 0

    async def send(self) -> SubmitResponse:
        """Submits; when it returns, every later event of `request_id` will reach `next_event`."""
        await self._follow(self.request_id)
        for _ in range(_REATTACHES_MAX):
            answer = await self._ask()
            if answer.request_id in ("", self.request_id) or answer.HasField("rejected"):
                return answer
            await self._follow(answer.request_id)
        raise NotReady("control keeps naming other requests for this idempotency key")

    async def next_event(self) -> RequestEvent:
        """The next event; asks control how the request stands when none comes."""
        assert self._feed is not None, "send comes first"
        while True:
            try:
                async with asyncio.timeout(self._mesh.settings.recheck_s):
                    event = await self._feed.next()
            except TimeoutError:
                ended = _as_event(await self.send())
                if ended is not None:
                    return ended
                continue
            if event.HasField("progress") and self._feed.pending > _BACKLOG_MAX:
                self.progress_dropped += 1
                continue
            return event

    async def close(self) -> None:
        if self._feed is not None:
            await self._feed.close()
            self._feed = None

    async def _follow(self, request_id: str) -> None:
        if self._feed is not None and request_id == self.request_id:
            return
        await self.close()
        self.request_id = request_id
        subject = self._mesh.subjects.event(request_id)
        try:
            self._feed = await self._mesh.bus.follow(subject, RequestEvent)
            await self._mesh.bus.flush()  # the broker knows of us before control has the request
        except nats.errors.Error as error:
            url = self._mesh.settings.nats_url
            raise BrokerUnavailable(url=url, cause=str(error)) from error

    async def _ask(self) -> SubmitResponse:
        # May be asked twice: the idempotency key makes a second Submit the first one.
        return await self._mesh.cluster.ask(
            lambda control: control.Submit(self._submit, wait_for_ready=True),
            self._mesh.settings.submit_timeout_s,
        )


def _as_event(answer: SubmitResponse) -> RequestEvent | None:
    match answer.WhichOneof("outcome"):
        case "already_finished":
            finished = answer.already_finished
            return RequestEvent(request_id=answer.request_id, finished=finished)
        case "rejected":
            return RequestEvent(request_id=answer.request_id, failed=answer.rejected)
        case _:
            return None
