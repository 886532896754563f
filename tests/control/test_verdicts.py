"""Verdicts over newcomers of one instant, and the cheapest variant that is on time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from control import translate
from control.requests.degrade import Ladder, ladders
from control.requests.verdicts import AdmissionCandidate, judge
from control.scheduler.values import Forecast, OnMiss, Request, Shape
from hocket.v1 import generation_pb2, types_pb2
from tests.control.stage import SHAPES, STEP_US, running

NOW_US = 1_000


class OneWorker:
    """Serves in order, a step of a 64 x 64 picture in a microsecond; knows some requests."""

    def __init__(self, *inside: str) -> None:
        self.inside = inside
        self.asked = 0

    def forecast(self, requests: Sequence[Request], now_us: int) -> list[Forecast]:
        self.asked += 1
        found, end_us = [], now_us
        for request in requests:
            end_us += request.steps * request.shape.width * request.shape.height // 4096
            found.append(Forecast(finish_us=end_us, finish_us_p95=2 * end_us))
        return found

    def forecast_alone(self, request: Request, now_us: int) -> Forecast:
        (found,) = OneWorker().forecast((request,), now_us)
        return found

    def job(self, request_id: str) -> object | None:
        return object() if request_id in self.inside else None


def asked(name: str, steps: int, by_us: int | None = None, *, reject: bool = False) -> Request:
    return Request(
        id=name,
        model="m",
        shape=Shape(width=64, height=64),
        steps=steps,
        deadline_us=None if by_us is None else NOW_US + by_us,
        on_miss=OnMiss.REJECT if reject else OnMiss.BEST_EFFORT,
    )


def verdicts(*requests: Request, ahead: Sequence[Request] = (), inside: Sequence[str] = ()) -> str:
    newcomers = [AdmissionCandidate(request) for request in requests]
    found = judge(OneWorker(*inside), ahead, newcomers, NOW_US)
    return "".join("r" if v.refused else "l" if v.late else "y" for v in found.of)


def test_each_is_behind_those_before_it() -> None:
    assert verdicts(asked("a", 10, 10), asked("b", 10, 20), asked("c", 10, 29)) == "yyl"


def test_those_accepted_a_moment_ago_count_until_the_scheduler_has_them() -> None:
    before = asked("z", 5)
    assert verdicts(asked("a", 10, 10), ahead=[before]) == "l"
    assert verdicts(asked("a", 10, 10), ahead=[before], inside=["z"]) == "y"
    assert judge(OneWorker("z"), [before], [AdmissionCandidate(asked("a", 1))], 0).arrived == {"z"}


def test_who_is_refused_leaves_its_place_to_the_others() -> None:
    hopeless = [asked(f"h{i}", 50, 1, reject=True) for i in range(3)]
    assert verdicts(*hopeless, asked("a", 10, 10, reject=True)) == "rrry"


def test_a_batch_full_of_hopeless_ones_is_not_forecast_for_each() -> None:
    scheduler = OneWorker()
    crowd = [AdmissionCandidate(asked(f"h{i}", 50, 1, reject=True)) for i in range(200)]
    assert all(v.refused for v in judge(scheduler, (), crowd, NOW_US).of)
    assert scheduler.asked < 20


@pytest.mark.parametrize(("by_us", "steps"), [(10, 10), (9, 9), (5, 5), (4, 4), (3, None)])
def test_the_cheapest_variant_that_is_on_time(by_us: int, steps: int | None) -> None:
    request = asked("a", 10, by_us)
    (found,) = judge(
        OneWorker(), (), [AdmissionCandidate(request, (Ladder(64, 64, 9, 4),))], NOW_US
    ).of
    if steps is None:
        assert found.late and found.request == request, "nothing fits: best effort, as asked"
    else:
        assert not found.late and found.request.steps == steps


def test_smaller_shapes_come_after_fewer_steps() -> None:
    request = asked("a", 10, 3)
    found_ladders = (Ladder(64, 64, 9, 5), Ladder(32, 32, 10, 5))
    (found,) = judge(OneWorker(), (), [AdmissionCandidate(request, found_ladders)], NOW_US).of
    assert found.request.shape == Shape(width=32, height=32) and found.request.steps == 10
    assert found.degraded


MODEL = generation_pb2.ModelInfo(
    name="m", steps_min=2, shapes=[*SHAPES, types_pb2.Shape(width=128, height=128)]
)
SPEC = types_pb2.GenerationSpec(model="m", steps=6, shape=SHAPES[0], prompt="a fox")


def made(**limits: int) -> list[list[tuple[int, int]]]:
    found = ladders(SPEC, types_pb2.DegradeLimits(**limits), MODEL)
    return [[(x.width, n) for n in range(x.most, x.fewest - 1, -1)] for x in found]


def test_limits_that_are_zero_allow_no_change() -> None:
    assert made() == []
    assert made(steps_min=4) == [[(64, 5), (64, 4)]]
    assert made(width_min=16, height_min=16) == [[(32, 6)]]
    assert made(width_min=16) == [], "its height may not change"
    assert made(steps_min=1, width_min=33, height_min=33) == [[(64, n) for n in (5, 4, 3, 2)]]
    assert made(steps_min=5, width_min=8, height_min=8) == [[(64, 5)], [(32, 6), (32, 5)]]


def test_where_sizes_are_free_smaller_ones_have_the_form_asked_for() -> None:
    free = generation_pb2.ModelInfo(
        size_multiple=16, size_min=64, size_max=2048, pixels_max=1 << 20, shapes=[SHAPES[0]]
    )
    spec = types_pb2.GenerationSpec(steps=6, shape=types_pb2.Shape(width=1024, height=256))
    limits = types_pb2.DegradeLimits(width_min=64, height_min=64)
    found = [(ladder.width, ladder.height) for ladder in ladders(spec, limits, free)]
    assert found == [(768, 192), (512, 128), (384, 96), (256, 64), (64, 64)]


async def test_a_degraded_request_says_so_and_is_run_as_it_says() -> None:
    async with running() as stage:
        gateway = stage.attach()
        slo = types_pb2.Slo(
            deadline_us=7 * STEP_US,
            on_miss=types_pb2.ON_MISS_DEGRADE,
            degrade=types_pb2.DegradeLimits(steps_min=2),
        )
        stage.submit(gateway, "r", steps=20, slo=slo)
        await stage.until(lambda: gateway.answers)
        accepted = gateway.answers[1].accepted
        assert accepted.predicted_on_time and 2 <= accepted.effective_spec.steps < 20
        await stage.settle()
        degraded = gateway.events("r")[0]
        assert degraded.degraded.effective_spec == accepted.effective_spec
        assert degraded.sequence == 2 and degraded.degraded.predicted_latency_us
        kept = stage.shelf.stored[0]
        assert kept.degraded == degraded.degraded
        assert kept.submit.request.spec.steps == accepted.effective_spec.steps
        await stage.work()
        assert gateway.events("r")[-1].finished.on_time
        steps = [a.steps for a in stage.assigned() if a.node == "dit"]
        assert sum(steps) == accepted.effective_spec.steps


async def test_where_nothing_fits_it_is_run_as_asked() -> None:
    async with running() as stage:
        gateway = stage.attach()
        slo = types_pb2.Slo(
            deadline_us=1,
            on_miss=types_pb2.ON_MISS_DEGRADE,
            degrade=types_pb2.DegradeLimits(steps_min=2),
        )
        stage.submit(gateway, "r", steps=5, slo=slo)
        await stage.until(lambda: gateway.answers)
        accepted = gateway.answers[1].accepted
        assert not accepted.predicted_on_time and accepted.effective_spec.steps == 5
        await stage.settle()
        assert "degraded" not in gateway.kinds("r")


def test_variants_differ_in_steps_and_shape_only() -> None:
    request = asked("a", 10, 1)
    (found,) = judge(
        OneWorker(), (), [AdmissionCandidate(request, (Ladder(8, 16, 9, 3),))], NOW_US
    ).of
    variant = found.request
    assert (variant.steps, variant.shape) == (9, Shape(width=8, height=16))
    assert (variant.id, variant.deadline_us) == (request.id, request.deadline_us)
    spec = types_pb2.GenerationSpec(prompt="a fox", steps=10, shape=types_pb2.Shape(frames=5))
    translate.make_variant(spec, variant)
    assert spec == types_pb2.GenerationSpec(
        prompt="a fox", steps=9, shape=types_pb2.Shape(width=8, height=16, frames=5)
    )


def test_only_variants_that_are_looked_at_are_made() -> None:
    """Hundreds of shapes times a hundred steps used to be built before the forecast."""
    shapes = [types_pb2.Shape(width=8 * n, height=8) for n in range(1, 500)]
    model = generation_pb2.ModelInfo(name="m", steps_min=1, shapes=shapes)
    spec = types_pb2.GenerationSpec(model="m", steps=100, prompt="x" * 2000)
    spec.shape.width, spec.shape.height = 8 * 500, 8
    found = ladders(spec, types_pb2.DegradeLimits(steps_min=1, width_min=1, height_min=1), model)
    assert found[0] == Ladder(4000, 8, 99, 1)
    assert found[-1] == Ladder(8, 8, 100, 1) and len(found) == 500
