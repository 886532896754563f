"""A scheduler on a small made-up profile, whose work is over when it was predicted to be."""

from __future__ import annotations

from typing import Any

from bench.sim.case import parts_of
from control.scheduler.books.loads import LoadTable
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import (
    DIT,
    TEXT,
    VAE,
    Arrived,
    Assignment,
    Ended,
    JobProgress,
    Load,
    ModelFacts,
    Request,
    Shape,
    StepsEnded,
    WorkerUp,
)
from control.scheduler.workflow import Workflow

MS = 1_000
SHAPE = Shape(width=512, height=512)
BASE, CANNY, OTHER = "base", "base+canny", "other"
MODELS = (BASE, CANNY, OTHER)
TIMES = {TEXT: {1: 20}, DIT: {1: 100, 2: 50}, VAE: {1: 40}}  # ms by degree
ROWS = "model,gpu,node,width,height,frames,degree,batch,call_us\n" + "".join(
    f"{model},g,{node},512,512,1,{degree},{batch},{ms * batch * MS}\n"
    for model in (*MODELS, "flux.1-dev")
    for node, times in TIMES.items()
    for degree, ms in times.items()
    for batch in (1, 2, 4)
)
LOADS = "model,gpu,node,load_us,weights_mib\n" + "".join(
    f"{model},g,{node},{load_us},{mib}\n"
    for model, node, load_us, mib in (
        (BASE, TEXT, 1_000, 10),
        (BASE, DIT, 5_000, 50),
        (BASE, VAE, 100, 1),
        (BASE, "controlnet-canny", 300, 5),
        (OTHER, TEXT, 2_000, 20),
        (OTHER, DIT, 7_000, 60),
        (OTHER, VAE, 200, 2),
    )
)


TABLE = LoadTable.from_csv(LOADS)


def served(models: tuple[str, ...], loads: LoadTable = TABLE) -> tuple[ModelFacts, ...]:
    """What a worker says of these models, with the parts that their nodes need."""
    return tuple(
        ModelFacts(name=m, degrees=(1, 2), batch_max=4, parts=parts_of(m, "g", loads))
        for m in models
    )


class Desk:
    """A scheduler, workers w0.., and everything reported when it was predicted to end."""

    def __init__(
        self,
        policy: str,
        workers: int = 2,
        memory: int = 0,
        models: tuple[str, ...] = MODELS,
        lead_us: int = 0,
        rows: str = ROWS,
        workflows: tuple[Workflow, ...] = (),
        offers: tuple[tuple[str, ...], ...] = (),  # operations by worker; empty: all, each
        **policy_settings: Any,
    ) -> None:
        self.scheduler = Scheduler(
            Settings(policy=policy, policy_settings=policy_settings, lead_us=lead_us),
            Profile.from_csv(rows),
            LoadTable.from_csv(LOADS),
            workflows,
        )
        self.now_us = 0
        self.loads: list[Load] = []
        self.flights: list[Assignment] = []
        self.log: list[Assignment] = []  # all that ever went out
        self.ended: dict[str, Ended] = {}
        self.stepped = {DIT, *(node for w in workflows for node in w.steppeds)}
        nodes = [n for w in workflows for n in w.nodes]
        weighty = {n.calls: None for n in nodes if n.part} | dict.fromkeys((TEXT, DIT, VAE))
        free = {n.calls: None for n in nodes if not n.part}
        offered = offers or ((*weighty, *free),) * workers
        self.ups = {
            f"w{i}": WorkerUp(
                at_us=0,
                worker=f"w{i}",
                incarnation="1",
                gpu="g",
                models=tuple(
                    ModelFacts(
                        name=m,
                        degrees=(1, 2),
                        batch_max=4,
                        parts=parts_of(m, "g", TABLE),
                        operations=tuple(op for op in weighty if op in ops) if nodes else (),
                    )
                    for m in models
                    if not nodes or set(ops) & set(weighty)
                ),
                memory_mib=memory,
                operations=tuple(op for op in free if op in ops),
            )
            for i, ops in enumerate(offered)
        }
        for up in self.ups.values():
            self.scheduler.observe(up)

    def arrive(
        self,
        name: str,
        model: str = BASE,
        steps: int = 2,
        slo_us: int = 10**9,
        plan: bool = True,
        shape: Shape = SHAPE,
        workflow: str = "chain",
    ) -> list[Assignment]:
        request = Request(
            id=name,
            model=model,
            shape=shape,
            steps=steps,
            deadline_us=self.now_us + slo_us,
            workflow=workflow,
        )
        return self.enter(request, plan=plan)

    def enter(self, request: Request, plan: bool = True) -> list[Assignment]:
        self.scheduler.observe(Arrived(at_us=self.now_us, request=request))
        return self.plan() if plan else []

    def plan(self) -> list[Assignment]:
        plan = self.scheduler.plan(self.now_us)
        self.loads += plan.loads
        self.flights += plan.assignments
        self.log += plan.assignments
        self.ended.update({e.request: e for e in plan.ended})
        return list(plan.assignments)

    def next(self) -> list[Assignment]:
        """On to the next end, or wake; the new plan's assignments."""
        ends = [a.end_us for a in self.flights]
        wake_us = self.scheduler.wake_us()
        self.now_us = max(self.now_us, min([*ends, *([wake_us] if wake_us else [])]))
        for a in [a for a in self.flights if a.end_us <= self.now_us]:
            self.flights.remove(a)
            self.over(a)
        return self.plan()

    def over(self, a: Assignment) -> None:
        steps = a.steps if a.node in self.stepped else 0
        progress = tuple(
            JobProgress(request=m.request, attempt=m.attempt, steps_done=m.first_step + steps)
            for m in a.batch
        )
        times = (a.step_time_us,) * a.steps
        fact = StepsEnded(
            at_us=self.now_us, sequence=a.sequence, jobs=progress, step_time_us=times, last=True
        )
        self.ended.update({e.request: e for e in self.scheduler.observe(fact)})

    def run(self, limit: int = 10_000) -> None:
        while self.flights or self.scheduler.wake_us() is not None:
            self.next()
            limit -= 1
            assert limit, "it goes on for ever"

    def places(self, name: str) -> list[tuple[str, tuple[str, ...]]]:
        return [(a.node, a.workers) for a in self.log if any(m.request == name for m in a.batch)]


def brief(
    assignments: list[Assignment],
) -> list[tuple[str, tuple[str, ...], tuple[str, ...], int]]:
    return [(a.node, tuple(m.request for m in a.batch), a.workers, a.steps) for a in assignments]


def per_request(desk: Desk) -> list[set[int]]:
    """Sequences of each request's assignments, in order of first service."""
    names = dict.fromkeys(a.batch[0].request for a in desk.log)
    return [{a.sequence for a in desk.log if a.batch[0].request == n} for n in names]
