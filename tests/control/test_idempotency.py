"""Ids are used once, keys mean one wish, and both go with the record that they name."""

from __future__ import annotations

import asyncio

import pytest

from control.requests import wishes
from control.requests.records import Records, ending_event
from hocket.v1 import control_pb2, journal_pb2, types_pb2
from tests.control.stage import Gateway, Stage, running, submit_of


async def ask(stage: Stage, gateway: Gateway, request: str, call: int, **fields: object) -> str:
    """What one submit is answered."""
    stage.submit(gateway, request, call, **fields)
    await stage.until(lambda: call in gateway.answers)
    answer = gateway.answers[call]
    return answer.rejected.reason or answer.WhichOneof("outcome") or ""


async def test_a_cancelled_request_does_not_rise_again() -> None:
    """Its gateway may repeat the submit by itself; only another id with the key starts anew."""
    async with running() as stage:
        gateway = stage.attach()
        assert await ask(stage, gateway, "x1", 1, idempotency_key="k") == "accepted"
        stage.cancel("x1")
        await stage.work()
        assert gateway.kinds("x1")[-1] == "cancelled"
        assert await ask(stage, gateway, "x1", 2, idempotency_key="k") == "CANCELLED"
        assert await ask(stage, gateway, "x2", 3, idempotency_key="k") == "accepted"
        await stage.work()
        assert gateway.kinds("x2")[-1] == "finished"
    assert stage.shelf.ids(ended=False) == ["x1", "x2"]
    assert stage.shelf.ids(ended=True) == ["x1", "x2"]


async def test_a_repeated_id_is_answered_from_the_record() -> None:
    async with running() as stage:
        gateway = stage.attach()
        assert await ask(stage, gateway, "r", 1) == "accepted"
        assert await ask(stage, gateway, "r", 2) == "accepted"
        assert gateway.answers[1] == gateway.answers[2]
        assert [e.WhichOneof("event") for e in gateway.followed[0].missed] == ["accepted"]
        await stage.work()
        assert await ask(stage, gateway, "r", 3) == "already_finished"
        assert gateway.answers[3].already_finished.media.object_name == "made"
        other = stage.attach()
        assert await ask(stage, other, "r", 1, seed=2) == "IDEMPOTENCY_KEY_REUSED"
    assert stage.shelf.ids(ended=False) == ["r"]


async def test_two_submits_of_one_key_at_once_make_one_request() -> None:
    async with running() as stage:
        one, two = stage.attach(), stage.attach()
        stage.shelf.is_open.clear()
        stage.submit(one, "a", idempotency_key="k")
        stage.submit(two, "b", idempotency_key="k")
        await stage.until(lambda: stage.shelf.begun)
        stage.shelf.is_open.set()
        await stage.until(lambda: one.answers and two.answers)
        assert one.answers[1].request_id == two.answers[1].request_id == "a"
        assert two.followed[0].follower == "f-b"
        await stage.work()
        assert one.kinds("a")[-1] == two.kinds("a")[-1] == "finished"
    assert stage.shelf.ids(ended=False) == ["a"]


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({}, "accepted"),
        ({"seed": 2}, "IDEMPOTENCY_KEY_REUSED"),
        ({"steps": 5}, "IDEMPOTENCY_KEY_REUSED"),
        ({"slo": types_pb2.Slo(deadline_us=5_000_000)}, "accepted"),
        ({"slo": types_pb2.Slo(on_miss=types_pb2.ON_MISS_REJECT)}, "IDEMPOTENCY_KEY_REUSED"),
        ({"progress_every": 7, "detached": True}, "accepted"),
    ],
)
async def test_a_key_means_one_wish(change: dict[str, object], answer: str) -> None:
    """What a retry may change is left out of it."""
    async with running() as stage:
        gateway = stage.attach()
        first = {"slo": types_pb2.Slo(deadline_us=9_000_000), "idempotency_key": "k"}
        assert await ask(stage, gateway, "a", 1, **first) == "accepted"
        again = {**first, **change}
        assert await ask(stage, gateway, "b", 2, **again) == answer
        if answer != "accepted":
            assert "idempotency_key" in gateway.answers[2].rejected.message


