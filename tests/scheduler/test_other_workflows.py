"""Requests whose workflow is not the chain, driven from their arrival to their end."""

from __future__ import annotations

import dataclasses

import pytest

from control.scheduler.values import (
    Arrived,
    Assignment,
    AssignmentFailed,
    Outcome,
    Request,
    WorkerLost,
)
from control.scheduler.workflow import (
    CHAIN,
    Artifact,
    ArtifactType,
    Degrees,
    Node,
    NodeKind,
    Workflow,
)

from .desk import BASE, MS, ROWS, SHAPE, Desk

STEPS = 4
CALLS = {"clip": 20, "t5": 60, "files": 5}  # ms, beside those of the desk's own nodes


def once(id_: str, part: str, inputs: tuple[str, ...], output: str, type_: ArtifactType) -> Node:
    return Node(id_, part, NodeKind.ONCE, inputs, (Artifact(output, type_),))


# clip ─┬─▶ dit ──▶ vae ──▶ files      two encoders beside each other; files are made by no part
# t5 ───┘
BRANCHED = Workflow(
    "branched",
    (
        once("clip", "clip", (), "pooled", ArtifactType.EMBEDDINGS),
        once("t5", "t5", (), "tokens", ArtifactType.EMBEDDINGS),
        Node(
            "dit",
            "dit",
            NodeKind.STEPPED,
            ("pooled", "tokens"),
            (Artifact("latents", ArtifactType.LATENTS),),
            Degrees.OFFERED,
        ),
        once("vae", "vae", ("latents",), "pixels", ArtifactType.PIXELS),
        once("files", "", ("pixels",), "media", ArtifactType.MEDIA),
    ),
)
BRANCHED_ROWS = ROWS + "".join(
    f"{BASE},g,{node},512,512,1,1,1,{ms * MS}\n" for node, ms in CALLS.items()
)


def desk(
    policy: str, workflow: Workflow = BRANCHED, workers: int = 2, lead_us: int = 0, slo_ms: int = 0
) -> Desk:
    made = Desk(policy, workers=workers, rows=BRANCHED_ROWS, workflows=(workflow,), lead_us=lead_us)
    due = {"slo_us": slo_ms * MS} if slo_ms else {}
    made.arrive("a", steps=STEPS, workflow=workflow.name, **due)
    return made


def until(at: Desk, node: str) -> Assignment:
    """Goes on until a node of the request is under way."""
    while not (found := [a for a in at.flights if a.node == node]):
        at.next()
    return found[0]


def again(at: Desk, lost: str) -> list[str]:
    """Loses a worker; the nodes that ran from then on, without repetition."""
    at.flights = [a for a in at.flights if lost not in a.workers]
    before = len(at.log)
    at.scheduler.observe(WorkerLost(at_us=at.now_us, worker=lost))
    at.plan()
    at.run()
    assert at.ended["a"].outcome is Outcome.DONE
    return list(dict.fromkeys(a.node for a in at.log[before:]))


@pytest.mark.parametrize(
    "policy", ["diflow", "disagfusion", "edf", "fixed-1", "genserve", "hocket", "tetriserve"]
)
@pytest.mark.parametrize(("lead_us", "slo_ms"), [(0, 0), (20 * MS, 320), (20 * MS, 450)])
def test_every_node_runs_once_its_inputs_are_there(policy: str, lead_us: int, slo_ms: int) -> None:
    at = desk(policy, lead_us=lead_us, slo_ms=slo_ms)
    at.run()
    assert at.ended["a"].outcome is Outcome.DONE and at.ended["a"].steps_done == STEPS
    first = {a.node: a for a in reversed(at.log)}
    assert set(first) == set(BRANCHED.order)
    assert sum(a.steps for a in at.log if a.node == "dit") == STEPS
    assert all(a.steps == 1 for a in at.log if a.node != "dit")
    for node, makers in BRANCHED.makers.items():
        for maker in makers:
            assert first[node].sequence > first[maker].sequence
    assert first["files"].batch[0].first_step == STEPS
    assert [h.worker for h in first["files"].batch[0].holders] == list(first["vae"].workers)


def test_encoders_run_beside_each_other_and_their_makers_are_the_first_steps_holders() -> None:
    at = desk("edf")
    clip, t5 = at.log
    assert {clip.node, t5.node} == {"clip", "t5"} and clip.workers != t5.workers
    dit = until(at, "dit")
    assert at.now_us == CALLS["t5"] * MS
    holders = [(h.worker, h.steps_done) for h in dit.batch[0].holders]
    assert sorted(holders) == sorted([(*clip.workers, 0), (*t5.workers, 0)])


def test_an_estimate_counts_parallel_encoders_once() -> None:
    at = Desk("edf", rows=BRANCHED_ROWS, workflows=(BRANCHED,))
    request = Request(id="b", model=BASE, shape=SHAPE, steps=STEPS, workflow=BRANCHED.name)
    told_us = at.scheduler.forecast_alone(request, 0).finish_us
    assert told_us == (60 + STEPS * 50 + 40 + 5) * MS


def test_only_the_encoder_whose_embeddings_are_lost_runs_again() -> None:
    at = desk("edf", workers=3)
    (clip,) = [a for a in at.log if a.node == "clip"]
    while clip in at.flights:
        at.next()
    assert [a.node for a in at.flights] == ["t5"]
    assert again(at, clip.workers[0]) == ["clip", "dit", "vae", "files"]


def test_a_late_report_of_one_encoder_says_nothing_of_the_other() -> None:
    at = desk("edf", workers=3)
    t5, clip = (next(a for a in at.log if a.node == node) for node in ("t5", "clip"))
    failed = AssignmentFailed(
        at_us=0, sequence=t5.sequence, worker=t5.workers[0], jobs=(), reason="ENCODE_FAILED"
    )
    at.scheduler.observe(failed)
    at.over(clip)
    view = at.scheduler.job("a")
    assert view is not None and not view.holders
    assert [view.nodes[n] for n in ("clip", "t5", "dit")] == ["done", "ready", "blocked"]
    at.flights.clear()
    at.plan()
    at.run()
    assert at.ended["a"].outcome is Outcome.DONE
    assert [a.node for a in at.log if a.node in ("clip", "t5")] == [clip.node, t5.node, "t5"]


def test_pixels_that_are_lost_are_decoded_again_from_latents_that_are_not() -> None:
    at = desk("edf", workers=2)
    files = until(at, "files")
    assert again(at, files.workers[0]) == ["vae", "files"]


def test_steps_on_one_worker_only_where_the_workflow_says_so() -> None:
    nodes = [
        dataclasses.replace(n, degrees=Degrees.ONE) if n.id == "dit" else n for n in CHAIN.nodes
    ]
    for policy in ("edf", "hocket", "tetriserve"):
        at = desk(policy, Workflow("narrow", tuple(nodes)))
        at.run()
        assert {len(a.workers) for a in at.log} == {1}, policy
        assert {len(a.workers) for a in wide(policy).log if a.node == "dit"} == {2}, policy


def wide(policy: str) -> Desk:
    at = desk(policy, dataclasses.replace(CHAIN, name="wide"))
    at.run()
    return at


def test_a_request_names_a_workflow_that_its_scheduler_knows() -> None:
    assert Request(id="r", model=BASE, shape=SHAPE, steps=1).workflow == CHAIN.name
    request = Request(id="r", model=BASE, shape=SHAPE, steps=1, workflow="nobody's")
    with pytest.raises(KeyError):
        Desk("edf").scheduler.observe(Arrived(at_us=0, request=request))
