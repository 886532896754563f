"""When a process is started again: pure, in seconds of any clock."""

from __future__ import annotations

from hocket.launching.restarts import RestartRule, Restarts

RULE = RestartRule(first_s=0.5, longest_s=15.0, calm_s=60.0, most=10, window_s=600.0)


def test_waits_double_up_to_the_longest() -> None:
    restarts = Restarts(RULE)
    waits = [restarts.died(float(at), lived_s=1.0) for at in range(8)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0] and restarts.count == 8


def test_a_minute_of_life_begins_the_waits_anew() -> None:
    restarts = Restarts(RULE)
    assert [restarts.died(at, lived_s=1.0) for at in (0.0, 1.0)] == [0.5, 1.0]
    assert restarts.died(100.0, lived_s=60.0) == 0.5
    assert restarts.died(101.0, lived_s=1.0) == 1.0


def test_ten_restarts_in_ten_minutes_are_the_last() -> None:
    restarts = Restarts(RULE)
    assert all(restarts.died(float(at), 1.0) is not None for at in range(10))
    assert restarts.died(11.0, 1.0) is None
    assert restarts.died(600.0, 1.0) is not None, "the first one is ten minutes ago"
    assert restarts.count == 11


def test_a_rule_of_none_starts_nothing_again() -> None:
    assert Restarts(RestartRule(most=0)).died(0.0, 100.0) is None
