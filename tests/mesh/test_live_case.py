"""A Case in real time through the whole mesh: what `python -m bench live` compares."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bench.live.compare import compare
from bench.live.run import run_live
from bench.sim.case import Case, ClusterSpec
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from tests.bench.test_live_profile import CSV, asked


async def test_every_request_of_the_case_has_an_outcome(tmp_path: Path) -> None:
    trace = tuple(
        msgspec.structs.replace(asked(f"r{i}", i * 50_000), slo_us=60_000_000, priority=i % 2)
        for i in range(4)
    )
    case = Case(
        cluster=ClusterSpec(workers=2).completed(Profile.from_csv(CSV)),
        profile_csv=CSV,
        trace=trace,
        settings=Settings(policy="edf", lead_us=20_000, policy_settings={"priority_first": True}),
    )
    told: list[tuple[int, int]] = []
    outcomes = await run_live(case, tmp_path, "emulated", lambda n, of: told.append((n, of)))
    assert set(outcomes) == {t.id for t in trace} and told[-1] == (4, 4)
    assert all(o.latency_us and o.on_time and o.name and not o.problem for o in outcomes.values())
    found = compare("edf", 0, [outcomes], case, case)
    assert (found.attainment, found.simulated.attainment, found.problems) == (1.0, 1.0, 0)
