"""Compiles the planner before anybody waits for it.

numba compiles a function for the argument types of its first call, and keeps the result beside the
sources. So this makes the calls once, through the scheduler's own verbs: whatever the planner
passes later, it passes here, of firm promises, too.
`python -m control.scheduler.warm` does the same.
"""

from __future__ import annotations

from .core import Scheduler
from .settings import Settings
from .times.profile import Profile
from .values import Arrived, ModelFacts, Request, Shape, WorkerUp

_MODEL = ModelFacts(name="warm", degrees=(1, 2))
_DEADLINE_US = 60_000_000


def compile_all() -> None:
    """Makes every call that compiles something; milliseconds where the cache has it already.

    Plans of nothing promised, and of firm promises, each with a forecast of a firm newcomer; two of
    each kind: a matrix of one job and a matrix of several are different types to the compiler.
    """
    for firm in (False, True):
        scheduler = Scheduler(Settings(policy="hocket"), Profile({}))
        for worker in ("w0", "w1", "w2"):
            up = WorkerUp(at_us=0, worker=worker, incarnation="1", gpu="any", models=(_MODEL,))
            scheduler.observe(up)
        for jobs, begin in enumerate((0, 1_000), start=1):
            for i in range(jobs):
                asked = _request(f"{jobs}-{i}", begin, firm)
                told = Arrived(at_us=begin, request=asked, promised_us=begin, on_time=True)
                scheduler.observe(told)
            plan = scheduler.plan(begin)
            assert len(plan.assignments) == jobs, "the kernel ran and started all of them"
            scheduler.forecast((_request("newcomer", begin, firm=True),), begin)


def _request(name: str, at_us: int, firm: bool) -> Request:
    return Request(
        id=name,
        model=_MODEL.name,
        shape=Shape(width=64, height=64),
        steps=2,
        deadline_us=at_us + _DEADLINE_US,
        firm=firm,
    )


if __name__ == "__main__":
    compile_all()
