"""A short run of `bench chaos`: emulated workers, two controls, two gateways, a dozen seconds."""

from __future__ import annotations

import pytest

from bench.chaos.run import ChaosPlan, run


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [3])
async def test_promises_hold_while_processes_die(seed: int) -> None:
    plan = ChaosPlan(
        seconds=14.0,
        seed=seed,
        workers=8,
        executor="emulated",
        callers=6,
        gap_s=(1.5, 3.0),
        steps=4,
    )
    told: list[str] = []
    found = await run(plan, told.append)
    assert found.violations == [], "\n".join([*told, *found.violations])
    assert found.history.struck and found.requests_written
