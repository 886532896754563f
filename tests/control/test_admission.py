"""Who gets a promise: room, time, causes, and that a promise outlives whoever asked for it."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from control.workflows.admitting import prepared
from hocket.errors import Refused, status_code
from hocket.v1 import control_pb2, generation_pb2, types_pb2
from tests.control.stage import STEP_US, Stage, running, submit_of


async def refused(stage: Stage, submit: control_pb2.SubmitRequest) -> types_pb2.Failure:
    answer = asyncio.ensure_future(stage.desk.admission.submit(submit))
    await stage.until(answer.done)
    return answer.result().rejected


async def test_places_are_counted_before_anybody_waits() -> None:
    """Twenty at once where there is room for two: two are accepted, the others hear so at once."""
    async with running(open_max=2) as stage:
        gateway = stage.attach()
        stage.shelf.is_open.clear()
        for number in range(20):
            stage.submit(gateway, f"r{number}", call=number)
        await stage.until(lambda: len(gateway.answers) == 18)
        assert {a.rejected.reason for a in gateway.answers.values()} == {"QUEUE_FULL"}
        assert all(a.rejected.retry_after_us for a in gateway.answers.values())
        stage.shelf.is_open.set()
        await stage.until(lambda: len(gateway.answers) == 20)
        assert stage.shelf.ids(ended=False) == ["r0", "r1"]
        await stage.work()
        stage.submit(gateway, "later", call=99)
        await stage.until(lambda: 99 in gateway.answers)
        assert gateway.answers[99].HasField("accepted")


async def test_a_crowd_at_the_door_is_told_so() -> None:
    async with running(waiting_max=3) as stage:
        gateway = stage.attach()
        await stage.settle()
        gateway.say(
            submits=[
                control_pb2.AttachedSubmit(call=n, submit=submit_of(f"r{n}")) for n in range(5)
            ]
        )
        await stage.until(lambda: len(gateway.answers) == 5)
        told = [gateway.answers[n].rejected.reason for n in range(5)]
        assert told == ["", "", "", "OVERLOADED", "OVERLOADED"]


async def test_a_burst_over_one_line_is_accepted_whole() -> None:
    async with running() as stage:
        gateway = stage.attach()
        gateway.say(
            submits=[
                control_pb2.AttachedSubmit(call=n, submit=submit_of(f"r{n:04}"), follower=f"f{n}")
                for n in range(1000)
            ]
        )
        await stage.until(lambda: len(gateway.answers) == 1000)
        assert all(a.HasField("accepted") for a in gateway.answers.values())
        assert stage.shelf.ids(ended=False) == [f"r{n:04}" for n in range(1000)]
        assert [gateway.answers[n].accepted.queue_depth for n in (0, 999)] == [0, 999]


async def test_an_expiry_counts_while_the_broker_stands_still() -> None:
    """The appends under way are bounded; who waits behind them longer than it said gets none."""
    async with running() as stage:
        gateway = stage.attach()
        stage.shelf.is_open.clear()
        gateway.say(
            submits=[
                control_pb2.AttachedSubmit(
                    call=n, submit=submit_of(f"r{n}"), expires_us=2_000_000, follower=f"f{n}"
                )
                for n in range(1100)
            ]
        )
        await stage.until(lambda: stage.shelf.begun == 1024)
        await stage.advance(2_000_000)
        stage.shelf.is_open.set()
        await stage.until(lambda: len(gateway.answers) == 1100)
        told = [a.rejected.reason for a in gateway.answers.values()]
        assert told.count("EXPIRED") == 1100 - 1024
        assert len(stage.shelf.ids(ended=False)) == 1024


@pytest.mark.parametrize("pauses", range(12))
async def test_a_caller_that_goes_away_leaves_no_ghost(pauses: int) -> None:
    """Cancelled at each await: what is stored is known, what is not known was not stored."""
    async with running() as stage:
        stage.shelf.is_open.clear()
        call = asyncio.ensure_future(stage.desk.admission.submit(submit_of("r")))
        for _ in range(pauses):
            await asyncio.sleep(0)
            stage.clock.settled()
        call.cancel()
        await stage.settle()
        stage.shelf.is_open.set()
        await stage.settle()
        stored = stage.shelf.ids(ended=False)
        record = stage.desk.records.get("r")
        assert (record is not None) == bool(stored)
        assert stage.desk.records.taken == len(stored)
        await stage.work()
        assert stage.shelf.ids(ended=True) == stored


@pytest.mark.parametrize("returns", [False, True])
async def test_a_follower_that_leaves_before_its_answer(returns: bool) -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.shelf.is_open.clear()
        stage.submit(gateway, "r")
        await stage.until(lambda: stage.shelf.begun)
        gateway.say(leaves=[control_pb2.Leave(follower="f-r", returns=returns)])
        await stage.settle()
        stage.shelf.is_open.set()
        await stage.work()
        ended = [p.ended.WhichOneof("outcome") for p in stage.shelf.stored if p.HasField("ended")]
        assert ended == (["finished"] if returns else ["cancelled"])


async def test_a_cancel_overtakes_the_promise() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.shelf.is_open.clear()
        stage.submit(gateway, "r")
        await stage.until(lambda: stage.shelf.begun)
        stage.cancel("r")
        stage.shelf.is_open.set()
        await stage.work()
        assert gateway.kinds("r") == ["cancelled"]


def test_a_role_that_nobody_holds_is_a_refusal_that_names_it() -> None:
    submit = submit_of("r")
    apart = generation_pb2.ModelInfo(name="m", operations=["denoise", "decode"])
    failure = prepared(submit, {"m": apart})
    assert failure is not None and failure.reason == "ROLES_NOT_SERVED"
    assert "encode_prompt of 'm': missing roles text" in failure.message
    assert failure.metadata["operations"] == "encode_prompt" and failure.retry_after_us
    error = Refused(failure.reason, failure.message)
    assert status_code(error) is grpc.StatusCode.UNAVAILABLE
    submit.workflow.nodes.add(id="pictures", op="decode")
    assert prepared(submit, {"m": apart}) is None, "it encodes nothing"
    submit.workflow.nodes.add(id="words", op="encode_prompt")
    assert prepared(submit, {"m": apart}) == failure


async def test_causes_are_named_as_they_are() -> None:
    async with running() as stage:
        unserved = submit_of("a")
        unserved.request.spec.model = "other"
        failure = await refused(stage, unserved)
        assert failure.reason == "MODEL_NOT_SERVED" and "served: m" in failure.message
        hopeless = submit_of(
            "b", slo=types_pb2.Slo(deadline_us=1, on_miss=types_pb2.ON_MISS_REJECT)
        )
        failure = await refused(stage, hopeless)
        assert failure.reason == "DEADLINE_UNATTAINABLE"
        assert failure.retry_after_us == 0, "nothing is in its way: waiting helps nothing"
        await stage.beat(leaving=True)
        failure = await refused(stage, submit_of("c"))
        assert failure.reason == "NO_WORKERS"
        assert (await refused(stage, submit_of(""))).reason == "INVALID_REQUEST"


async def test_a_deadline_behind_others_is_worth_another_try() -> None:
    async with running() as stage:
        gateway = stage.attach()
        for number in range(5):
            sooner = types_pb2.Slo(deadline_us=30 * STEP_US)
            stage.submit(gateway, f"r{number}", call=number, steps=8, slo=sooner)
        await stage.until(lambda: len(gateway.answers) == 5)
        slo = types_pb2.Slo(deadline_us=31 * STEP_US, on_miss=types_pb2.ON_MISS_REJECT)
        failure = await refused(stage, submit_of("b", slo=slo))
        assert failure.reason == "DEADLINE_UNATTAINABLE" and failure.retry_after_us > 0


async def test_a_deadline_that_an_idle_cluster_would_miss_is_worth_no_other_try() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "busy", steps=100)
        await stage.until(lambda: gateway.answers)
        slo = types_pb2.Slo(deadline_us=4 * STEP_US, on_miss=types_pb2.ON_MISS_REJECT)
        failure = await refused(stage, submit_of("b", slo=slo, steps=4))
        assert failure.reason == "DEADLINE_UNATTAINABLE"
        assert failure.retry_after_us == 0, "its encode and decode take a step's time each"


async def test_who_is_refused_is_in_nobodys_way() -> None:
    """A batch: the first is long and hopeless, the second is on time without it."""
    async with running() as stage:
        gateway = stage.attach()
        long = submit_of(
            "a", steps=100, slo=types_pb2.Slo(deadline_us=STEP_US, on_miss=types_pb2.ON_MISS_REJECT)
        )
        short = submit_of(
            "b",
            steps=4,
            slo=types_pb2.Slo(deadline_us=10 * STEP_US, on_miss=types_pb2.ON_MISS_REJECT),
        )
        gateway.say(
            submits=[
                control_pb2.AttachedSubmit(call=1, submit=long),
                control_pb2.AttachedSubmit(call=2, submit=short),
            ]
        )
        await stage.until(lambda: len(gateway.answers) == 2)
        assert gateway.answers[1].rejected.reason == "DEADLINE_UNATTAINABLE"
        assert gateway.answers[2].accepted.predicted_on_time


async def test_a_leader_that_has_just_begun_waits_for_its_first_worker() -> None:
    stage = Stage(settle_us=2_000_000)
    for part in stage.desk.parts():
        stage.own(part)
    early = asyncio.ensure_future(stage.desk.admission.submit(submit_of("r")))
    await stage.settle()
    assert not early.done()
    await stage.beat()
    await stage.until(early.done)
    assert early.result().HasField("accepted")
    await stage.close()


async def test_it_waits_no_longer_than_a_lease() -> None:
    stage = Stage(settle_us=2_000_000)
    for part in stage.desk.parts():
        stage.own(part)
    early = asyncio.ensure_future(stage.desk.admission.submit(submit_of("r")))
    await stage.advance(2_000_000)
    await stage.until(early.done)
    assert early.result().rejected.reason == "NO_WORKERS"
    await stage.close()


async def test_a_promise_says_how_binding_it_is() -> None:
    async with running(best_effort_wait_us_max=5_000_000) as stage:
        gateway = stage.attach()
        reject = types_pb2.Slo(deadline_us=60_000_000, on_miss=types_pb2.ON_MISS_REJECT)
        soft = types_pb2.Slo(
            deadline_us=60_000_000,
            on_miss=types_pb2.ON_MISS_REJECT,
            commitment=types_pb2.COMMITMENT_SOFT,
        )
        for number, slo in enumerate((reject, soft, types_pb2.Slo())):
            stage.submit(gateway, f"r{number}", call=number, slo=slo)
        await stage.until(lambda: len(gateway.answers) == 3)
        said = [gateway.answers[n].accepted for n in range(3)]
        assert [a.commitment for a in said] == [
            types_pb2.COMMITMENT_FIRM,
            types_pb2.COMMITMENT_SOFT,
            types_pb2.COMMITMENT_SOFT,
        ]
        assert all(a.predicted_latency_us_p95 >= a.predicted_latency_us > 0 for a in said)
        assert said[0].best_effort_wait_us_max == 5_000_000


async def test_of_the_yeses_how_many_were_kept() -> None:
    async with running() as stage:
        gateway = stage.attach()
        for number, deadline_us in enumerate((60_000_000, 60_000_000, 1, 0)):
            slo = types_pb2.Slo(deadline_us=deadline_us)
            stage.submit(gateway, f"r{number}", call=number, slo=slo)
        await stage.until(lambda: len(gateway.answers) == 4)
        await stage.work()
        figures = stage.desk.records.figures
        assert (figures.promised, figures.kept) == (2, 2)
        assert (figures.with_deadline, figures.on_time) == (3, 2)
