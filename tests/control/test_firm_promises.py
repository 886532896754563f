"""Firm promises as control gives them: by the cautious forecast, and known to the scheduler."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from control.config import ControlSettings, best_effort_wait_us_max
from control.leading.recovery import recover
from control.leading.standby import Book, Kept
from control.scheduler.books.commitments import FIRM_BROKEN, MARGIN_GAIN
from control.scheduler.core import Scheduler
from control.scheduler.values import Arrived, Ended, Event, Forecast, Outcome, Request
from hocket.v1 import generation_pb2, journal_pb2, types_pb2
from tests.control.stage import STEP_US, Stage, running, submit_of

FIRM = types_pb2.COMMITMENT_FIRM


def heard(stage: Stage) -> list[Arrived]:
    """The arrivals that the scheduler is told of from now on."""
    found: list[Arrived] = []
    post = stage.desk.driver.post

    def spy(fact: Event, note: object = None, **options: object) -> None:
        if isinstance(fact, Arrived):
            found.append(fact)
        post(fact, note, **options)  # type: ignore[arg-type]

    stage.desk.driver.post = spy  # type: ignore[method-assign]
    return found


async def test_the_scheduler_knows_what_was_promised() -> None:
    async with running() as stage:
        facts, gateway = heard(stage), stage.attach()
        for call, deadline_us in enumerate((60_000_000, 1), start=1):
            slo = types_pb2.Slo(deadline_us=deadline_us, commitment=FIRM)
            stage.submit(gateway, f"r{call}", call, slo=slo)
            await stage.until(lambda call=call: call in gateway.answers)  # type: ignore[misc]
        assert [(f.request.firm, f.on_time) for f in facts] == [(True, True), (True, False)]
        for fact, answer in zip(facts, gateway.answers.values(), strict=True):
            predicted_us = answer.accepted.predicted_latency_us
            assert fact.promised_us == 1_000_000 + predicted_us


@pytest.mark.parametrize("commitment", [FIRM, types_pb2.COMMITMENT_SOFT])
async def test_firm_ones_go_by_the_cautious_forecast(
    commitment: types_pb2.Commitment.ValueType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forecast(_: Scheduler, requests: Sequence[Request], now_us: int) -> list[Forecast]:
        later = Forecast(finish_us=now_us + 4 * STEP_US, finish_us_p95=now_us + 8 * STEP_US)
        return [later for _ in requests]

    monkeypatch.setattr(Scheduler, "forecast", forecast)
    async with running() as stage:
        gateway, is_firm = stage.attach(), commitment == FIRM
        slo = types_pb2.Slo(deadline_us=6 * STEP_US, commitment=commitment)
        stage.submit(gateway, "a", 1, slo=slo)
        await stage.until(lambda: 1 in gateway.answers)
        assert gateway.answers[1].accepted.predicted_on_time is not is_firm
        slo.on_miss = types_pb2.ON_MISS_REJECT
        stage.submit(gateway, "b", 2, slo=slo)
        await stage.until(lambda: 2 in gateway.answers)
        refused = gateway.answers[2].rejected
        assert (refused.reason == "DEADLINE_UNATTAINABLE") is is_firm
        if is_firm:
            assert refused.retry_after_us == 2 * STEP_US
            assert refused.metadata["predicted_latency_us"] == str(8 * STEP_US)


class Restored:
    """A new leader's pen."""

    def at_us(self, unix_us: int) -> int:
        return unix_us

    def restore(self, ended: object) -> None: ...


def recovered(stage: Stage, book: Book) -> None:
    desk, promises = stage.desk, Restored()
    recover(
        book,
        promises,  # type: ignore[arg-type]
        desk.driver,
        desk.records,
        desk.wiring.leases,
        lambda _: None,
        desk.wiring.scheduler,
    )


async def test_a_new_leader_keeps_what_was_promised() -> None:
    stage = Stage()
    facts = heard(stage)
    slo = types_pb2.Slo(deadline_us=9_000_000, commitment=FIRM)
    book = Book(stage.desk.wiring.subjects)
    for name in ("kept", "late"):
        promise = journal_pb2.Promise(submit=submit_of(name, slo=slo, detached=True))
        promise.answer.predicted_on_time = name == "kept"
        book.open[name] = Kept(promise, 5)

    recovered(stage, book)
    assert {f.request.id: f.on_time for f in facts} == {"kept": True, "late": False}


def ended(name: str, latency_us: int, *, on_time: bool) -> Kept:
    """A firm yes, promised for 2 s, and what came of it."""
    slo = types_pb2.Slo(deadline_us=9_000_000, commitment=FIRM)
    promise = journal_pb2.Promise(submit=submit_of(name, slo=slo, detached=True))
    promise.answer.CopyFrom(
        generation_pb2.Accepted(predicted_on_time=True, predicted_latency_us=2_000_000)
    )
    promise.ended.request_id = name
    promise.ended.finished.latency_us = latency_us
    promise.ended.finished.on_time = on_time
    return Kept(promise, 5)


async def test_a_new_leader_has_learned_from_the_promises_of_an_earlier_one() -> None:
    """The margin of a broken one, the tail of forecasts; and it knows what open ones were told."""
    stage = Stage()
    book = Book(stage.desk.wiring.subjects)
    for i in range(40):
        book.ended[f"r{i}"] = ended(f"r{i}", 3_000_000, on_time=True)
    book.ended["broken"] = ended("broken", 9_500_000, on_time=False)
    gone = ended("gone", 0, on_time=False)
    gone.promise.ended.cancelled.steps_done = 3
    book.ended["gone"] = gone
    still = ended("open", 0, on_time=False)
    still.promise.ClearField("ended")
    book.open["open"] = still
    recovered(stage, book)
    scheduler = stage.desk.wiring.scheduler
    figures = scheduler.promise_figures()
    assert figures.margin == pytest.approx(MARGIN_GAIN * (1 - FIRM_BROKEN))
    assert figures.latency_ratio_p95["firm"] == pytest.approx(1.5)
    assert figures.promised == figures.firm_promised == 0, "counts are of this leader"
    await stage.settle()
    end = Ended(request="open", outcome=Outcome.DONE, at_us=9_500_005, on_time=False, steps_done=28)
    scheduler._commitments.ended(end)
    assert scheduler.promise_figures().firm_promised == 1
    assert scheduler.promise_figures().margin > figures.margin


def test_the_bound_on_best_effort_is_the_policy_s() -> None:
    settings = ControlSettings()
    assert best_effort_wait_us_max(settings) == 60_000_000
    given = msgspec.structs.replace(settings, policy_settings=("best_effort_wait_us_max=5000000",))
    assert best_effort_wait_us_max(given) == 5_000_000
    assert best_effort_wait_us_max(msgspec.structs.replace(settings, policy="edf")) == 0
