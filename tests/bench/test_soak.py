"""Whatever runs long enough shows what grows: the scheduler must not."""

import json

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.sim.soak import held, soak, soak_case
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from hocket.clock import steady_ns

SPAN_US = 600_000_000  # what counts as an hour here


def hours(policy):
    case = soak_case(1, 12.0, 8, Settings(policy=policy), seed=3)
    found = list(soak(case, steady_ns, SPAN_US))
    assert sum(h.ended for h in found) == len(case.trace) and found[-1].inside == 0
    return [h.objects - 100 * h.inside for h in found]  # a request holds fewer than 100


@pytest.mark.parametrize("policy", ["hocket", "tetriserve", "genserve", "edf"])
def test_a_scheduler_holds_no_more_after_an_hour(policy):
    first, *_, last = hours(policy)
    assert last < first + 300


def test_a_scheduler_that_remembers_every_fact_is_seen(monkeypatch):
    facts = []
    real = Scheduler.observe

    def remembering(self, fact):
        self._clock_facts = facts  # what leaks hangs on the scheduler
        facts.append(fact)
        return real(self, fact)

    monkeypatch.setattr(Scheduler, "observe", remembering)
    first, *_, last = hours("tetriserve")
    assert last > first + 300


def test_what_an_object_reaches_is_counted_once():
    shared = [1000, 2000]
    assert held([shared, shared]) == held([shared]) == 4


def test_the_command_writes_its_hours(tmp_path):
    out = tmp_path / "soak.json"
    arguments = ["soak", "--hours", "1", "--rate", "2", "--policy", "edf", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(out.read_text())
    assert sum(h["ended"] for h in told["hours"]) == told["requests"] == 120
