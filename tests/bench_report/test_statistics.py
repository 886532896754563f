"""Intervals, verdicts and sustained loads against numbers known from elsewhere."""

from __future__ import annotations

import math

import pytest

from bench.reporting.statistics import (
    PolicyVerdict,
    Sustained,
    mean_interval,
    paired_difference,
    sustained,
    sustained_ratio,
    t_quantile,
    verdict,
)


@pytest.mark.parametrize(
    ("freedom", "known"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (10, 2.2281), (19, 2.0930), (99, 1.9842)],
)
def test_t_quantiles_are_those_of_the_tables(freedom: int, known: float) -> None:
    assert t_quantile(freedom) == pytest.approx(known, abs=5e-5)


def test_interval_of_known_samples() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.half == pytest.approx(2.7764 * math.sqrt(2.5 / 5), abs=1e-3)
    assert mean_interval([7.0]).half is None
    with pytest.raises(ValueError):
        mean_interval([])


def test_pairing_takes_the_seeds_noise_out() -> None:
    ours = {s: 0.5 + 0.1 * s + 0.01 for s in range(4)}
    theirs = {s: 0.5 + 0.1 * s for s in range(5)}
    found = paired_difference(ours, theirs)
    assert found is not None and found.n == 4
    assert found.mean == pytest.approx(0.01) and found.half == pytest.approx(0.0, abs=1e-9)
    assert verdict(found) is PolicyVerdict.AHEAD
    back = paired_difference(theirs, ours)
    assert back is not None and verdict(back) is PolicyVerdict.BEHIND
    assert paired_difference({1: 0.5}, {2: 0.5}) is None


def test_verdict_is_level_where_zero_lies_inside() -> None:
    assert verdict(mean_interval([0.1, -0.1, 0.05])) is PolicyVerdict.LEVEL
    assert verdict(mean_interval([0.0, 0.0])) is PolicyVerdict.LEVEL
    assert verdict(mean_interval([0.1])) is PolicyVerdict.UNKNOWN


def test_sustained_load_is_interpolated_and_censored() -> None:
    assert sustained({6: 1.0, 12: 0.95, 18: 0.85}).value == pytest.approx(15.0)
    assert sustained({6: 1.0, 12: 0.95}) == Sustained(12, "≥")
    assert sustained({6: 0.7, 12: 0.95}) == Sustained(6, "<")
    recovers = {6: 1.0, 12: 0.8, 18: 0.99}
    assert sustained(recovers).value == pytest.approx(9.0)


def test_ratio_of_sustained_loads() -> None:
    ours = {x: {s: a for s in range(4)} for x, a in ((6, 1.0), (12, 0.95), (18, 0.85))}
    theirs = {x: {s: a for s in range(4)} for x, a in ((6, 0.95), (12, 0.85), (18, 0.5))}
    found = sustained_ratio(ours, theirs)
    assert found is not None and found.edge == ""
    assert found.value == pytest.approx(15.0 / 9.0)
    assert found.low == pytest.approx(found.value) == found.high
    always = {x: dict.fromkeys(range(4), 1.0) for x in (6, 12, 18)}
    censored = sustained_ratio(always, theirs)
    assert censored is not None and censored.edge == "≥"
    assert censored.value == pytest.approx(2.0)
    assert sustained_ratio(always, always) is None
    assert sustained_ratio(ours, {}) is None
