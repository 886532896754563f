"""Each checker sees what it is for."""

import msgspec
import pytest

from bench.sim.invariants import Checker, InvariantError
from bench.sim.loop import run
from bench.sim.workers import Workers
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.values import (
    Arrived,
    Assignment,
    Ended,
    Layout,
    Load,
    Member,
    Outcome,
    Plan,
    Request,
    Shape,
)

from .test_costs import small_case


def request(name="r1", px=64):
    return Request(id=name, model="m", shape=Shape(width=px, height=px), steps=2)


def assignment(sequence, node, first=0, steps=1, workers=("w0",), requests=("r1",), attempt=1):
    return Assignment(
        sequence=sequence,
        node=node,
        batch=tuple(
            Member(request=r, first_step=first, attempt=attempt, holders=()) for r in requests
        ),
        steps=steps,
        workers=workers,
        epoch=1,
        layout=Layout(ulysses=len(workers)),
        step_time_us=1,
        step_time_us_safe=1,
        start_us=0,
        end_us=0,
        reason="",
    )


def plan(*assignments, number=1, now_us=0):
    return Plan(round=number, now_us=now_us, start_us=now_us, assignments=assignments)


def ended(outcome=Outcome.DONE):
    return Ended(request="r1", outcome=outcome, at_us=9, on_time=True, steps_done=2)


def checker(**values):
    made = Checker(**values)
    for worker in ("w0", "w1"):
        made.worker_up(worker)
    made.arrived(request(), 0)
    made.arrived(request("r2", 128), 0)
    return made


def ran(made, a, at_us=1):
    made.started(a, at_us)
    for done in range(1, a.steps + 1):
        made.stepped(a, done, at_us)
    made.released(a)


def whole(made):
    """Runs r1 as it should be."""
    ran(made, assignment(1, "text"))
    ran(made, assignment(2, "dit", 0, 2))
    ran(made, assignment(3, "vae", 2))
    return made


def load(node="dit", evict=()):
    part = f"m/{node}"
    return Load(sequence=1, worker="w0", model="m", node=node, part=part, load_us=1, evict=evict)


def test_a_sound_run_passes():
    made = whole(checker())
    made.ended(ended())
    made.inside(["r2"], 9)


def planned(made, *plans):
    for one in plans:
        made.planned(one)


def begun(made, *assignments):
    for a in assignments:
        made.started(a, 5)


def loaded(made, *loads):
    for one in loads:
        made.loaded(one, 5)


SMALL = {
    "memory_mib": 10,
    "weights_mib": {"m/dit": 7, "m/vae": 7},
    "parts": {("m", node): frozenset((f"m/{node}",)) for node in ("dit", "vae")},
}
BROKEN = {
    "arrives-once": lambda c: c.arrived(request(), 1),
    "ends-once": lambda c: (c.ended(ended(Outcome.CANCELLED)), c.ended(ended(Outcome.CANCELLED))),
    "done-is-done": lambda c: (ran(c, assignment(1, "text")), c.ended(ended())),
    "nothing-lost": lambda c: c.inside(["r2"], 5),
    "nothing-lost/stray": lambda c: c.inside(["r1", "r2", "r3"], 5),
    "plans-in-order": lambda c: planned(c, plan(number=2), plan(number=1)),
    "plans-in-order/time": lambda c: planned(c, plan(now_us=2), plan(now_us=1)),
    "sequences-grow": lambda c: planned(c, plan(assignment(1, "text"), assignment(1, "text"))),
    "epochs-grow": lambda c: planned(
        c, plan(msgspec.structs.replace(assignment(1, "text"), epoch=2), assignment(2, "text"))
    ),
    "sane": lambda c: planned(c, plan(assignment(1, "dit", workers=("w0", "w0")))),
    "known-workers": lambda c: planned(c, plan(assignment(1, "text", workers=("w7",)))),
    "known-workers/lost": lambda c: (c.worker_lost("w0"), begun(c, assignment(1, "text"))),
    "open-requests": lambda c: planned(c, plan(assignment(1, "text", requests=("r9",)))),
    "one-kind-a-batch": lambda c: planned(c, plan(assignment(1, "dit", requests=("r1", "r2")))),
    "one-kind-a-batch/twice": lambda c: planned(
        c, plan(assignment(1, "dit", requests=("r1", "r1")))
    ),
    "steps-in-order/too-many": lambda c: planned(c, plan(assignment(1, "dit", 1, 2))),
    "steps-in-order/no-encode": lambda c: ran(c, assignment(1, "dit")),
    "steps-in-order/left-out": lambda c: (
        ran(c, assignment(1, "text")),
        ran(c, assignment(2, "dit", 1)),
    ),
    "steps-in-order/twice": lambda c: (
        ran(c, assignment(1, "text")),
        ran(c, assignment(2, "dit", 0)),
        ran(c, assignment(3, "dit", 0)),
    ),
    "steps-in-order/early-decode": lambda c: (
        ran(c, assignment(1, "text")),
        ran(c, assignment(2, "dit", 0)),
        ran(c, assignment(3, "vae", 1)),
    ),
    "steps-in-order/jump": lambda c: (
        ran(c, assignment(1, "text")),
        c.started(assignment(2, "dit", 0, 2), 1),
        c.stepped(assignment(2, "dit", 0, 2), 2, 2),
    ),
    "one-thing-at-a-time": lambda c: begun(c, assignment(1, "text"), assignment(2, "text")),
    "one-thing-at-a-time/end": lambda c: c.stepped(assignment(1, "text"), 1, 1),
    "memory": lambda c: loaded(c, load("dit"), load("vae")),
    "memory/missing": lambda c: (
        ran(c, assignment(1, "text")),
        begun(c, assignment(2, "dit")),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_sees_its_breach(name):
    with pytest.raises(InvariantError) as error:
        BROKEN[name](checker(**(SMALL if name.startswith("memory") else {})))
    assert error.value.rule == name.split("/")[0]
    assert error.value.subject and str(error.value.at_us) in str(error.value)


def test_evicting_first_makes_room():
    loaded(checker(**SMALL), load("dit"), load("vae", evict=("m/dit",)))


def test_a_later_attempt_may_begin_where_an_earlier_one_was():
    made = checker()
    ran(made, assignment(1, "text"))
    ran(made, assignment(2, "dit", 0))
    ran(made, assignment(3, "dit", 0, 2, attempt=2))
    ran(made, assignment(4, "dit", 0))  # of an attempt long called off: counts for nothing
    ran(made, assignment(5, "vae", 2, attempt=2))
    made.ended(ended())


def test_workers_that_start_too_early_are_caught(monkeypatch):
    case = small_case(settings=Settings(policy="tetriserve"))
    run(case)

    def waiting(self, worker):
        return next((r for r in self._queues.get(worker, ()) if not r.started), None)

    monkeypatch.setattr(Workers, "_head", waiting)
    with pytest.raises(InvariantError, match="one-thing-at-a-time"):
        run(case)


def test_a_request_that_the_scheduler_forgets_is_missed(monkeypatch):
    observe = Scheduler.observe

    def deaf(self, fact):
        if isinstance(fact, Arrived) and fact.request.id == "r000003":
            return ()
        return observe(self, fact)

    monkeypatch.setattr(Scheduler, "observe", deaf)
    with pytest.raises(InvariantError, match="nothing-lost: r000003"):
        run(small_case())
