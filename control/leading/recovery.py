"""What a new leader does first: take up every promised request that had not ended, and every wish
about a worker.

All of it comes from the promises stream. Their latents may still lie on workers, whose heartbeats
say so: then they go on from there. Where nobody holds one, they start again from the encode node,
which gives the same picture, since everything is drawn from the seed. What was told, and what came
of it, calibrates the new leader's answers from its first one on. Ages are differences of the
broker's own stamps (the new leader's Fence minus the request's): two hosts' clocks are never
compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from control import translate
from control.driver import Driver
from control.leading.promises import Promises
from control.leading.standby import Book
from control.requests import Records
from control.scheduler.core import Scheduler
from control.scheduler.values import Arrived, DrainRequested, Ended
from control.workers.leases import Leases
from control.workflows.compiled import workflow_of

log = logging.getLogger(__name__)


def recover(
    book: Book,
    promises: Promises,
    driver: Driver,
    records: Records,
    leases: Leases,
    expect_followers: Callable[[str], None],
    scheduler: Scheduler,
) -> int:
    """Restores records and what was learned from answers, and posts an arrival for each open one,
    wishes, and workers that live; returns the number of open ones. Before the first turn.
    """
    past: list[tuple[Arrived, Ended | None]] = []
    for kept in (*book.ended.values(), *book.open.values()):
        unix_us = kept.promise.accepted_unix_us or kept.unix_us
        accepted_us = min(driver.stamp(), promises.at_us(unix_us))
        record = records.restore(kept.promise, accepted_us, kept.unix_us)
        request = translate.to_request(record.submit, accepted_us)
        answer = kept.promise.answer
        on_time = answer.predicted_on_time
        if answer.predicted_latency_us:
            promised_us = accepted_us + answer.predicted_latency_us
            told = Arrived(
                at_us=accepted_us, request=request, promised_us=promised_us, on_time=on_time
            )
            past.append((told, translate.from_ended(kept.promise, accepted_us)))
        if not kept.promise.HasField("ended"):
            driver.post(
                Arrived(at_us=driver.stamp(), request=request, on_time=on_time),
                record.submit,
                workflow=workflow_of(record.submit),
            )
            if not record.detached:
                expect_followers(record.id)
    scheduler.restore_promises(past)
    promises.restore(book.ended)
    for worker in sorted(book.draining):
        driver.post(DrainRequested(at_us=driver.stamp(), worker=worker))
    for up in leases.restate(driver.stamp()):
        driver.post(up)
    if book.open:
        log.info("took up %d accepted requests of an earlier term", len(book.open))
    return len(book.open)
