"""Workflows with several stepped nodes, calls without weights and inputs by artifact."""

from __future__ import annotations

import pytest

from control.scheduler.values import Outcome
from control.scheduler.workflow import Workflow

from .desk import MS
from .fleet import BRANCHES, PASSES, TWO_PASS, Fleet, asked, disturbed

POLICIES = ["diflow", "disagfusion", "edf", "fixed-1", "genserve", "hocket", "srtf", "tetriserve"]
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
    for seed in range(3):
        for at_event in range(24):
            fleet = disturbed(policy, workflow, at_event, seed, lead_us)
            ended = sorted((e.request, e.outcome) for e in fleet.ends)
            assert ended == [("r0", Outcome.DONE), ("r1", Outcome.DONE)], (seed, at_event)
