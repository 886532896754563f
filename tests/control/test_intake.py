"""What comes in from workers: checked, counted, and answered to the process that said it."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from control.scheduler.values import Ended, Event, WorkerUp
from hocket import garbage
from hocket.clock import ManualClock
from hocket.v1 import control_pb2, mesh_pb2, types_pb2
from tests.control.stage import TERM, Stage, running


async def test_payloads_that_make_no_sense_are_counted_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running() as stage:
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                await stage.beat("x" * 5000)
                await stage.beat("w9", term=1 << 62)
            await stage.intake.report(mesh_pb2.StepReport(term=TERM))
        assert set(stage.desk.wiring.leases.alive) == {"w0"}
        assert stage.desk.troubles == {"refused heartbeats": 6, "refused reports": 1}
        assert len(caplog.records) == 3


async def test_a_refused_incarnation_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as stage:
        leases = stage.desk.wiring.leases
        monkeypatch.setattr(leases, "refused", lambda beat: "another one lives")
        before = len(stage.wire.said)
        await stage.beat("w0", incarnation="b")
        ((subject, told),) = stage.wire.said[before:]
        assert isinstance(told, mesh_pb2.Assign) and subject.endswith(".assign.w0")
        assert (told.incarnation, told.refused) == ("b", "another one lives")
        assert leases.alive["w0"].heartbeat.incarnation == "a"


async def test_an_assignment_names_the_process_that_the_scheduler_meant() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "r")
        await stage.until(stage.assigned)
        assert stage.wire.of(mesh_pb2.Assign)[-1].incarnation == "a"
        await stage.beat(leaving=True)
        await stage.beat(incarnation="b")
        stage.submit(gateway, "s", call=2)
        await stage.settle()
        assert stage.wire.of(mesh_pb2.Assign)[-1].incarnation == "b"
        stage.cancel("s")
        await stage.settle()
        assert {t.incarnation for t in stage.wire.of(mesh_pb2.Truncate)} <= {"b"}


async def test_a_worker_that_is_gone_leaves_nothing_behind() -> None:
    async with running() as stage:
        for number in range(50):
            await stage.beat(f"x{number}")
            await stage.beat(f"x{number}", leaving=True)
        assert set(stage.desk.publisher._incarnations) == {"w0"}
        assert set(stage.desk.publisher._truncates) <= {"w0"}


async def test_a_worker_that_was_cut_off_hears_what_was_called_off_meanwhile() -> None:
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "r")
        await stage.until(stage.assigned)
        (lost,) = stage.assigned()
        await stage.advance(2_000_000)
        await stage.beat("w1")
        checking = asyncio.ensure_future(stage.intake.check())
        await stage.until(checking.done)
        assert set(stage.desk.wiring.leases.alive) == {"w1"}
        assert stage.assigned()[-1].group.members == ["w1"], "it goes on elsewhere"
        before = len(stage.wire.said)
        await stage.beat("w0", pending_sequences=[lost.sequence])
        told = [m for _, m in stage.wire.said[before:] if isinstance(m, mesh_pb2.Truncate)]
        assert [(t.request_id, t.attempt, t.incarnation) for t in told] == [
            ("r", lost.batch[0].attempt, "a")
        ]
        await stage.beat("w0", leaving=True)
        assert "w0" not in stage.desk.publisher._truncates


async def test_latents_of_ended_requests_are_released_by_the_answer_to_a_heartbeat() -> None:
    async with running() as stage:
        for number in range(1, 20):
            await stage.beat(f"w{number}")
        gateway = stage.attach()
        stage.submit(gateway, "r")
        await stage.work()
        released = [m for m in stage.wire.of(mesh_pb2.Assign) if m.released]
        assert released == [], "a plan tells it to nobody"
        await stage.beat("w3", latents=[mesh_pb2.HeldLatent(request_id="r", steps_done=4)])
        (told,) = [
            (s, m) for s, m in stage.wire.said if isinstance(m, mesh_pb2.Assign) and m.released
        ]
        assert told[0].endswith(".assign.w3") and list(told[1].released) == ["r"]


async def test_weights_that_the_scheduler_did_not_expect_are_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def memory(*resident: bool) -> types_pb2.Memory:
        parts = [
            types_pb2.PartWeights(
                model="m", node=node, size_bytes=1 << 20, peak_bytes=1 << 20, resident=there
            )
            for node, there in zip(("text", "dit"), resident, strict=True)
        ]
        return types_pb2.Memory(budget_bytes=1 << 30, parts=parts)

    async with running() as stage:
        shown: list[object] = []
        driver = stage.desk.driver
        await stage.beat("w1", memory=memory(True, False))
        scheduler, observe = driver._scheduler, driver._scheduler.observe

        def seen(fact: Event) -> tuple[Ended, ...]:
            shown.append(fact)
            return observe(fact)

        monkeypatch.setattr(scheduler, "observe", seen)
        await stage.beat("w1", memory=memory(True, False))
        assert shown == [], "as thought"
        await stage.beat("w1", memory=memory(False, True))
        (up,) = shown
        assert isinstance(up, WorkerUp)


async def test_lost_messages_are_looked_for_behind_what_was_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A heartbeat that names nothing says the report came before it, observed or not."""
    async with running() as stage:
        gateway = stage.attach()
        stage.submit(gateway, "r", steps=1)
        await stage.until(stage.assigned)
        await stage.report(stage.assigned()[-1])
        for _ in range(10):
            await stage.beat(pending_sequences=[a.sequence for a in stage.assigned()[-1:]])
            await stage.advance(200_000)
            check = stage.intake.check()
            stage.own(check)
            await stage.settle()
        assert "never reached" not in caplog.text
        for number in range(10):
            await stage.beat(sequence=100 + number)
            await stage.advance(200_000)
            stage.own(stage.intake.check())
            await stage.settle()
        assert "never reached" in caplog.text


