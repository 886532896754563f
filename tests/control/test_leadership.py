"""Who leads, on a real nats-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from control.leading.leadership import Leadership
from control.leading.promises import Deposed, Promises, open_stream
from hocket.clock import SystemClock
from hocket.errors import BrokerUnavailable
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.leader import LEADER_KEY, LeaderWatch
from hocket.messaging.stores import LeasedKey
from tests.brokers import running_broker

WAIT_S = 30.0
TTL_S = 1.0


class One:
    """One replica's side."""

    def __init__(self, cell: LeasedKey, name: str) -> None:
        ttl_us = int(TTL_S * 1e6)
        self.side = Leadership(cell, SystemClock(), f"{name}:1", name, ttl_us=ttl_us)
        self.keeping: asyncio.Task[NoReturn] | None = None

    async def lead(self, promises: Promises | None = None) -> None:
        is_ours = _nobody if promises is None else promises.is_ours
        await self.side.tell(await self.side.win() if promises is None else promises.term, is_ours)
        self.keeping = asyncio.create_task(self.side.keep(is_ours))

    def fall_silent(self) -> None:
        assert self.keeping is not None
        self.keeping.cancel()


async def _nobody() -> bool:
    return True


async def until_renewed(cell: LeasedKey, revision: int) -> None:
    """Three times, so that whoever wants it has seen it."""
    while True:
        with suppress(BrokerUnavailable):
            found = await cell.get()
            if found is not None and found[1] > revision + 2:
                return
        await asyncio.sleep(0.05)


@pytest.fixture
async def cell(bus: Bus, subjects: Subjects) -> LeasedKey:
    return await LeasedKey.open(bus, subjects.leader_bucket, LEADER_KEY, TTL_S)


@pytest.fixture
async def watch(bus: Bus, subjects: Subjects) -> AsyncIterator[LeaderWatch]:
    watching = LeaderWatch(bus, subjects.cluster)
    yield watching
    await watching.close()


async def test_a_second_replica_is_no_coup(cell: LeasedKey, watch: LeaderWatch) -> None:
    """It stands by for as long as the first one lives; it used to take the lead at once."""
    first, second = One(cell, "a"), One(cell, "b")
    async with asyncio.timeout(WAIT_S):
        await first.lead()
        assert await watch.next() == "a:1"
        waiting = asyncio.ensure_future(second.lead())
        held = await cell.get()
        assert held is not None
        await until_renewed(cell, held[1])
        assert not waiting.done() and first.keeping is not None and not first.keeping.done()
        first.fall_silent()
        await waiting
        assert second.side.term > first.side.term
        while await watch.next() != "b:1":
            pass
    second.fall_silent()


async def test_who_resigns_is_followed_at_once(cell: LeasedKey, watch: LeaderWatch) -> None:
    first, second = One(cell, "a"), One(cell, "b")
    async with asyncio.timeout(WAIT_S):
        await first.lead()
        assert await watch.next() == "a:1"
        waiting = asyncio.ensure_future(second.lead())
        await asyncio.sleep(0)
        first.fall_silent()
        await first.side.resign()
        await waiting
        seen = await watch.next()
        assert seen in ("", "b:1") and (seen or await watch.next()) == "b:1"
    second.fall_silent()


async def test_a_leader_that_was_stopped_learns_that_another_one_leads(cell: LeasedKey) -> None:
    first, second = One(cell, "a"), One(cell, "b")
    async with asyncio.timeout(WAIT_S):
        await first.lead()
        first.fall_silent()  # as SIGSTOP would have it
        await second.lead()
        with pytest.raises(Deposed):
            await first.side.keep(_nobody)
        await first.side.resign()
        assert (await cell.get()) is not None, "it is not the old one's to give back"
    second.fall_silent()


@pytest.mark.parametrize("how", ["stands still", "dies"])
async def test_a_broker_that_was_away_deposes_nobody(how: str, tmp_path: Path) -> None:
    """Longer than the key lives, and a standby is there: still the same term."""
    subjects = Subjects("still")
    with running_broker(tmp_path) as broker:
        bus = await Bus.connect(broker.url, "test")
        cell = await LeasedKey.open(bus, subjects.leader_bucket, LEADER_KEY, TTL_S)
        stream = await open_stream(bus, subjects)
        first, second = One(cell, "a"), One(cell, "b")
        async with asyncio.timeout(WAIT_S):
            term = await first.side.win()
            promises = await Promises.take(stream, subjects, term, SystemClock())
            await first.lead(promises)
            waiting = asyncio.ensure_future(second.lead())
            watch = LeaderWatch(bus, subjects.cluster)
            assert await watch.next() == "a:1"
            held = await cell.get()
            assert held is not None
            broker.stand_still() if how == "stands still" else broker.kill()
            await asyncio.sleep(2 * TTL_S)
            broker.go_on() if how == "stands still" else await broker.start_again()
            await until_renewed(cell, held[1])
            assert watch.address == "a:1"
            assert first.keeping is not None and not first.keeping.done()
            assert not waiting.done() and await promises.is_ours()
            assert first.side.term == promises.term
        waiting.cancel()
        first.fall_silent()
        await watch.close()
        await bus.close()


async def test_a_key_of_an_older_version_is_free(bus: Bus, subjects: Subjects) -> None:
    """It had a bucket without time to live, and an empty value under the same name."""
    old = await bus.jetstream.create_key_value(bucket=subjects.leader_bucket)
    revision = await old.update("leader", b"", last=0)
    cell = await LeasedKey.open(bus, subjects.leader_bucket, LEADER_KEY, TTL_S)
    one = One(cell, "a")
    async with asyncio.timeout(WAIT_S):
        await one.lead()
    assert one.side.term > revision
    one.fall_silent()
