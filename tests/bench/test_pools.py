"""Simulated days of an elastic pool: everything is served, and paid for from wish to leave."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.pools.command import one_day
from bench.pools.day import PoolDay, arrivals
from bench.pools.rules import FixedRule, PoolRule, SignalRule, UtilisationRule
from control.scaling.settings import ScalingSettings

SHORT = PoolDay(length_s=600.0, peak=6.0, bursts=1)


def test_a_day_is_the_same_for_every_rule_and_bursts_add_to_it() -> None:
    assert arrivals(SHORT, 3) == arrivals(SHORT, 3) != arrivals(SHORT, 4)
    burst = replace(SHORT, burst_factor=4.0)
    assert len(arrivals(burst, 3)) > len(arrivals(SHORT, 3))


@pytest.mark.parametrize(
    "rule", [SignalRule(ScalingSettings()), UtilisationRule(0.7)], ids=["signal", "utilisation"]
)
def test_an_elastic_pool_grows_and_serves_everything(rule: PoolRule) -> None:
    run = one_day(SHORT, 0, rule, first=2, start_s=60.0)
    assert run.requests == len(arrivals(SHORT, 0)) and run.attainment > 0.8
    assert run.most_workers > 2 and 2.0 < run.mean_workers < run.most_workers


def test_a_fixed_pool_costs_what_it_is() -> None:
    run = one_day(SHORT, 0, FixedRule(6), first=6, start_s=60.0)
    assert run.mean_workers == 6.0 and run.worker_hours == pytest.approx(1.0)


def test_the_real_scheduler_serves_a_day_with_workers_that_come_and_go() -> None:
    day = replace(SHORT, length_s=90.0, peak=3.0, burst_s=20.0, sides=(512, 1024, 1024))
    rule = SignalRule(ScalingSettings(start_us=5_000_000, quiet_us=10_000_000))
    run = one_day(day, 0, rule, first=1, start_s=5.0, policy="edf")
    assert run.requests == len(arrivals(day, 0)) and run.most_workers > 1
