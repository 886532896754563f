"""With a lead, what follows goes out before what is under way has told of its end."""

from __future__ import annotations

import pytest

from bench.sim.case import Case, ClusterSpec
from bench.sim.costs import Costs
from bench.sim.loop import run
from control.scheduler.settings import Settings
from control.scheduler.starts import Start
from control.scheduler.values import (
    DIT,
    TEXT,
    VAE,
    AssignmentFailed,
    Holder,
    ModelFacts,
    Outcome,
    WorkerLost,
)
from control.scheduler.views import RequestState

from .desk import MS, ROWS, Desk, brief
from .test_hocket import request

LEAD_US = 25 * MS  # an encode takes 20, a decode 40, a step 100
SLO_US = 300 * MS  # of 260 to 264 on one worker


def desk(**settings):
    return Desk("hocket", lead_us=LEAD_US, passes=0, **settings)


def state(d, name):
    view = d.scheduler.job(name)
    assert view is not None
    return view.state


def issued(d, node, *workers, steps=1):
    """A start that planning would only make in a larger cluster."""
    start = Start(("a",), node, workers, steps, "test")
    return d.scheduler._issue(start, d.now_us, d.now_us)


def over(d, assignment):
    d.now_us = max(d.now_us, assignment.end_us)
    d.over(assignment)


def fail(d, sequence, worker, reason="MODEL_ERROR", tried=()):
    fact = AssignmentFailed(
        at_us=d.now_us, sequence=sequence, worker=worker, jobs=(), reason=reason, tried=tried
    )
    return d.scheduler.observe(fact)


def decoding():
    """A desk where the decode of `a` waits behind its last step: (desk, steps, decode)."""
    d = desk(workers=1)
    d.arrive("a", steps=1)
    d.next()
    (decode,) = d.next()
    (steps,) = [a for a in d.flights if a.node == DIT]
    assert decode.node == VAE
    return d, steps, decode


def test_steps_go_out_with_the_encode_to_the_worker_that_makes_the_latent() -> None:
    d = desk()
    d.arrive("a", steps=1, plan=False, slo_us=SLO_US)
    d.arrive("b", steps=1, plan=False, slo_us=SLO_US + 1)
    plan = d.plan()
    assert brief(plan) == [
        (TEXT, ("a",), ("w0",), 1),
        (TEXT, ("b",), ("w1",), 1),
        (DIT, ("a",), ("w0",), 1),
        (DIT, ("b",), ("w1",), 1),
    ]
    assert plan[3].batch[0].holders == (Holder(worker="w1", steps_done=0),)
    assert plan[2].start_us == plan[0].end_us == 20 * MS


def test_without_a_lead_nothing_goes_out_ahead() -> None:
    d = Desk("hocket", passes=0)
    assert [a.node for a in d.arrive("a", steps=1)] == [TEXT]
    assert [a.node for a in d.next()] == [DIT]
    assert [a.node for a in d.next()] == [VAE]


def test_the_decode_goes_out_a_lead_before_the_last_step_ends() -> None:
    d, steps, decode = decoding()
    assert d.now_us == steps.end_us - LEAD_US and decode.start_us == steps.end_us
    assert decode.batch[0].first_step == 1
    assert decode.batch[0].holders == (Holder(worker="w0", steps_done=1),)
    assert state(d, "a") is RequestState.DENOISING
    d.next()
    assert state(d, "a") is RequestState.DECODING
    d.run()
    assert d.ended["a"].outcome is Outcome.DONE and len(d.log) == 3


def test_a_worker_is_given_two_runs_at_most() -> None:
    d = desk(workers=1)
    d.arrive("a", steps=1, plan=False)
    d.arrive("b", steps=1, plan=False)
    assert len(d.plan()) == 2
    d.run()
    assert {e.outcome for e in d.ended.values()} == {Outcome.DONE}


def test_an_encode_that_fails_takes_its_steps_along() -> None:
    d = desk(workers=1)
    encode, steps = d.arrive("a", steps=1)
    assert fail(d, encode.sequence, "w0") == ()
    d.flights.clear()
    again, steps_again = d.plan()
    assert (again.node, steps_again.node) == (TEXT, DIT)
    assert again.batch[0].attempt == steps_again.batch[0].attempt == steps.batch[0].attempt + 1
    d.run()
    assert d.ended["a"].outcome is Outcome.DONE


def test_a_step_that_fails_takes_the_decode_along() -> None:
    d, steps, decode = decoding()
    assert fail(d, steps.sequence, "w0") == ()
    d.flights.clear()
    (again,) = d.plan()
    assert again.node == DIT and again.batch[0].attempt == decode.batch[0].attempt + 1
    assert state(d, "a") is RequestState.DENOISING
    d.run()
    assert d.ended["a"].outcome is Outcome.DONE
    assert [node for node, _ in d.places("a")] == [TEXT, DIT, VAE, DIT, VAE]


