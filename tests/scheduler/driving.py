"""A scheduler driven by hand: short words for facts, plans and the state in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.sim.case import Case, ClusterSpec, FaultSpec
from bench.sim.trace import TraceRequest
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import (
    DIT,
    Arrived,
    Assignment,
    AssignmentFailed,
    Ended,
    Held,
    JobProgress,
    ModelFacts,
    Plan,
    Request,
    Shape,
    StepsEnded,
    WorkerLost,
    WorkerUp,
)

PROFILES = Path(__file__).parents[2] / "control" / "assets" / "profiles"
FLUX_CSV = (PROFILES / "flux.1-dev_h100_h28.csv").read_text()
FLUX = ModelFacts(name="flux.1-dev", degrees=(1, 2, 4, 8))


class World:
    """A scheduler, workers w0.. on hosts of eight, and the time."""

    def __init__(self, workers: int = 8, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.scheduler = Scheduler(self.settings, Profile.from_csv(FLUX_CSV))
        self.now_us = 0
        self.plans: list[Plan] = []
        self.ended: list[Ended] = []
        for i in range(workers):
            self.up(f"w{i}", host=f"h{i // 8}")

    def up(
        self,
        worker: str,
        incarnation: str = "1",
        host: str = "h0",
        latents: dict[str, int] | None = None,
    ) -> None:
        self.observe(
            WorkerUp(
                at_us=self.now_us,
                worker=worker,
                incarnation=incarnation,
                gpu="h100",
                host=host,
                models=(FLUX,),
                latents=tuple(
                    Held(request=request, steps_done=done)
                    for request, done in (latents or {}).items()
                ),
            )
        )

    def lose(self, worker: str) -> None:
        self.observe(WorkerLost(at_us=self.now_us, worker=worker))

    def observe(self, *facts: Any) -> None:
        for fact in facts:
            self.ended += self.scheduler.observe(fact)

    def arrive(
        self,
        name: str,
        px: int = 512,
        steps: int = 28,
        slo_us: int | None = None,
        priority: int = 0,
    ) -> None:
        request = Request(
            id=name,
            model="flux.1-dev",
            shape=Shape(width=px, height=px),
            steps=steps,
            deadline_us=None if slo_us is None else self.now_us + slo_us,
            priority=priority,
        )
        self.observe(Arrived(at_us=self.now_us, request=request))

    def plan(self) -> Plan:
        plan = self.scheduler.plan(self.now_us)
        self.plans.append(plan)
        return plan

    def step(self, a: Assignment, done: int, *, last: bool = False, step_us: int = 0) -> None:
        """Reports that `done` steps of an assignment are over."""
        m = a.batch[0]
        at = m.first_step + (done if a.node == DIT else 0)
        progress = JobProgress(request=m.request, attempt=m.attempt, steps_done=at)
        self.observe(
            StepsEnded(
                at_us=self.now_us,
                sequence=a.sequence,
                jobs=(progress,),
                step_time_us=(step_us or a.step_time_us,),
                last=last,
            )
        )

    def over(self, a: Assignment) -> None:
        """An assignment ends when it was predicted to."""
        self.now_us = max(self.now_us, a.end_us)
        self.step(a, a.steps, last=True)

    def fail(
        self,
        a: Assignment,
        reporter: str,
        reason: str,
        holds: int | None = None,
        suspects: tuple[str, ...] = (),
    ) -> None:
        m = a.batch[0]
        jobs = ()
        if holds is not None:
            jobs = (JobProgress(request=m.request, attempt=m.attempt, steps_done=holds),)
        self.observe(
            AssignmentFailed(
                at_us=self.now_us,
                sequence=a.sequence,
                worker=reporter,
                jobs=jobs,
                reason=reason,
                suspects=suspects,
            )
        )

    def encoded(self, name: str, **request: Any) -> Plan:
        """Arrives and is encoded; returns the plan made at the encode's end."""
        self.arrive(name, **request)
        encode = only(self.plan())
        self.over(encode)
        return self.plan()

    def view(self, name: str) -> Any:
        view = self.scheduler.job(name)
        assert view is not None
        return view


def only(plan: Plan) -> Assignment:
    assert len(plan.assignments) == 1, plan.assignments
    return plan.assignments[0]


def case(
    rows: list[tuple[int, int, int]],
    *,
    steps: int = 6,
    workers: int = 4,
    faults: tuple[FaultSpec, ...] = (),
    **settings: Any,
) -> Case:
    """A Case of (arrival_us, px, slo_us) rows."""
    trace = tuple(
        TraceRequest(
            id=f"r{i}",
            arrival_us=arrival,
            model="flux.1-dev",
            workflow="txt2img",
            width=px,
            height=px,
            frames=1,
            steps=steps,
            slo_us=slo,
            priority=0,
        )
        for i, (arrival, px, slo) in enumerate(rows)
    )
    return Case(
        cluster=ClusterSpec(workers=workers, gpu="h100", models=(FLUX,)),
        profile_csv=FLUX_CSV,
        trace=trace,
        settings=Settings(**settings),
        faults=faults,
    )
