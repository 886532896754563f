"""What a newcomer would take on an idle cluster, as it is told on a busy one."""

from __future__ import annotations

import pytest

from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import Arrived, ModelFacts, Request, Shape, WorkerUp

SHAPE = Shape(width=64, height=64)


def cluster(policy: str, workers: int = 2) -> Scheduler:
    scheduler = Scheduler(Settings(policy=policy, default_step_us=100_000), Profile({}))
    facts = (ModelFacts(name="m", degrees=(1, 2)),)
    for number in range(workers):
        scheduler.observe(
            WorkerUp(at_us=0, worker=f"w{number}", incarnation="a", gpu="cpu", models=facts)
        )
    return scheduler


def asked(name: str, steps: int) -> Request:
    return Request(id=name, model="m", shape=SHAPE, steps=steps)


@pytest.mark.parametrize("policy", ["hocket", "edf", "tetriserve", "fixed-1"])
def test_a_queue_changes_nothing_of_it(policy: str) -> None:
    scheduler = cluster(policy)
    request = asked("r", 10)
    idle = scheduler.forecast_alone(request, 0)
    (queued,) = scheduler.forecast((request,), 0)
    assert 0 < idle.finish_us <= queued.finish_us
    for number in range(20):
        scheduler.observe(Arrived(at_us=0, request=asked(f"q{number}", 50)))
    assert scheduler.forecast_alone(request, 0) == idle
    (queued,) = scheduler.forecast((request,), 0)
    assert queued.finish_us > 2 * idle.finish_us


def test_of_several_kinds_of_gpu_the_fastest_counts() -> None:
    """A request that only the slow ones are too slow for is worth another try."""
    rows = "".join(
        f"m,{gpu},{node},64,64,1,1,1,{call_us}\n"
        for gpu, call_us in (("fast", 1_000), ("slow", 9_000))
        for node in ("text", "dit", "vae")
    )
    profile = Profile.from_csv("model,gpu,node,width,height,frames,degree,batch,call_us\n" + rows)
    scheduler = Scheduler(Settings(policy="hocket"), profile)
    for gpu in ("fast", "slow"):
        facts = (ModelFacts(name="m"),)
        up = WorkerUp(at_us=0, worker=gpu, incarnation="a", gpu=gpu, models=facts)
        scheduler.observe(up)
    assert 12_000 <= scheduler.forecast_alone(asked("r", 10), 0).finish_us < 9_000 * 12