def test_a_decode_that_waits_fails_without_touching_the_steps_that_are_done() -> None:
    d, steps, decode = decoding()
    d.now_us = steps.end_us
    d.over(steps)
    d.flights.remove(steps)
    assert fail(d, decode.sequence, "w0") == ()
    d.flights.clear()
    assert [a.node for a in d.plan()] == [VAE]
    d.run()
    assert d.ended["a"].steps_lost == 0


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_a_lost_worker_costs_both(stage: str) -> None:
    d = desk()
    d.arrive("a", steps=1)
    if stage == "decode":
        d.next()
        d.next()
    worker = d.flights[0].workers[0]
    assert len(d.flights) == 2 and all(worker in a.workers for a in d.flights)
    d.scheduler.observe(WorkerLost(at_us=d.now_us, worker=worker))
    d.flights.clear()
    d.plan()
    assert all(worker not in a.workers for a in d.flights)
    d.run()
    assert d.ended["a"].outcome is Outcome.DONE


def test_a_lost_worker_takes_its_decode_along_though_the_steps_have_another_source() -> None:
    """The steps on w0 were to start from w0's copy or w1's; the decode waits on w1."""
    d = desk()
    d.arrive("a", steps=2, plan=False)
    over(d, issued(d, TEXT, "w0"))
    over(d, issued(d, DIT, "w0", "w1"))
    steps, decode = issued(d, DIT, "w0"), issued(d, VAE, "w1")
    assert {h.worker for h in steps.batch[0].holders} == {"w0", "w1"}
    d.scheduler.observe(WorkerLost(at_us=d.now_us, worker="w1"))
    assert {"w1"}.isdisjoint(w for a in d.scheduler.outstanding() for w in a.workers)
    d.plan()
    d.run()
    assert d.ended["a"].outcome is Outcome.DONE and decode.sequence > steps.sequence


@pytest.mark.parametrize(("steps", "node"), [(1, VAE), (3, DIT)])
def test_steps_told_of_before_their_encode_count(steps: int, node: str) -> None:
    """The report of the encode on w0 comes late: what follows stands behind the steps on w1."""
    d = desk()
    d.arrive("a", steps=steps, plan=False)
    encode, first = issued(d, TEXT, "w0"), issued(d, DIT, "w1")
    over(d, first)
    follower = issued(d, node, "w0")
    assert follower.batch[0].first_step == 1
    assert follower.batch[0].holders == (Holder(worker="w1", steps_done=1),)
    d.over(encode)
    d.flights.append(follower)
    d.run()
    assert d.ended["a"].outcome is Outcome.DONE and d.ended["a"].steps_lost == 0


def test_a_late_report_of_the_encode_takes_no_copy_away() -> None:
    d = desk()
    d.arrive("a", steps=1, plan=False)
    encode, steps = issued(d, TEXT, "w0"), issued(d, DIT, "w1")
    over(d, steps)
    d.over(encode)
    (decode,) = d.plan()
    assert decode.batch[0].holders == (Holder(worker="w1", steps_done=1),)


def test_who_waited_in_vain_for_a_latent_on_its_way_takes_no_older_copy_away() -> None:
    """The decode on w1 gave up while the last step still ran on w0, which holds three."""
    d = desk()
    d.arrive("a", steps=4, plan=False)
    over(d, issued(d, TEXT, "w0"))
    over(d, issued(d, DIT, "w0", steps=3))
    issued(d, DIT, "w0")
    decode = issued(d, VAE, "w1")
    fail(d, decode.sequence, "w1", "LATENT_MISSING", tried=("w0",))
    again = d.plan()[0]
    assert again.node == DIT and again.batch[0].first_step == 3
    d.run()
    assert d.ended["a"].outcome is Outcome.DONE


@pytest.mark.parametrize(("lead_us", "waits"), [(LEAD_US, 1), (0, 3)])
def test_reports_hold_nobody_up(lead_us: int, waits: int) -> None:
    """Reports take 10 ms: with a lead a request waits for its last one only."""
    case = Case(
        cluster=ClusterSpec(workers=1, gpu="g", models=(ModelFacts(name="base"),)),
        profile_csv=ROWS,
        trace=(request("a", "base", 512, 0, SLO_US, 1),),
        settings=Settings(policy="hocket", lead_us=lead_us),
        costs=Costs(report_delay_us=10 * MS),
    )
    (ended,) = run(case).ended
    assert ended.at_us == (20 + 100 + 40 + waits * 10) * MS
