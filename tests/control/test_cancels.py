"""A cancel that was acknowledged holds, whatever becomes of the leader that acknowledged it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from hocket.launching.broker import free_port
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.leader import LeaderWatch
from hocket.v1 import control_pb2
from tests.control.replica import asking, beat_for_ever, replica, started
from tests.control.stage import Stage, running

WAIT_S = 60.0


def asked_to_cancel(stage: Stage, request: str) -> asyncio.Future[bool]:
    """A Cancel under way; its answer says whether the request had not ended."""

    async def call() -> bool:
        asked = control_pb2.CancelRequestRequest(request_id=request)
        answer = await stage.desk.servicer.CancelRequest(asked, None)  # type: ignore[arg-type]
        return answer.was_running

    return asyncio.ensure_future(call())


async def test_it_is_not_acknowledged_while_the_broker_stands_still() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "r")
        await stage.until(stage.assigned)
        stage.shelf.is_open.clear()
        one, two = asked_to_cancel(stage, "r"), asked_to_cancel(stage, "r")
        await stage.work()
        assert not one.done() and not two.done()
        stage.shelf.is_open.set()
        await stage.until(lambda: one.done() and two.done())
        assert one.result() and two.result()
        await stage.work()
        assert gateway.kinds("r")[-1] == "cancelled"
        assert not await asked_to_cancel(stage, "r")


async def test_a_cancel_behind_an_end_waits_for_the_end_and_does_not_undo_it() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "r", steps=1)
        await stage.until(stage.assigned)
        stage.shelf.is_open.clear()
        await stage.work()
        cancel = asked_to_cancel(stage, "r")
        await stage.settle()
        assert not cancel.done()
        stage.shelf.is_open.set()
        await stage.until(cancel.done)
        assert gateway.kinds("r")[-1] == "finished"
        assert stage.shelf.ids(ended=True) == ["r"] and stage.shelf.stored[-1].HasField("ended")


async def test_a_cancel_while_the_promise_is_on_its_way_waits_for_it() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.shelf.is_open.clear()
        stage.submit(gateway, "r", detached=True)
        await stage.until(lambda: stage.shelf.begun)
        cancel = asked_to_cancel(stage, "r")
        await stage.settle()
        assert not cancel.done(), "the promise may be stored, and another leader find it"
        stage.shelf.is_open.set()
        await stage.until(cancel.done)
        assert stage.shelf.stored[-1].HasField("ended")


async def test_a_leader_that_is_killed_behind_its_answer_to_a_cancel(
    nats_url: str, bus: Bus, subjects: Subjects, tmp_path: Path
) -> None:
    """Whatever its answer said is so under the next leader."""
    beating = asyncio.ensure_future(beat_for_ever(bus, subjects))
    watch = LeaderWatch(bus, subjects.cluster)
    listen = f"127.0.0.1:{free_port()}"
    process = started(nats_url, subjects.cluster, tmp_path / "a", listen)
    try:
        async with asyncio.timeout(WAIT_S), asking(listen) as one:
            while await watch.next() != listen:
                pass
            requests = [f"r{number}" for number in range(20)]
            await asyncio.gather(*map(one.accepted, requests))
            assert all(await asyncio.gather(*map(one.cancel, requests)))
            process.kill()
            process.wait(10)
            async with (
                replica(nats_url, subjects.cluster, tmp_path / "b") as second,
                asking(await second.leads()) as two,
            ):
                for request in requests:
                    asked = control_pb2.GetRequestRequest(request_id=request)
                    status = (await two.stub.GetRequest(asked)).status
                    assert status.ended.HasField("cancelled")
    finally:
        beating.cancel()
        process.kill()
        process.wait(10)
        await watch.close()