async def test_a_crowd_of_joins_is_told_in_few_messages() -> None:
    async with running() as stage:
        heard: list[control_pb2.WatchClusterResponse] = []

        async def watch() -> None:
            async for state in stage.desk.view.watch():
                heard.append(state)

        for _ in range(3):
            stage.own(watch())
        await stage.settle()
        assert [len(s.workers) for s in heard] == [1, 1, 1]
        assert heard[0] is heard[1] is heard[2], "made once"
        for number in range(1, 200):
            await stage.beat(f"w{number}")
        assert len(heard) == 3
        await stage.advance(250_000)
        assert [len(s.workers) for s in heard[3:]] == [200] * 3
        assert heard[-1].term == TERM and [m.name for m in heard[-1].models] == ["m"]


async def test_a_drain_is_stored_before_it_is_obeyed() -> None:
    async with running() as stage:
        servicer = stage.desk.servicer
        drain = control_pb2.DrainWorkerRequest(worker="w0")
        await servicer.DrainWorker(drain, None)  # type: ignore[arg-type]
        assert stage.shelf.wishes == [("w0", True)]
        await stage.beat(leaving=True)
        undo = control_pb2.DrainWorkerRequest(worker="w0", undo=True)
        await servicer.DrainWorker(undo, None)  # type: ignore[arg-type]
        assert stage.shelf.wishes == [("w0", True), ("w0", False)]


async def test_full_collections_wait_until_nothing_is_open() -> None:
    thresholds = gc.get_threshold()
    clock = ManualClock()
    stage = Stage()
    open_ones = 1
    try:
        garbage.take_over()
        stage.own(garbage.keep(clock, lambda: not open_ones))
        done: list[int] = []
        gc.callbacks.append(lambda phase, info: done.append(info["generation"]))

        async def minutes(count: int) -> None:
            for _ in range(6 * count):
                await stage.settle()
                clock.advance_to(clock.next_wake_us() or 0)
            await stage.settle()

        await minutes(2)
        assert 2 not in done and gc.get_freeze_count() > 0
        open_ones = 0
        await minutes(2)
        assert 2 in done
    finally:
        gc.callbacks.clear()
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        await stage.close()
