"""Allocation and packing against brute force; the policies' promises."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from control.scheduler.outlook.rounds import Window, WindowKind
from control.scheduler.policies.allocation import minimal_allocation
from control.scheduler.policies.base import Candidate, steps_in
from control.scheduler.policies.knapsack import Item, pack
from control.scheduler.policies.registry import make_policy
from control.scheduler.settings import Settings

SMALL = {1: 22_300, 2: 60_000, 4: 60_000, 8: 60_000}
LARGE = {1: 998_600, 2: 514_700, 4: 265_600, 8: 141_800}
WINDOW = Window(WindowKind.ROUND, 1, 0, 709_000)


def brute_force(steps, budget_us, step_us):
    """The cheapest cost over all ways to share the steps out to at most two degrees."""
    costs = [
        s * a * step_us[a] + (steps - s) * b * step_us[b]
        for a, b in itertools.product(step_us, repeat=2)
        for s in range(steps + 1)
        if s * step_us[a] + (steps - s) * step_us[b] <= budget_us
    ]
    return min(costs, default=None)


@given(
    steps=st.integers(1, 30),
    budget_us=st.integers(0, 4_000),
    times=st.lists(st.integers(1, 200), min_size=1, max_size=4),
)
def test_minimal_allocation_is_minimal(steps, budget_us, times):
    step_us = dict(zip((1, 2, 4, 8), times, strict=False))
    parts = minimal_allocation(steps, budget_us, step_us)
    best = brute_force(steps, budget_us, step_us)
    if best is None:
        assert parts is None
        return
    assert parts is not None and sum(p.steps for p in parts) == steps
    assert all(p.steps > 0 for p in parts) and len(parts) <= 2
    assert sum(p.steps * step_us[p.degree] for p in parts) <= budget_us
    assert sum(p.steps * p.degree * step_us[p.degree] for p in parts) == best


def test_a_small_picture_is_pinned_to_one_worker():
    assert minimal_allocation(28, 1_000_000, SMALL) == ((28, 1),)
    assert minimal_allocation(28, 600_000, SMALL) is None


def test_two_degrees_just_meet_the_deadline():
    parts = minimal_allocation(28, 5_000_000, LARGE)
    assert parts is not None and [p.degree for p in parts] == [4, 8]
    assert sum(p.steps * LARGE[p.degree] for p in parts) <= 5_000_000


items = st.builds(Item, st.integers(1, 8), st.tuples(st.integers(0, 1), st.integers(0, 20)))


@given(groups=st.lists(st.lists(items, max_size=3), max_size=5), capacity=st.integers(0, 8))
def test_the_knapsack_is_optimal(groups, capacity):
    groups = [[Item(0, (1, 0)), *group] for group in groups]
    chosen = pack(groups, capacity)
    picked = [g[i] for g, i in zip(groups, chosen, strict=True)]
    assert sum(p.width for p in picked) <= capacity

    def value(choice):
        return tuple(sum(c.value[i] for c in choice) for i in (0, 1))

    feasible = [value(c) for c in itertools.product(*groups) if sum(i.width for i in c) <= capacity]
    assert value(picked) == max(feasible)


def test_steps_in_a_span():
    assert steps_in(100, 30, 1.0, 9) == 3
    assert steps_in(100, 30, 0.3, 9) == 4
    assert steps_in(100, 30, 0.3, 2) == 2
    assert steps_in(90, 30, 0.0, 9) == 3
    assert steps_in(-5, 30, 0.0, 9) == 0


def candidate(name, order=0, deadline_us=None, times=LARGE, steps=28, priority=0, since_us=0):
    return Candidate(
        request=name,
        order=order,
        priority=priority,
        deadline_us=deadline_us,
        available_us=0,
        waiting_since_us=since_us,
        steps_left=steps,
        degrees=tuple(times),
        mean_us=times,
        safe_us=times,
        group=(),
        holders=(),
    )


def choose(candidates, workers=8, window=WINDOW, **policy_settings):
    policy = make_policy(Settings(policy_settings=policy_settings))
    chosen = policy.choose(window, tuple(candidates), workers)
    assert sum(c.degree for c in chosen) <= workers
    assert len({c.request for c in chosen}) == len(chosen)
    return {c.request: c for c in chosen}


def test_slack_is_no_reason_to_wait():
    assert "a" in choose([candidate("a", deadline_us=10**9)])
    lazy = choose([candidate("a", deadline_us=10**9)], progress=False, fill=False)
    assert not lazy, "Algorithm 1 as printed procrastinates"


def test_idle_workers_widen_only_what_gains():
    chosen = choose(
        [
            candidate("large", 0, deadline_us=10**9),
            candidate("small", 1, deadline_us=10**9, times=SMALL),
        ]
    )
    assert chosen["large"].degree == 4 and chosen["large"].reason == "scale-up"
    assert chosen["small"].degree == 1
    long = Window(WindowKind.ROUND, 1, 0, 2_000_000)
    alone = [candidate("a", deadline_us=10**9)]
    assert choose(alone, window=long, scale_up=False)["a"].degree == 1
    assert choose(alone, window=long)["a"].degree == 8


def test_a_hopeless_request_displaces_nobody():
    urgent = candidate("urgent", 1, deadline_us=28 * 141_800 + 1_000)
    hopeless = candidate("hopeless", 0, deadline_us=1_000_000)
    chosen = choose([hopeless, urgent])
    assert chosen["urgent"].degree == 8 and "hopeless" not in chosen


def test_priority_goes_first_among_equals():
    def twins(first, second):
        return [
            candidate("a", 0, deadline_us=30_000_000, priority=first),
            candidate("b", 1, deadline_us=30_000_000, priority=second),
        ]

    small = Window(WindowKind.ROUND, 1, 0, 1_000_000)
    assert set(choose(twins(0, 1), workers=1, window=small)) == {"b"}
    assert set(choose(twins(0, 0), workers=1, window=small)) == {"a"}


def test_best_effort_does_not_starve():
    crowd = [candidate(f"r{i}", i, 3_000_000, SMALL) for i in range(8)]
    patient = candidate("patient", 99)
    assert "patient" not in choose([*crowd, patient])
    late = Window(WindowKind.ROUND, 1, 31_000_000, 31_700_000)
    crowd = [candidate(f"r{i}", i, 34_000_000, SMALL) for i in range(8)]
    assert choose([*crowd, patient], window=late)["patient"].reason == "overdue"
    assert "patient" not in choose([*crowd, patient], window=late, patience_us=0)
