"""Workflows with several stepped nodes, calls without weights and inputs by artifact."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from control.scheduler.books.catalogue import (
    WORKFLOWS_MAX,
    PassesFault,
    UnknownWorkflow,
    WorkflowTaken,
)
from control.scheduler.values import (
    Arrived,
    AssignmentFailed,
    DrainRequested,
    JobProgress,
    Outcome,
)
from control.scheduler.workflow import Workflow

from .desk import MS, SHAPE, Desk
from .fleet import BRANCHES, PASSES, TWO_PASS, Fleet, asked, disturbed, led_anew

POLICIES = ["diflow", "disagfusion", "edf", "fixed-1", "genserve", "hocket", "srtf", "tetriserve"]
# An encoder and a worker for files beside two that step; then each kind of call on its own.
PIXEL_CALLS = ("resize", "load_image", "blend")
MIXED = (
    ("text",),
    ("dit", "vae", "encode_image", *PIXEL_CALLS),
    ("dit", "vae", "encode_image"),
    ("make_media",),
)
APART = (("text",), ("dit",), ("dit",), ("vae", "encode_image"), (*PIXEL_CALLS, "make_media"))
BOTH = pytest.mark.parametrize("workflow", [TWO_PASS, BRANCHES], ids=lambda w: w.name)


def alone(policy: str, workflow: Workflow, lead_us: int = 0, slo_us: int | None = None) -> Fleet:
    fleet = Fleet(policy, lead_us=lead_us)
    fleet.known["r0"] = workflow
    fleet.enter(asked("r0", workflow, slo_us))
    fleet.run()
    return fleet


@BOTH
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lead_us", [0, 20 * MS])
def test_each_node_runs_once_in_the_order_of_the_passes(
    policy: str, lead_us: int, workflow: Workflow
) -> None:
    fleet = alone(policy, workflow, lead_us, slo_us=900 * MS)
    passes = PASSES[workflow.name]
    (end,) = fleet.ends
    assert end.outcome is Outcome.DONE and end.on_time
    assert end.steps_done == sum(p.steps for p in passes) and end.steps_lost == 0
    steps = {p.node: p.steps for p in passes}
    assert fleet.calls == {("r0", n): steps.get(n, 1) for n in workflow.order}


@BOTH
@pytest.mark.parametrize("policy", ["edf", "genserve", "hocket", "tetriserve"])
@pytest.mark.parametrize("lead_us", [0, 20 * MS])
def test_a_worker_lost_at_any_event_costs_what_it_alone_held(
    policy: str, lead_us: int, workflow: Workflow
) -> None:
    for seed in range(2):
        for at_event in range(seed, 24, 2):
            fleet = disturbed(policy, workflow, at_event, seed, lead_us)
            ended = sorted((e.request, e.outcome) for e in fleet.ends)
            assert ended == [("r0", Outcome.DONE), ("r1", Outcome.DONE)], (seed, at_event)


@BOTH
@pytest.mark.parametrize("policy", ["edf", "hocket"])
@pytest.mark.parametrize("arrive_first", [False, True])
def test_a_new_leader_goes_on_from_what_workers_say_they_hold(
    policy: str, arrive_first: bool, workflow: Workflow
) -> None:
    for at_event in range(0, 20, 2):
        fleet = Fleet(policy)
        fleet.known["r0"] = workflow
        fleet.enter(asked("r0", workflow, None))
        while fleet.events < at_event and fleet.flights:
            fleet.next()
        if fleet.ended:
            break
        fleet = led_anew(fleet, policy, arrive_first=arrive_first, lead_us=0)
        fleet.run()
        (end,) = fleet.ends
        assert end.outcome is Outcome.DONE
        steps = {p.node: p.steps for p in PASSES[workflow.name]}
        assert fleet.calls == {("r0", n): steps.get(n, 1) for n in workflow.order}, at_event


@BOTH
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("offers", [MIXED, APART], ids=["mixed", "apart"])
def test_calls_go_to_workers_that_offer_them(
    policy: str, offers: tuple[tuple[str, ...], ...], workflow: Workflow
) -> None:
    for lead_us in (0, 20 * MS):
        fleet = Fleet(policy, workers=len(offers), offers=offers, lead_us=lead_us)
        for request in ("r0", "r1"):
            fleet.known[request] = workflow
            fleet.enter(asked(request, workflow, 2_000 * MS))
        fleet.run()
        assert [e.outcome for e in fleet.ends] == [Outcome.DONE] * 2
        for a in fleet.log:
            op = workflow.node[a.node].calls
            assert all(op in offers[int(w[1:])] for w in a.workers), (a.node, a.workers)


@pytest.mark.parametrize("policy", ["edf", "genserve", "hocket", "tetriserve"])
def test_a_worker_that_encodes_alone_gets_encodes_of_plain_chains_alone(policy: str) -> None:
    fleet = Fleet(policy, workers=3, offers=(("text",), ("dit", "vae"), ("dit", "vae")))
    for i in range(3):
        fleet.arrive(f"p{i}", steps=2)
    Desk.run(fleet)
    assert len(fleet.ended) == 3
    assert all((a.node == "text") == (a.workers == ("w0",)) for a in fleet.log)


@pytest.mark.parametrize("policy", ["edf", "hocket"])
def test_degrees_change_in_both_passes(policy: str) -> None:
    fleet = Fleet(policy, workers=2)
    fleet.known["r0"] = TWO_PASS
    fleet.enter(asked("r0", TWO_PASS, 10**9))
    widths: dict[str, list[int]] = {"base": [], "refine": []}
    while fleet.flights:
        a = fleet.flights[0]
        if a.node in widths:
            widths[a.node].append(len(a.workers))
            draining = len(widths[a.node]) == 1  # one step wide, the next ones narrow
            fleet.observe(DrainRequested(at_us=fleet.now_us, worker="w1", draining=draining))
        fleet.next()
    assert [set(w) for w in widths.values()] == [{1, 2}, {1, 2}]
    assert fleet.ends[0].degree_changes == 4 and fleet.ends[0].steps_lost == 0


@pytest.mark.parametrize("policy", ["edf", "hocket"])
def test_an_idle_mesh_keeps_a_deadline_that_is_as_long_as_it_told(policy: str) -> None:
    for workflow in (TWO_PASS, BRANCHES):
        request = asked("r0", workflow, None)
        told = Fleet(policy).scheduler.forecast_alone(request, 0)
        forecast = Fleet(policy).scheduler.forecast((request,), 0)[0]
        fleet = alone(policy, workflow, slo_us=told.finish_us + 100 * MS)
        (end,) = fleet.ends
        assert end.on_time
        for finish_us in (told.finish_us, forecast.finish_us):
            assert abs(end.at_us - finish_us) <= 100 * MS, (workflow.name, finish_us)
        eta_us = Fleet(policy).scheduler.predict_finish_us(request, 0)
        assert eta_us == forecast.finish_us


def test_a_deadline_counts_for_the_whole_request() -> None:
    """With the time for later passes in it, the first pass is already made as fast as it has to be:
    narrow, it would leave too little.
    """
    fleet = alone("hocket", TWO_PASS, slo_us=500 * MS)
    assert fleet.ends[0].on_time
    first = next(a for a in fleet.log if a.node == "base")
    assert len(first.workers) == 2


def test_an_artifact_that_its_holders_lack_is_made_again_and_nothing_else() -> None:
    fleet = Fleet("edf")
    fleet.known["r0"] = TWO_PASS
    fleet.enter(asked("r0", TWO_PASS, None))
    while not (refine := [a for a in fleet.flights if a.node == "refine"]):
        fleet.next()
    a = refine[0]
    text = next(i for i in a.batch[0].inputs if i.artifact == "text.out")
    del fleet.holds[text.holders[0]]["r0", "text.out"]
    failed = AssignmentFailed(
        at_us=fleet.now_us,
        sequence=a.sequence,
        worker=a.workers[0],
        jobs=(),
        reason="LATENT_MISSING",
        artifact="text.out",
        tried=text.holders,
    )
    fleet.observe(failed)
    again = fleet.plan()
    assert [b.node for b in again] == ["text"]
    fleet.run()
    assert fleet.calls["r0", "text"] == 2 and fleet.calls["r0", "encode"] == 1
    assert fleet.ends[0].outcome is Outcome.DONE and fleet.ends[0].steps_lost == 0


def test_a_worker_that_was_ahead_of_its_heartbeat_says_how_far_it_is() -> None:
    """A new leader knows a stepped node's latents from a heartbeat; the old leader's assignment
    went on, so that they are no more what they were, but better.
    """
    before = Fleet("fixed-1")
    before.known["r0"] = TWO_PASS
    before.enter(asked("r0", TWO_PASS, None))
    while not (refine := [a for a in before.flights if a.node == "refine"]):
        before.next()
    (worker,) = refine[0].workers
    before.over(refine[0], 1)
    fleet = led_anew(before, "fixed-1", arrive_first=True, lead_us=0)
    (a,) = fleet.flights
    assert (a.node, a.batch[0].first_step, a.workers) == ("refine", 1, (worker,))
    fleet.holds[worker]["r0", "refine.latents"] = 2
    fleet.observe(
        AssignmentFailed(
            at_us=fleet.now_us,
            sequence=a.sequence,
            worker=worker,
            jobs=(JobProgress(request="r0", attempt=0, steps_done=2),),
            reason="LATENT_MISSING",
            artifact="refine.latents",
            tried=(worker,),
        )
    )
    (again,) = fleet.plan()
    assert (again.node, again.batch[0].first_step) == ("refine", 2)


@pytest.mark.parametrize("held", ["vae2.out", "encode.out"])
def test_steps_before_what_survives_are_not_lost(held: str) -> None:
    """A new leader finds pixels, or what the second pass begins from, and no latents."""
    before = Fleet("edf")
    before.known["r0"] = TWO_PASS
    before.enter(asked("r0", TWO_PASS, None))
    while not any(("r0", held) in kept for kept in before.holds.values()):
        before.next()
    keep = {("r0", held), ("r0", "text.out")}
    for worker, kept in before.holds.items():
        before.holds[worker] = {name: done for name, done in kept.items() if name in keep}
    fleet = led_anew(before, "edf", arrive_first=True, lead_us=0)
    fleet.run()
    (end,) = fleet.ends
    assert (end.outcome, end.steps_done, end.steps_lost) == (Outcome.DONE, 7, 0)


def test_what_a_leaving_worker_holds_alone_is_copied_under_its_name() -> None:
    fleet = Fleet("edf", workers=1)
    fleet.known["r0"] = TWO_PASS
    fleet.enter(asked("r0", TWO_PASS, None))
    while not (steps := [a for a in fleet.flights if a.node == "refine"]):
        fleet.next()
    fleet.observe(replace(fleet.ups["w0"], at_us=fleet.now_us, worker="w9"))
    fleet.holds["w9"] = {}
    fleet.observe(DrainRequested(at_us=fleet.now_us, worker="w0"))
    (other,) = fleet.arrive("p", slo_us=MS)
    assert other.workers == ("w9",) and other.end_us < steps[0].end_us
    fleet.next()
    fleet.now_us = steps[0].end_us
    fleet.flights.remove(steps[0])
    fleet.over(steps[0])
    assert fleet.scheduler.latents_alone("w0") == ("r0",)
    (fetch,) = fleet.scheduler.plan(fleet.now_us).fetches
    assert (fetch.artifact, fetch.steps_done, fetch.worker) == ("refine.latents", 1, "w9")


def test_requests_that_cannot_be_run_are_refused_by_name() -> None:
    scheduler = Fleet("edf").scheduler
    request = asked("r0", TWO_PASS, None)
    for wrong, error in (
        (replace(request, workflow="nobody's"), UnknownWorkflow),
        (replace(request, passes=request.passes[::-1]), PassesFault),
        (replace(request, passes=()), PassesFault),
    ):
        with pytest.raises(error):
            scheduler.observe(Arrived(at_us=0, request=wrong))
        assert not scheduler.jobs() and not scheduler.due(0)
    with pytest.raises(WorkflowTaken):
        scheduler.learn(Workflow(TWO_PASS.name, BRANCHES.nodes))


def test_workflows_are_forgotten_once_many_are_known_that_no_request_uses() -> None:
    fleet = Fleet("edf")
    fleet.enter(asked("r0", TWO_PASS, None), plan=False)
    for i in range(2 * WORKFLOWS_MAX):
        fleet.scheduler.learn(Workflow(f"other-{i}", TWO_PASS.nodes))
    fleet.enter(asked("r1", TWO_PASS, None), plan=False)
    other = replace(asked("r2", TWO_PASS, None), workflow="other-0")
    with pytest.raises(UnknownWorkflow):
        fleet.enter(other)
    fleet.enter(replace(other, workflow=f"other-{2 * WORKFLOWS_MAX - 1}"))


def test_the_state_of_a_request_is_that_of_the_node_it_is_at() -> None:
    fleet = Fleet("edf")
    fleet.known["r0"] = TWO_PASS
    fleet.enter(asked("r0", TWO_PASS, None))
    seen = {}
    while fleet.flights:
        view = fleet.scheduler.job("r0")
        assert view is not None
        seen[view.calls[0]] = (view.state.value, view.steps_done, view.steps)
        fleet.next()
    assert seen["text"] == ("encoding", 0, 7) and seen["base"] == ("denoising", 3, 7)
    assert seen["vae"] == ("decoding", 4, 7) and seen["encode"] == ("encoding", 4, 7)
    assert seen["refine"] == ("denoising", 6, 7) and seen["media"] == ("decoding", 7, 7)


@pytest.mark.parametrize("policy", ["edf", "hocket"])
def test_a_node_costs_control_one_assignment_and_a_step_no_more_than_in_a_plain_chain(
    policy: str,
) -> None:
    """50 steps in 8 nodes against 50 in 3: five calls more, and not one message a step more."""
    passes = tuple(replace(p, shape=SHAPE, steps=25) for p in PASSES[TWO_PASS.name])
    two, plain = Fleet(policy, lead_us=20 * MS), Fleet(policy, lead_us=20 * MS)
    two.known["r0"] = TWO_PASS
    two.enter(replace(asked("r0", TWO_PASS, 10**12), steps=25, passes=passes))
    plain.arrive("r0", steps=50, slo_us=10**12)
    for fleet in (two, plain):
        Desk.run(fleet)
        assert fleet.ended["r0"].steps_done == 50
    steps = [sum(a.node in f.stepped for a in f.log) for f in (two, plain)]
    assert steps[0] <= steps[1] + 1, steps  # a pass may end in a shorter assignment
    assert len(two.log) - steps[0] == 6 and len(plain.log) - steps[1] == 2


def test_what_a_stopping_encoder_holds_is_fetched_while_it_is_needed_and_no_longer() -> None:
    fleet = Fleet("edf", workers=4, offers=MIXED)
    for number in range(4):  # more than steps at once: some wait with their embeddings
        fleet.known[f"r{number}"] = TWO_PASS
        fleet.enter(asked(f"r{number}", TWO_PASS, None))
    while any(fleet.scheduler.job(r).nodes["text"] != "done" for r in fleet.known):
        fleet.next()
    fleet.observe(DrainRequested(at_us=fleet.now_us, worker="w0"))
    parked = {v.request for v in fleet.scheduler.jobs() if not v.outstanding}
    fetches = {f.request: f for f in fleet.scheduler.plan(fleet.now_us).fetches}
    assert parked and set(fetches) <= parked and fetches
    told = {(f.artifact, f.steps_done, f.holder) for f in fetches.values()}
    assert told == {("text.out", 0, "w0")}
    assert not set(fleet.scheduler.safe_to_release("w0")) & set(fetches)
