"""How long best effort waits beside a steady stream of requests that are on time."""

import msgspec
import pytest

from bench.sim.loop import run

from .driving import case

STREAM_S = 40


def waited_s(wait_us_max, px=64, steps=1):
    """Longest wait of hopeless requests that come among those that keep the one worker busy."""
    stream = [(i * 280_000, 256, 4_000_000) for i in range(STREAM_S * 1_000 // 280)]
    hopeless = [(1_000_000 + i * 2_000_000, px, 1) for i in range(5)]
    one = case(
        [*stream, *hopeless],
        steps=6,
        workers=1,
        policy="hocket",
        policy_settings={"best_effort_wait_us_max": wait_us_max, "best_effort_slowdown": 20},
    )
    first = len(stream)
    trace = tuple(
        msgspec.structs.replace(r, steps=steps) if i >= first else r
        for i, r in enumerate(one.trace)
    )
    ends = {e.request: e.at_us for e in run(msgspec.structs.replace(one, trace=trace)).ended}
    return max(ends[r.id] - r.arrival_us for r in trace[first:]) / 1e6


@pytest.mark.parametrize(("wait_us_max", "served"), [(5_000_000, True), (0, False)])
def test_a_hopeless_request_of_one_step_is_served_within_the_bound(wait_us_max, served):
    assert (waited_s(wait_us_max) <= 6.0) is served


def test_a_short_one_does_not_wait_as_a_long_one():
    """Their own times are 0.1 and about 15 s; twenty times that is beyond the stream."""
    assert waited_s(1_000_000) < 3.0
    assert waited_s(1_000_000, px=2048, steps=15) > 15.0
