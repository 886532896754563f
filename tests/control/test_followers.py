"""Who follows belongs to control: leases of lines, grace, cancels of what nobody waits for."""

from __future__ import annotations

import pytest

from control.requests import outbox
from control.requests.followers import Followers
from hocket.v1 import control_pb2
from tests.control.stage import Gateway, Stage, running

GRACE_US = 10_000_000


def test_the_last_one_to_give_up_takes_the_request_along() -> None:
    followers = Followers(GRACE_US)
    followers.follow("a", "r", "line 1")
    followers.follow("b", "r", "line 2")
    assert followers.leave("a", "line 1", 0, returns=False) == ()
    assert followers.leave("a", "line 1", 0, returns=False) == (), "it had gone"
    assert followers.leave("b", "line 2", 0, returns=False) == ("r",)
    assert followers.count == 0 and followers.next_expiry_us() is None


def test_who_is_expected_back_has_the_grace_and_not_a_microsecond_more() -> None:
    followers = Followers(GRACE_US)
    followers.follow("a", "r", "line")
    assert followers.leave("a", "line", 5, returns=True) == ()
    assert followers.is_followed("r") and not tuple(followers.lines_of("r"))
    assert followers.next_expiry_us() == 5 + GRACE_US
    assert followers.expire(4 + GRACE_US) == ()
    assert followers.expire(5 + GRACE_US) == ("r",)


def test_a_line_that_ends_sends_its_followers_away_and_forgets_its_onlookers() -> None:
    followers = Followers(GRACE_US)
    followers.follow("a", "r", "line")
    followers.follow("o", "s", "line", onlooker=True)
    followers.lost("line", 0)
    assert followers.count == 1
    followers.follow("a", "r", "another line")
    assert followers.expire(GRACE_US) == (), "it came back in time"
    assert tuple(followers.lines_of("r")) == ("another line",)


def test_a_word_from_a_line_that_it_has_left_says_nothing() -> None:
    """The gateway that lost the follower says so late."""
    followers = Followers(GRACE_US)
    followers.follow("a", "r", "old")
    followers.follow("a", "r", "new")
    assert followers.leave("a", "old", 0, returns=False) == ()
    followers.lost("old", 0)
    assert tuple(followers.lines_of("r")) == ("new",)


def test_onlookers_keep_nothing_alive() -> None:
    followers = Followers(GRACE_US)
    followers.follow("o", "r", "line", onlooker=True)
    followers.follow("a", "r", "line")
    assert tuple(followers.lines_of("r")) == ("line",), "told once"
    assert followers.leave("a", "line", 0, returns=False) == ("r",)


def test_an_ended_request_has_no_followers() -> None:
    followers = Followers(GRACE_US)
    followers.follow("a", "r", "line")
    followers.expect("r", 0)
    followers.ended("r")
    assert followers.count == 0 and followers.expire(GRACE_US) == ()


async def accepted(stage: Stage, request: str = "r", **fields: object) -> Gateway:
    gateway = stage.attach()
    stage.submit(gateway, request, **fields)
    await stage.until(lambda: gateway.answers)
    return gateway


async def test_a_caller_that_moves_to_another_gateway_keeps_its_request() -> None:
    """The case that idempotency keys are for: the second call is there, then the first one ends."""
    async with running() as stage:
        first = await accepted(stage, idempotency_key="k")
        second = await accepted(stage, "other", idempotency_key="k")
        assert second.answers[1].request_id == "r"
        first.say(leaves=[control_pb2.Leave(follower="f-r")])
        first.hang_up()
        await stage.advance(2 * GRACE_US)
        await stage.work()
        assert second.kinds("r")[-1] == "finished"


async def test_nobody_waits_and_it_is_cancelled_at_once() -> None:
    async with running() as stage:
        gateway = await accepted(stage)
        gateway.say(leaves=[control_pb2.Leave(follower="f-r")])
        await stage.work()
    assert stage.shelf.stored[-1].ended.HasField("cancelled")


async def test_a_detached_request_needs_nobody() -> None:
    async with running() as stage:
        gateway = await accepted(stage, detached=True)
        gateway.say(leaves=[control_pb2.Leave(follower="f-r")])
        gateway.hang_up()
        await stage.advance(2 * GRACE_US)
        await stage.beat()
        await stage.work()
    assert stage.shelf.stored[-1].ended.HasField("finished")


async def test_a_gateway_that_dies_leaves_its_callers_the_grace() -> None:
    async with running() as stage:
        gateway = await accepted(stage)
        gateway.hang_up()
        await stage.advance(GRACE_US - 100_000)
        back = stage.attach()
        back.say(follows=[control_pb2.Follow(follower="f-r", request_id="r", cursor=1)])
        await stage.settle()
        assert not back.followed[0].missed, "accepted was heard"
        await stage.advance(GRACE_US)
        await stage.work()
        assert back.kinds("r")[-1] == "finished"


async def test_a_gateway_that_falls_silent_is_gone_after_three_seconds() -> None:
    async with running() as stage:
        (await accepted(stage)).beats = False
        await stage.advance(3_000_000)
        assert stage.desk.attachments.lines == 1
        await stage.advance(1_000_000)
        assert stage.desk.attachments.lines == 0
        await stage.advance(GRACE_US)
        await stage.beat()
        await stage.work()
    assert stage.shelf.stored[-1].ended.HasField("cancelled")


async def test_a_new_leader_waits_for_followers_of_the_old_one() -> None:
    async with running() as stage:
        gateway = await accepted(stage)
        gateway.hang_up()
        promise = stage.shelf.stored[0]
    async with running() as heir:
        heir.desk.records.restore(promise, heir.clock.now_us(), 1)
        heir.desk.attachments.expect_followers("r")
        await heir.settle()
        back = heir.attach()
        back.say(follows=[control_pb2.Follow(follower="f-r", request_id="r")])
        await heir.settle()
        assert [e.sequence for e in back.followed[0].missed] == [1]
        assert heir.desk.records.is_open("r")


async def test_another_tenants_request_is_not_known() -> None:
    async with running() as stage:
        gateway = await accepted(stage, tenant="t1")
        asked = [
            control_pb2.Follow(follower=f"x{tenant}", request_id=request, tenant=tenant)
            for request, tenant in (("r", "t1"), ("r", "t2"), ("nobody's", "t1"))
        ]
        gateway.say(follows=asked)
        await stage.settle()
        assert [f.refused.reason for f in gateway.followed] == [
            "",
            "UNKNOWN_REQUEST",
            "UNKNOWN_REQUEST",
        ]


async def test_a_slow_line_loses_progress_and_no_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "EVENTS_MAX", 60)
    async with running() as stage:
        gateway = stage.attach()
        await stage.settle()
        gateway.reads.clear()
        for number in range(40):
            stage.submit(gateway, f"r{number:02}", call=number, steps=2)
        await stage.settle()
        await stage.work()
        (line,) = stage.desk.attachments._lines
        assert len(line.outbox._events) <= outbox.EVENTS_MAX and line.outbox.dropped > 0
        gateway.reads.set()
        await stage.advance(1_000_000)
        assert all(gateway.kinds(f"r{number:02}")[-1:] == ["finished"] for number in range(40))
