"""One name, one process: of two that live under one name the first keeps it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.scheduler.values import Assignment, GroupHeld, Layout, WorkerLost, WorkerUp
from control.workers.leases import Leases
from control.workers.lost_messages import LostMessages
from hocket.v1 import generation_pb2, mesh_pb2, types_pb2

LEASE_US = 2_000_000
BEAT_US = 250_000


def beat(incarnation: str = "a", **fields: object) -> mesh_pb2.Heartbeat:
    model = generation_pb2.ModelInfo(name="m", degrees=[1, 2])
    named: dict[str, object] = {"worker": "w0", "host": "h0", **fields}
    return mesh_pb2.Heartbeat(incarnation=incarnation, models=[model], **named)


def test_a_second_living_process_of_a_name_is_refused_and_the_first_keeps_its_lease() -> None:
    leases = Leases(LEASE_US)
    (up,) = leases.heartbeat(beat(), 0)
    facts = []
    for n in range(1, 40):
        now_us = n * BEAT_US
        for other in (beat(sequence=n), beat("b", sequence=n, host="h1")):
            facts += leases.heartbeat(other, now_us)
        facts += leases.expire(now_us)
    assert isinstance(up, WorkerUp) and up.incarnation == "a"
    assert not facts, "no worker flaps"
    assert leases.alive["w0"].heartbeat.incarnation == "a" and leases.refusals > 30
    why = leases.refused(beat("b", host="h1"))
    assert why is not None and "'w0'" in why and "'h0'" in why
    assert leases.refused(beat()) is None


def test_nobody_is_refused_before_the_first_was_heard_of_again() -> None:
    """It may be dead, and this its successor."""
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(), 0)
    assert leases.heartbeat(beat("b"), BEAT_US) == ()
    assert leases.refused(beat("b")) is None
    (lost,) = leases.expire(LEASE_US)
    assert isinstance(lost, WorkerLost)
    (up,) = leases.heartbeat(beat("b"), LEASE_US + BEAT_US)
    assert isinstance(up, WorkerUp) and up.incarnation == "b"


def test_a_process_that_its_supervisor_started_again_takes_over_at_once() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(), 0)
    (up,) = leases.heartbeat(beat("b", restarts=1), 1)
    assert isinstance(up, WorkerUp) and up.incarnation == "b"
    assert leases.heartbeat(beat("a"), 2) == (), "a late message of the dead one"
    assert leases.heartbeat(beat("c", restarts=2, host="h1"), 3) == (), "on another host: no kin"


def test_a_refused_one_takes_over_when_the_first_says_goodbye() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(sequence=1), 0)
    leases.heartbeat(beat("b"), 1)
    leases.heartbeat(beat(sequence=2), 2)
    assert leases.refused(beat("b"))
    (lost,) = leases.heartbeat(beat(sequence=3, leaving=True), 3)
    assert isinstance(lost, WorkerLost) and lost.reason == "leaving"
    assert leases.refused(beat("b")) is None
    assert leases.heartbeat(beat("b"), 4)


def test_a_late_goodbye_of_an_old_process_ends_nobodys_lease() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat("b"), 0)
    assert leases.heartbeat(beat("a", leaving=True), 1) == ()
    assert leases.alive["w0"].heartbeat.incarnation == "b"


def test_heartbeats_that_come_in_behind_newer_ones_say_nothing() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(sequence=5, pending_sequences=[7]), 0)
    assert leases.heartbeat(beat(sequence=4, stopping=True), 1_000_000) == ()
    lease = leases.alive["w0"]
    assert (lease.heartbeat.sequence, lease.seen_us, leases.stale) == (5, 0, 1)


def test_a_worker_that_stops_says_so_at_once() -> None:
    leases = Leases(LEASE_US)
    leases.heartbeat(beat(), 0)
    (up,) = leases.heartbeat(beat(stopping=True), 1)
    assert isinstance(up, WorkerUp) and up.stopping


def test_sequences_of_another_term_mean_nothing() -> None:
    leases = Leases(LEASE_US, term=3)
    (up,) = leases.heartbeat(beat(term=2, pending_sequences=[7]), 0)
    assert isinstance(up, WorkerUp) and up.pending == ()
    leases.heartbeat(beat(term=3, pending_sequences=[8]), 1)
    assert leases.state("w0", 2).pending == (8,)


def test_groups_given_up_are_told_and_new_ones_are_not() -> None:
    leases = Leases(LEASE_US)
    pair, four = ["w0", "w1"], ["w0", "w1", "w2", "w3"]
    groups = [types_pb2.Group(epoch=1, members=m) for m in (pair, four)]
    leases.heartbeat(beat(), 0)
    assert leases.heartbeat(beat(groups=groups), 1) == ()
    (up,) = leases.heartbeat(beat(groups=groups[1:]), 2)
    assert isinstance(up, WorkerUp)
    assert up.given_up == (GroupHeld(epoch=1, members=("w0", "w1")),)
    assert leases.heartbeat(beat(groups=groups[1:]), 3) == ()


def test_nothing_heard_is_told_once_nobody_was_heard_of_for_half_a_lease() -> None:
    leases = Leases(LEASE_US)
    assert leases.nothing_heard(10**9) is None, "there is nobody to hear of"
    leases.heartbeat(beat(), 0)
    assert leases.nothing_heard(LEASE_US // 2) is None
    fact = leases.nothing_heard(LEASE_US // 2 + 1)
    assert fact is not None and fact.at_us == LEASE_US // 2 + 1


said = st.tuples(
    st.sampled_from("abc"),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from(["h0", "h1"]),
    st.integers(0, 3_000_000),
)


@given(st.lists(said, max_size=40))
def test_at_any_time_one_incarnation_has_the_name(
    steps: list[tuple[str, int, bool, int, str, int]],
) -> None:
    """What the scheduler is told is one story: up, then lost, or another one up."""
    leases, now_us, up = Leases(LEASE_US), 0, ""
    for incarnation, sequence, leaving, restarts, host, wait_us in steps:
        now_us += wait_us
        facts = [*leases.expire(now_us)]
        message = beat(
            incarnation, sequence=sequence, leaving=leaving, restarts=restarts, host=host
        )
        facts += leases.heartbeat(message, now_us)
        for fact in facts:
            assert isinstance(fact, WorkerUp) or up, "nobody is lost who was not up"
            up = fact.incarnation if isinstance(fact, WorkerUp) else ""
        known = leases.alive.get("w0")
        assert (known.heartbeat.incarnation if known else "") == up


@pytest.fixture
def flight() -> Assignment:
    return Assignment(
        sequence=9,
        node="dit",
        batch=(),
        steps=1,
        workers=("w0",),
        epoch=1,
        layout=Layout(),
        step_time_us=1,
        step_time_us_safe=1,
        start_us=0,
        end_us=1,
        reason="",
    )


def test_an_absence_begins_anew_with_another_process(flight: Assignment) -> None:
    """Its heartbeats count from one again."""
    lost = LostMessages(term=1)
    for n in range(3):
        assert not lost.check({"w0": beat("a", term=1, sequence=100 + n)}, [flight], n * 500_000)
    for n in range(4):
        at_us = (3 + n) * 500_000
        assert not lost.check({"w0": beat("b", term=1, sequence=1 + n)}, [flight], at_us)
    assert lost.check({"w0": beat("b", term=1, sequence=5)}, [flight], 3_500_000)


def test_work_that_was_called_off_is_named_by_one_process_only() -> None:
    lost = LostMessages(term=1)
    for n in range(10):
        named = beat("ab"[n // 5], term=1, sequence=n % 5, pending_sequences=[3])
        told = lost.still_running({"w0": named}, [])
        assert told == (("w0",) if n % 5 == 4 else ())
