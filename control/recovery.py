"""What a new leader does first: take up every accepted request that had not ended.

Their latents may still lie on workers, whose heartbeats say so: then they go on from there. Where
nobody holds one, they start again from the encode node, which gives the same picture, since
everything is drawn from the seed.
"""

from __future__ import annotations

import logging

from control import journal, translate
from control.driver import Driver
from control.requests import Record, Records
from control.scheduler.values import Arrived
from hocket.bus import Bus, Subjects
from hocket.clock import Clock, unix_ns
from hocket.v1 import journal_pb2, mesh_pb2

log = logging.getLogger(__name__)


async def recover(
    bus: Bus, subjects: Subjects, driver: Driver, records: Records, clock: Clock
) -> int:
    """Restores records from the journal and posts an arrival for each open one; returns their
    number.
    """
    found: dict[str, Record] = {}
    async for stored in journal.read(bus, subjects, "accepted"):
        accepted = stored.entry.accepted
        age_us = max(0, unix_ns() // 1000 - stored.unix_us)
        found[accepted.submit.request_id] = Record(
            submit=accepted.submit,
            accepted=accepted.answer,
            accepted_us=clock.now_us() - age_us,
            accepted_unix_ns=stored.unix_us * 1000,
            traceparent=accepted.traceparent,
        )
    async for stored in journal.read(bus, subjects, "ended"):
        ended = stored.entry.ended
        if ended.request_id in found:
            found[ended.request_id].ended = _ending(ended)
    taken_up = 0
    for record in found.values():
        records.add(record)
        if record.ended is not None:
            records.end(record.id, record.ended)
            continue
        request = translate.to_request(record.id, record.submit.request, record.accepted_us)
        driver.post(Arrived(at_us=driver.stamp(), request=request))
        taken_up += 1
    if taken_up:
        log.info("took up %d accepted requests of an earlier term", taken_up)
    return taken_up


def _ending(ended: journal_pb2.EndedRequest) -> mesh_pb2.RequestEvent:
    event = mesh_pb2.RequestEvent(request_id=ended.request_id)
    if ended.HasField("finished"):
        event.finished.CopyFrom(ended.finished)
    elif ended.HasField("failed"):
        event.failed.CopyFrom(ended.failed)
    else:
        event.cancelled.steps_done = ended.cancelled.steps_done
    return event
