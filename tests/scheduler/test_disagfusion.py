"""DisagFusion: targets, one action at a time, pools that pull; and shares of whole workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control.scheduler.outlook.scene import Scene
from control.scheduler.policies.disagfusion_scaling import (
    Action,
    Scaling,
    StageTimes,
    backlog,
    target,
)
from control.scheduler.policies.shares import largest_remainder
from control.scheduler.settings import SettingError
from control.scheduler.values import DIT, TEXT, VAE, WorkerLost

from .desk import MS, OTHER, Desk


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6), st.integers(0, 40))
def test_shares_add_up_and_are_fair(weights, total):
    known = dict(enumerate(weights))
    shares = largest_remainder(known, total)
    assert sum(shares.values()) == total
    whole = sum(weights)
    for key, weight in known.items():
        exact = total * weight / whole if whole > 0 else total / len(known)
        assert abs(shares[key] - exact) < 1 + 1e-6


def test_remainders_tie_to_the_heavier():
    assert largest_remainder({"a": 1.0, "b": 3.0}, 2) == {"a": 0, "b": 2}


LONG = {TEXT: 5.05, DIT: 74.2, VAE: 9.0}
SHORT = {TEXT: 5.05, DIT: 18.6, VAE: 9.0}


def weights(times, unfinished, queued):
    return {
        node: times[node] * (sum(node in left for left in unfinished) + queued.get(node, 0))
        for node in (TEXT, DIT, VAE)
    }


def test_targets_are_the_papers():
    running = [(DIT, VAE)] * 6
    calm = weights(LONG, running, {})
    assert target(calm, 8, False) == {TEXT: 1, DIT: 5, VAE: 2}
    backlog = weights(LONG, running + [(DIT, VAE)] * 6, {DIT: 6})
    assert target(backlog, 8, False) == {TEXT: 1, DIT: 6, VAE: 1}
    assert target(weights(SHORT, running, {}), 8, False) == {TEXT: 1, DIT: 4, VAE: 3}
    denoising = weights(SHORT, running + [(DIT, VAE)] * 3, {DIT: 3})
    assert target(denoising, 8, False) == {TEXT: 1, DIT: 5, VAE: 2}
    decoding = weights(SHORT, running, {VAE: 8})
    assert target(decoding, 8, False) == {TEXT: 1, DIT: 3, VAE: 4}


def test_who_is_queued_counts_twice():
    desk = Desk("disagfusion", workers=3, ratio="1:1:1", scaling="static")
    for name in "abc":
        desk.arrive(name)
    ledger = desk.scheduler._ledger
    scene = Scene(ledger, ledger.board.forecast(ledger.cluster, 0), 0)
    times = StageTimes(learns=True)
    times.follow(scene)
    encode, denoise, decode = 20 * MS, 200 * MS, 40 * MS
    whole = {TEXT: (3 + 2) * encode, DIT: 3 * denoise, VAE: 3 * decode}
    assert backlog(scene, times, only_next=False) == whole
    assert backlog(scene, times, only_next=True) == {TEXT: 5 * encode, DIT: 0, VAE: 0}


def test_extra_encoders_are_given_away_unless_encoding_is_the_load():
    some = {TEXT: 30.0, DIT: 50.0, VAE: 20.0}
    assert target(some, 8, False)[TEXT] == 1
    much = {TEXT: 50.0, DIT: 30.0, VAE: 20.0}
    assert target(much, 8, False)[TEXT] > 1
    assert target(much, 8, True)[TEXT] == 1, "feedback always gives them away"


def test_one_action_a_tick_and_none_while_it_cools():
    scaling = Scaling("both", 15)
    roles = {"a": TEXT, **{f"t{i}": DIT for i in range(6)}, "z": VAE}
    heavy = weights(SHORT, [(DIT, VAE)] * 6, {VAE: 8})
    idle = ["t1", "t4"]
    assert scaling.act(0, heavy, roles, idle) == Action("t1", VAE)
    roles["t1"] = VAE
    assert scaling.act(14, heavy, roles, ["t4"]) is None, "cooling"
    assert scaling.act(15, heavy, roles, ["t4"]) == Action("t4", VAE)


def test_a_busy_victim_drains_first():
    scaling = Scaling("both", 15)
    roles = {"a": TEXT, **{f"t{i}": DIT for i in range(6)}, "z": VAE}
    heavy = weights(SHORT, [(DIT, VAE)] * 6, {VAE: 8})
    assert scaling.act(0, heavy, roles, []) is None and scaling.draining == {"t5"}
    assert scaling.act(2, heavy, roles, []) is None and scaling.draining == {"t5"}, "one a role"
    assert scaling.act(4, heavy, roles, ["t5"]) == Action("t5", VAE)
    assert not scaling.draining
    scaling.draining.add("t4")
    content = weights(LONG, [(DIT, VAE)] * 12, {DIT: 6})
    assert scaling.act(6, content, {**roles, "t5": DIT}, []) is None
    assert not scaling.draining, "on target: drains are called off"
    assert scaling.act(8, dict.fromkeys((TEXT, DIT, VAE), 0.0), roles, ["t1"]) is None


def test_stages_pull_in_order_on_their_own_workers():
    desk = Desk("disagfusion", workers=4, scaling="static", ratio="1:2:1")
    for name in "abcd":
        desk.arrive(name)
    desk.run()
    place = {TEXT: {"w0"}, DIT: {"w1", "w2"}, VAE: {"w3"}}
    for a in desk.log:
        assert set(a.workers) <= place[a.node] and len(a.workers) == 1 and len(a.batch) == 1
        assert a.steps == (2 if a.node == DIT else 1), "all steps in one go"
    decoded = [a.batch[0].request for a in desk.log if a.node == VAE]
    assert decoded == list("abcd")


def test_a_switch_takes_its_time_and_the_weights():
    desk = Desk(
        "disagfusion",
        workers=8,
        memory=100,
        models=(OTHER,),
        tick_us=10 * MS,
        cooldown_us=0,
        switch_us=300 * MS,
    )
    for i in range(30):
        desk.arrive(f"r{i}", model=OTHER, steps=1)
    desk.run()
    assert len(desk.ended) == 30
    first = {w: a for a in reversed(desk.log) for w in a.workers if a.node == VAE}
    assert len(first) > 1, "decoding is what takes longest here"
    for name, a in first.items():
        if name == "w7":
            continue
        before = [b.end_us for b in desk.log if name in b.workers and b.sequence < a.sequence]
        assert a.start_us >= max(before, default=0) + 300 * MS
        (load,) = [x for x in desk.loads if x.sequence == a.sequence]
        assert load.load_us == 200 and "other/dit" in load.evict


def test_a_role_that_nobody_has_left_is_filled():
    desk = Desk("disagfusion", workers=4, scaling="static", ratio="1:2:1", switch_us=5 * MS)
    desk.scheduler.plan(0)
    desk.scheduler.observe(WorkerLost(at_us=0, worker="w0"))
    desk.arrive("a")
    desk.run()
    assert [n for n, _ in desk.places("a")] == [TEXT, DIT, VAE]


def test_two_workers_do_everything():
    desk = Desk("disagfusion", workers=2)
    for name in "abc":
        desk.arrive(name)
    desk.run()
    assert len(desk.ended) == 3


@pytest.mark.parametrize("ratio", ["1:6", "0:6:1", "a:b:c"])
def test_a_ratio_has_three_parts(ratio):
    with pytest.raises(SettingError):
        Desk("disagfusion", ratio=ratio)