async def test_the_callers_own_digest_decides() -> None:
    """Where no seed was given each call drew its own: the gateway's digest says it is one wish."""
    async with running() as stage:
        gateway = stage.attach()
        key = {"idempotency_key": "k", "wish": b"w" * 32}
        assert await ask(stage, gateway, "a", 1, seed=1, **key) == "accepted"
        assert await ask(stage, gateway, "b", 2, seed=2, **key) == "accepted"
        key["wish"] = b"v" * 32
        assert await ask(stage, gateway, "c", 3, seed=1, **key) == "IDEMPOTENCY_KEY_REUSED"


async def test_keys_of_two_tenants_are_two_keys() -> None:
    async with running() as stage:
        gateway = stage.attach()
        assert await ask(stage, gateway, "a", 1, idempotency_key="k", tenant="t1") == "accepted"
        assert await ask(stage, gateway, "b", 2, idempotency_key="k", tenant="t2") == "accepted"
        assert gateway.answers[2].request_id == "b"


def ended(records: Records, request: str, key: str, *, cancelled: bool) -> None:
    submit = submit_of(request, idempotency_key=key)
    record = records.receive(submit, wishes.digest(submit))
    records.promise(record, journal_pb2.Promise(submit=submit), 0, len(request))
    outcome = journal_pb2.EndedRequest(request_id=request)
    if cancelled:
        outcome.cancelled.steps_done = 1
    else:
        outcome.finished.on_time = True
    records.end(request, ending_event(outcome), 1)


def same_key(records: Records, key: str) -> str:
    known = records.same_key(
        control_pb2.SubmitRequest(request=submit_of("", idempotency_key=key).request)
    )
    return "" if known is None else known.id


def test_forgetting_an_old_request_leaves_the_key_of_the_newer_one() -> None:
    records = Records(ended_max=2)
    ended(records, "a", "k", cancelled=True)
    ended(records, "b", "k", cancelled=False)
    ended(records, "c", "", cancelled=False)
    assert records.get("a") is None, "the bound took it"
    assert same_key(records, "k") == "b"


def test_a_key_is_forgotten_with_its_record() -> None:
    records = Records(ended_max=1)
    ended(records, "a", "k", cancelled=False)
    ended(records, "b", "", cancelled=False)
    assert same_key(records, "k") == ""
    records.forget("b")
    assert records.get("b") is None and records.ended_count == 0


async def test_many_at_once_with_one_key_are_one_request() -> None:
    async with running() as stage:
        gateways = [stage.attach() for _ in range(5)]
        for number, gateway in enumerate(gateways):
            stage.submit(gateway, f"r{number}", idempotency_key="k")
        await stage.until(lambda: all(g.answers for g in gateways))
        assert {g.answers[1].request_id for g in gateways} == {"r0"}
        await asyncio.sleep(0)
    assert stage.shelf.ids(ended=False) == ["r0"]


def kept_detached(stage: Stage, request: str) -> list[bool]:
    """As the promises stream was told, promise by promise."""
    stored = (p.submit for p in stage.shelf.stored if not p.HasField("ended"))
    return [s.request.detached for s in stored if s.request_id == request]


async def test_an_operation_that_joins_by_its_key_outlives_the_first_caller() -> None:
    async with running(grace_us=1_000_000) as stage:
        one, two = stage.attach(), stage.attach()
        assert await ask(stage, one, "a", 1, idempotency_key="k") == "accepted"
        stage.shelf.is_open.clear()
        stage.submit(two, "b", 2, idempotency_key="k", detached=True, follower="")
        await stage.until(lambda: stage.shelf.begun == 2)
        assert not two.answers, "it is told when it is durable"
        stage.shelf.is_open.set()
        await stage.until(lambda: two.answers)
        assert two.answers[2].accepted.request_id == "a"
        assert kept_detached(stage, "a") == [False, True]
        assert stage.shelf.stored[1].accepted_unix_us == 1_000_001
        one.say(leaves=[control_pb2.Leave(follower="f-a", returns=False)])
        await stage.advance(3_000_000)
        record = stage.desk.records.get("a")
        assert record is not None and record.is_open
        await stage.work()
        assert record.ended is not None and record.ended.HasField("finished")
        assert stage.shelf.stored[-1].HasField("ended"), "its end is the last word"


