"""What a new leader does first: take up every accepted request that had not ended.

Their latents may still lie on workers, whose heartbeats say so: then they go on from there. Where
nobody holds one, they start again from the encode node, which gives the same picture, since
everything is drawn from the seed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from control import journal, translate
from control.driver import Driver
from control.requests.records import Records
from control.scheduler.values import Arrived
from hocket.bus import Bus, Subjects
from hocket.clock import Clock, unix_ns
from hocket.v1 import journal_pb2

log = logging.getLogger(__name__)


async def recover(
    bus: Bus,
    subjects: Subjects,
    driver: Driver,
    records: Records,
    clock: Clock,
    expect_followers: Callable[[str], None],
) -> int:
    """Restores records from the journal and posts an arrival for each open one; returns their
    number.
    """
    found: dict[str, tuple[journal_pb2.Promise, int]] = {}
    async for stored in journal.read(bus, subjects, "accepted"):
        accepted = stored.entry.accepted
        promise = journal_pb2.Promise(
            term=stored.entry.term,
            submit=accepted.submit,
            answer=accepted.answer,
            traceparent=accepted.traceparent,
            accepted_unix_us=stored.unix_us,
        )
        found[accepted.submit.request_id] = promise, stored.unix_us
    async for stored in journal.read(bus, subjects, "ended"):
        ended = stored.entry.ended
        if ended.request_id in found:
            promise, _ = found[ended.request_id]
            promise.ended.CopyFrom(ended)
            found[ended.request_id] = promise, stored.unix_us
    taken_up = 0
    for promise, stored_us in found.values():
        age_us = max(0, unix_ns() // 1000 - promise.accepted_unix_us)
        record = records.restore(promise, clock.now_us() - age_us, stored_us)
        if not record.is_open:
            continue
        request = translate.to_request(record.id, record.submit.request, record.accepted_us)
        driver.post(Arrived(at_us=driver.stamp(), request=request))
        if not record.detached:
            expect_followers(record.id)
        taken_up += 1
    if taken_up:
        log.info("took up %d accepted requests of an earlier term", taken_up)
    return taken_up
