"""A feed's bound, its order, and its end."""

from __future__ import annotations

import asyncio

import pytest

from hocket.messaging.feed import Feed


class _Over(Exception):
    """Nothing more will come."""


async def test_an_offer_waits_for_room() -> None:
    feed: Feed[int] = Feed(2)
    offers = [asyncio.ensure_future(feed.offer(number)) for number in range(4)]
    await asyncio.sleep(0)
    assert [offer.done() for offer in offers] == [True, True, False, False]
    assert [await feed.next() for _ in range(4)] == [0, 1, 2, 3]
    await asyncio.gather(*offers)
    assert (feed.pending, feed.drops) == (0, 0)


async def test_who_is_woken_and_cancelled_at_once_wakes_the_next() -> None:
    feed: Feed[int] = Feed(4)
    first, second = (asyncio.ensure_future(feed.next()) for _ in range(2))
    await asyncio.sleep(0)
    feed.put(1)
    first.cancel()
    assert await second == 1
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_who_was_cancelled_is_not_woken() -> None:
    feed: Feed[int] = Feed(4)
    first, second = (asyncio.ensure_future(feed.next()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    feed.put(1)
    assert await second == 1
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_an_ended_feed_gives_what_it_has_and_then_says_why() -> None:
    feed: Feed[int] = Feed(4)
    feed.put(1)
    feed.end(_Over())
    assert await feed.next() == 1
    for _ in range(2):
        with pytest.raises(_Over):
            await feed.next()


async def test_the_end_wakes_everybody() -> None:
    feed: Feed[int] = Feed(4)
    waiting = [asyncio.ensure_future(feed.next()) for _ in range(3)]
    await asyncio.sleep(0)
    feed.end(_Over())
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [_Over] * 3