async def test_a_known_key_is_answered_whatever_else_is_asked_without_defaults() -> None:
    """A gateway that hears of no worker cannot fill them in; the wish tells that it is the same."""
    async with running() as stage:
        one, two = stage.attach(), stage.attach()
        first = submit_of("a", wish=b"w" * 32, idempotency_key="k")
        one.say(submits=[control_pb2.AttachedSubmit(call=1, submit=first, follower="f-a")])
        await stage.until(lambda: one.answers)
        submit = submit_of("b", wish=b"w" * 32, steps=0, idempotency_key="k")
        two.say(submits=[control_pb2.AttachedSubmit(call=2, submit=submit, follower="f-b")])
        await stage.until(lambda: two.answers)
        assert two.answers[2].accepted.request_id == "a"


async def test_an_unknown_key_admits_nothing_that_lacks_its_defaults() -> None:
    """The gateway heard of no worker, control did: it ran a request with a guidance scale of 0."""
    async with running() as stage:
        gateway = stage.attach()
        submit = submit_of("a", wish=b"w" * 32, idempotency_key="k")
        submit.known_only = True
        gateway.say(submits=[control_pb2.AttachedSubmit(call=1, submit=submit, follower="f-a")])
        await stage.until(lambda: gateway.answers)
        assert gateway.answers[1].rejected.reason == "NO_WORKERS"
        assert not stage.desk.records.get("a") and not stage.shelf.ids(ended=False)
        whole = submit_of("b", wish=b"w" * 32, idempotency_key="k")
        gateway.say(submits=[control_pb2.AttachedSubmit(call=2, submit=whole, follower="f-b")])
        await stage.until(lambda: len(gateway.answers) == 2)
        assert gateway.answers[2].accepted.request_id == "b"


async def test_what_is_stored_is_accepted_though_a_joiner_finds_no_room() -> None:
    """The first caller used to be refused, too, and its request stayed open for nobody."""
    async with running() as stage:
        one, two = stage.attach(), stage.attach()
        stage.shelf.room = 1
        stage.shelf.is_open.clear()
        stage.submit(one, "a", 1, idempotency_key="k")
        await stage.until(lambda: stage.shelf.begun)
        stage.submit(two, "b", 2, idempotency_key="k", detached=True, follower="")
        await stage.settle()
        stage.shelf.is_open.set()
        await stage.until(lambda: one.answers and two.answers)
        assert one.answers[1].HasField("accepted")
        assert two.answers[2].rejected.reason == "QUEUE_FULL"
        assert stage.desk.records.is_open("a")


@pytest.mark.parametrize("begun", [0, 1])
async def test_an_operation_may_join_before_the_first_answer(begun: int) -> None:
    async with running(grace_us=1_000_000) as stage:
        one, two = stage.attach(), stage.attach()
        stage.shelf.is_open.clear()
        stage.submit(one, "a", 1, idempotency_key="k")
        if begun:
            await stage.until(lambda: stage.shelf.begun)
        stage.submit(two, "b", 2, idempotency_key="k", detached=True, follower="")
        await stage.settle()
        stage.shelf.is_open.set()
        await stage.until(lambda: one.answers and two.answers)
        assert kept_detached(stage, "a")[-1]
        one.say(leaves=[control_pb2.Leave(follower="f-a", returns=False)])
        await stage.advance(3_000_000)
        assert stage.desk.records.is_open("a")
