"""The bound on cases worked out by hand, and against schedules that really exist."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from bench.bound import bound, bound_command
from bench.bounding.demand import Mode, UnknownDemand, demands, lower_hull
from bench.bounding.relaxation import cuts, programme, variable_count
from bench.bounding.solving import solve_linear, weak_dual
from bench.sim.trace import TraceRequest, write_trace
from control.scheduler.times.profile import Profile

HEAD = "model,gpu,node,width,height,frames,degree,batch,call_us,source\n"
# 10 steps of 100 ms alone, 60 ms on two; a batch of four takes 160 ms; text 50 ms, decode 50 ms.
CALLS_US = {("dit", 1, 1): 100_000, ("dit", 2, 1): 60_000, ("text", 1, 1): 50_000}
CALLS_US |= {("vae", 1, 1): 50_000}
BATCHED_US = {**CALLS_US, ("dit", 1, 4): 160_000}
ALONE_US = 50_000 + 10 * 60_000 + 50_000


def profile(calls_us: dict[tuple[str, int, int], int]) -> str:
    return HEAD + "".join(
        f"m,g,{node},512,512,1,{degree},{batch},{us},made up\n"
        for (node, degree, batch), us in calls_us.items()
    )


def request(name: str, slo_us: int, at_us: int = 0) -> TraceRequest:
    return TraceRequest(
        id=name, arrival_us=at_us, model="m", workflow="txt2img", width=512, height=512, frames=1,
        steps=10, slo_us=slo_us, priority=0,
    )  # fmt: skip


def test_one_request_alone() -> None:
    calls = profile(CALLS_US)
    assert bound([request("a", ALONE_US)], calls, 2).bound == 1.0
    assert bound([request("a", ALONE_US - 10)], calls, 2).bound == 0.0
    assert bound([request("a", ALONE_US)], calls, 1).alone == 0.0  # no pair, no 60 ms steps
    assert bound([request("a", 1_100_000)], calls, 1).bound == 1.0
    assert bound([], calls, 1).bound == 0.0


def test_capacity_limits_how_many() -> None:
    """Each takes at least 1.1 GPU seconds; five deadlines of 2.2 s leave 2 GPUs 4.4 GPU seconds."""
    found = bound([request(f"r{i}", 2_200_000) for i in range(5)], profile(CALLS_US), 2)
    assert found.linear == pytest.approx(0.8, abs=1e-6)
    assert found.bound == 0.8


def test_speed_costs_capacity() -> None:
    """Within the 0.8 s for steps, x fast ones: 0.06 x + 0.1 (10 - x) <= 0.8 makes x >= 5.

    These take 1.1 GPU seconds of the 1.6 there are: 16/11 requests, one whole.
    """
    found = bound([request("a", 900_000), request("b", 900_000)], profile(CALLS_US), 2)
    assert found.linear == pytest.approx(16 / 11 / 2, abs=1e-6)
    assert found.bound == 0.5


def test_a_batch_shares_its_gpu() -> None:
    """Four in a batch take 1.6 s of steps and 0.1 s each: 2 GPU seconds, against 4.4 unbatched."""
    trace = [request(f"r{i}", 2_100_000) for i in range(4)]
    assert bound(trace, profile(CALLS_US), 1).bound == 0.25
    assert bound(trace, profile(BATCHED_US), 1).bound == 1.0


def test_integrality_tightens() -> None:
    """Of two that share 16/11 (above) one is whole; the third has the cluster to itself."""
    trace = [request("a", 900_000), request("b", 900_000), request("c", 900_000, 5_000_000)]
    found = bound(trace, profile(CALLS_US), 2)
    assert found.bound == pytest.approx(2 / 3)
    assert found.integer is not None and found.integer_optimal
    assert found.integer <= found.linear + 1e-9
    assert bound(trace, profile(CALLS_US), 2, mip_seconds=0).integer is None


def test_hull_keeps_the_fast_and_the_cheap() -> None:
    modes = [Mode(*m) for m in ((4, 4), (2, 5), (1, 8), (3, 4.9), (2, 6), (5, 4))]
    assert lower_hull(modes) == (Mode(1, 8), Mode(2, 5), Mode(4, 4))


def schedule(trace: list[TraceRequest], gpus: int, rng: random.Random) -> int:
    """On time under first come first served on a random degree each."""
    free_us, met = [0] * gpus, 0
    for r in trace:
        degree = rng.choice([1, 2])
        chosen = sorted(range(gpus), key=lambda g: free_us[g])[:degree]
        start_us = max([r.arrival_us, *(free_us[g] for g in chosen)])
        end_us = start_us + 100_000 + 10 * CALLS_US["dit", degree, 1]
        for g in chosen:
            free_us[g] = end_us
        met += end_us <= r.arrival_us + r.slo_us
    return met


@pytest.mark.parametrize("seed", range(4))
def test_no_schedule_beats_it_and_coarser_is_looser(seed: int) -> None:
    rng = random.Random(seed)
    at_us = 0
    trace = []
    for i in range(25):
        at_us += rng.randrange(100_000, 700_000)
        trace.append(request(f"r{i}", rng.choice([750_000, 1_000_000, 1_600_000]), at_us))
    best = max(schedule(trace, 3, rng) for _ in range(40)) / len(trace)
    calls = profile(CALLS_US)
    fine = bound(trace, calls, 3, mip_seconds=5)
    coarse = bound(trace, calls, 3, mip_seconds=0, variables_max=150)
    assert best <= fine.bound + 1e-9
    assert fine.bound <= fine.linear + 1e-9 <= fine.alone + 1e-6
    assert fine.linear <= coarse.linear + 1e-6
    assert coarse.intervals < fine.intervals


def test_any_prices_bound_the_optimum() -> None:
    trace = [request(f"r{i}", 1_300_000, 200_000 * i) for i in range(6)]
    every = demands(trace, Profile.from_csv(profile(CALLS_US)), 2)
    grid = cuts(every, 10_000)
    relaxation = programme(every, 2, grid)
    assert len(relaxation.upper) == variable_count(every, grid)
    linear = solve_linear(relaxation)
    assert linear.certified == pytest.approx(linear.solved, abs=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(20):
        prices = rng.normal(size=len(relaxation.high))
        assert weak_dual(relaxation, prices) >= linear.solved - 1e-9


def test_unknown_shapes_are_named() -> None:
    with pytest.raises(UnknownDemand, match="r0: the profile has no dit row for m 512x512x1"):
        bound([request("r0", 1)], HEAD, 1)


def test_command(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(write_trace([request("a", ALONE_US)]))
    (tmp_path / "p.csv").write_text(profile(CALLS_US))
    app = Typer()
    app.command()(bound_command)
    arguments = ["--trace", str(tmp_path / "t.jsonl"), "--profile", str(tmp_path / "p.csv")]
    arguments += ["--gpus", "2"]
    found = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(found.stdout)["bound"] == 1.0
    assert "100.00%" in CliRunner().invoke(app, arguments).stdout
