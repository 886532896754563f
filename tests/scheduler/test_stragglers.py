"""Slow workers: found, avoided while others can serve, tried again; and never by mistake."""

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.latency.recording import false_alarms
from bench.sim.costs import Costs, Straggler
from bench.sim.loop import Loop, run
from control.scheduler.books.cluster import Cluster
from control.scheduler.books.stragglers import TRIAL_STEPS, Slow, Stragglers, own_excesses
from control.scheduler.settings import SettingError, Settings
from control.scheduler.times.drift import Sample
from control.scheduler.times.latency import LatencyModel
from control.scheduler.times.profile import CellKey, Profile
from control.scheduler.values import Layout, ModelFacts, Shape, StepsEnded, WorkerUp

from .driving import FLUX_CSV, case

PROFILE = Profile.from_csv(FLUX_CSV)
SLOW = Sample(math.log(1.6), 0.05)
SLOWISH = Sample(math.log(1.3), 0.05)
FINE = Sample(0.0, 0.05)
RETRY_US = 1_000


def key(px=512, degree=1):
    return CellKey(
        "flux.1-dev", "h100", "dit", Shape(width=px, height=px), Layout(ulysses=degree), 1
    )


def cluster_of(count, models=("flux.1-dev",)):
    cluster = Cluster(1)
    facts = tuple(ModelFacts(name=m) for m in models)
    for i in range(count):
        cluster.lease(WorkerUp(at_us=0, worker=f"w{i}", incarnation="1", gpu="h100", models=facts))
    return cluster


def accuse(stragglers, *workers, steps=5):
    return [
        news for _ in range(steps) for w in workers for news in stragglers.observe((w,), SLOW, 0)
    ]


@pytest.fixture
def stragglers():
    return Stragglers(Settings(straggler_retry_us=RETRY_US))


def test_a_third_slow_step_flags_and_a_single_one_never_does(stragglers):
    for _ in range(20):
        assert not stragglers.observe(("w0",), Sample(5.0, 0.05), 0)
        for _ in range(2):
            assert not stragglers.observe(("w0",), FINE, 0)
    assert stragglers.factor(("w0", "w1")) == 1.0
    (found,) = accuse(stragglers, "w0")
    assert found.worker == "w0" and found.factor == pytest.approx(1.6)
    assert stragglers.factor(("w0", "w1")) == pytest.approx(1.6)


def test_a_group_is_slow_by_the_member_that_is_slow_elsewhere_too(stragglers):
    """Steps of the pair accuse both; the one that is normal with others is let off."""
    news = []
    for _ in range(4):
        news += stragglers.observe(("w0", "w1"), SLOW, 0)
        news += stragglers.observe(("w1",), FINE, 0)
    assert [n.worker for n in news] == ["w0"]


def test_a_pair_that_is_only_seen_together_is_accused_by_nothing(stragglers):
    assert not [n for _ in range(50) for n in stragglers.observe(("w0", "w1"), SLOW, 0)]


def test_the_slow_one_is_avoided_tried_again_and_cleared(stragglers):
    cluster = cluster_of(4)
    accuse(stragglers, "w1")
    assert stragglers.settle(cluster, 0)
    assert [w.name for w in cluster.usable()] == ["w0", "w2", "w3"]
    assert not stragglers.settle(cluster, RETRY_US - 1)
    assert stragglers.settle(cluster, RETRY_US) and len(cluster.usable()) == 4
    for _ in range(TRIAL_STEPS):
        stragglers.observe(("w1",), SLOW, RETRY_US)
    assert stragglers.settle(cluster, RETRY_US), "still slow: away again, for twice as long"
    assert len(cluster.usable()) == 3
    assert not stragglers.settle(cluster, 3 * RETRY_US - 1)
    assert stragglers.settle(cluster, 3 * RETRY_US)
    news = [n for _ in range(TRIAL_STEPS) for n in stragglers.observe(("w1",), FINE, 0)]
    assert news == [Slow("w1", 1.0)] and stragglers.factor(("w1",)) == 1.0
    stragglers.settle(cluster, 3 * RETRY_US)
    assert len(cluster.usable()) == 4


@given(st.integers(1, 9), st.sets(st.integers(0, 8)))
def test_half_of_those_that_can_serve_always_stay(count, slow):
    stragglers = Stragglers(Settings())
    cluster = cluster_of(count)
    accuse(stragglers, *(f"w{i}" for i in sorted(slow) if i < count))
    stragglers.settle(cluster, 0)
    assert 2 * len(cluster.usable()) >= count and cluster.usable()


def test_who_is_not_slow_enough_goes_on_and_is_reckoned_with(stragglers):
    cluster = cluster_of(4)
    for _ in range(5):
        stragglers.observe(("w1",), SLOWISH, 0)
    assert not stragglers.settle(cluster, 0) and len(cluster.usable()) == 4
    assert stragglers.factor(("w0", "w1")) == pytest.approx(1.3)
    accuse(stragglers, "w1")
    assert stragglers.settle(cluster, 0) and len(cluster.usable()) == 3


def test_the_only_worker_of_a_model_is_kept(stragglers):
    cluster = cluster_of(4)
    other = ModelFacts(name="other")
    cluster.lease(WorkerUp(at_us=0, worker="w9", incarnation="1", gpu="h100", models=(other,)))
    accuse(stragglers, "w9", "w0")
    stragglers.settle(cluster, 0)
    assert [w.name for w in cluster.workers.values() if w.avoided] == ["w0"]


def test_a_restarted_worker_has_a_clean_record(stragglers):
    cluster = cluster_of(4)
    accuse(stragglers, "w1")
    stragglers.settle(cluster, 0)
    stragglers.forget("w1")
    assert stragglers.settle(cluster, 0) and len(cluster.usable()) == 4


def test_a_limit_of_nought_looks_for_nobody():
    stragglers = Stragglers(Settings(straggler_factor=0))
    assert not accuse(stragglers, "w0", steps=50)
    with pytest.raises(SettingError):
        Settings(straggler_factor=1.01)


# ------------------------------------------------------------------------------------ own times

FOUR = ("w0", "w1", "w2", "w3")


def told(stragglers, group, own_us, sample=None, steps=5):
    """The group's steps, each of which was so much each member's own; who is slow or fine by it."""
    own = own_excesses(own_us, 0.05)
    return [n for _ in range(steps) for n in stragglers.observe(group, sample, 0, own)]


@pytest.mark.parametrize("sample", [SLOWISH, None], ids=["slow beside others", "nobody else"])
@pytest.mark.parametrize("group", [FOUR[:2], FOUR], ids=["pair", "four"])
@pytest.mark.parametrize("slow", [0, 1])
def test_own_times_tell_which_member_is_slow(stragglers, group, slow, sample):
    own_us = [1000] * len(group)
    own_us[slow] = 1300
    assert not told(stragglers, group, own_us, sample, steps=2), "two steps never flag"
    (found,) = told(stragglers, group, own_us, sample, steps=2)
    assert found.worker == group[slow] and found.factor == pytest.approx(1.3)


def test_two_slow_ones_of_four_are_both_found(stragglers):
    news = told(stragglers, FOUR, (1300, 1000, 1300, 1000))
    assert sorted(n.worker for n in news) == ["w0", "w2"]


@pytest.mark.parametrize("sample", [SLOW, None], ids=["slow beside others", "nobody else"])
def test_who_are_slow_alike_are_not_accused_by_each_other(stragglers, sample):
    assert not told(stragglers, FOUR, (1600, 1590, 1600, 1610), sample, steps=50)
    assert not any(stragglers.suspects(w) for w in FOUR)


def test_own_times_clear_a_suspect_and_one_odd_step_never_flags(stragglers):
    for _ in range(20):
        assert not told(stragglers, FOUR, (9000, 1000, 1000, 1000), steps=1)
        assert not told(stragglers, FOUR, (1000,) * 4, steps=1)
    accuse(stragglers, "w0", steps=2)
    assert stragglers.suspects("w0")
    told(stragglers, FOUR, (1000,) * 4, SLOW, steps=2)
    assert not stragglers.suspects("w0"), "the step was slow, and not by this one"


def test_a_step_as_others_make_it_clears_all_whatever_own_times_say(stragglers):
    assert not told(stragglers, FOUR, (1300, 1000, 1000, 1000), FINE, steps=50)


def test_a_flagged_worker_that_is_fine_among_others_is_cleared(stragglers):
    told(stragglers, FOUR, (1300, 1000, 1000, 1000))
    assert told(stragglers, FOUR, (1000,) * 4, steps=TRIAL_STEPS) == [Slow("w0", 1.0)]


@pytest.mark.parametrize("own_us", [(1300, 1300), (1300, 2000)])
@pytest.mark.parametrize("sample", [SLOWISH, None])
def test_slow_ones_do_not_clear_each_other(stragglers, own_us, sample):
    """Two GPUs of a throttled host: beside each other they look alike, beside a slower one fine."""
    for name in ("w0", "w1"):
        assert told(stragglers, (name, "w2"), [1300, 1000])
    told(stragglers, ("w0", "w1"), own_us, sample, steps=20)
    assert sorted(stragglers.factors()) == ["w0", "w1"]


@pytest.mark.parametrize("own_us", [(), (1300,), (1300, 0)])
def test_where_own_times_are_not_known_a_pair_is_accused_by_nothing(stragglers, own_us):
    assert own_excesses(own_us, 0.05) == ()
    assert not told(stragglers, ("w0", "w1"), own_us, SLOW, steps=50)
    assert stragglers.suspects("w0") and stragglers.suspects("w1"), "as without own times"


@pytest.mark.parametrize("sigma", [0.02, 0.05])
def test_equal_workers_are_not_accused_by_noise(sigma):
    for seed in range(3):
        assert not false_alarms(sigma, seed, 500, (1, 2, 4))


# ------------------------------------------------------------------------------------ with a model


def steps_of(sigma, seed, slow="", count=400, drift_at=10**9):
    """Solo steps of eight workers in turn, lognormal noise; who was flagged at which of its own."""
    rng, settings = random.Random(seed), Settings()
    model, stragglers = LatencyModel(PROFILE, settings), Stragglers(settings)
    flagged, shifts, own = {}, [], dict.fromkeys((f"w{i}" for i in range(8)), 0)
    for i in range(count):
        name = f"w{i % 8}"
        cell = key((256, 512, 1024, 2048)[rng.randrange(4)])
        factor = 1.3 if (name == slow and i >= count // 2) or i >= drift_at else 1.0
        call_us = round(PROFILE.call_us(cell) * factor * math.exp(rng.gauss(0, sigma)))
        own[name] += i >= count // 2
        sample = model.judge(cell, call_us, (name,))
        for news in stragglers.observe((name,), sample, i) if sample else ():
            flagged.setdefault(news.worker, own[name])
            model.disown(news.worker)
        if stragglers.factor((name,)) == 1.0:
            shift = model.observe(cell, call_us, (name,))
            if shift is not None:
                shifts.append((i, shift.factor))
                stragglers.forgive()
    return flagged, shifts, model


@pytest.mark.parametrize("seed", range(5))
def test_one_slow_worker_is_flagged_within_five_of_its_steps(seed):
    flagged, shifts, model = steps_of(0.05, seed, slow="w3")
    assert set(flagged) == {"w3"} and flagged["w3"] <= 5 and not shifts
    for px in (256, 512, 1024, 2048):  # and the cells are as they were
        assert model.predict(key(px)).mean_us == pytest.approx(PROFILE.call_us(key(px)), rel=0.06)


@pytest.mark.parametrize("seed", range(5))
def test_all_slower_together_is_drift_and_nobody_is_accused(seed):
    flagged, shifts, model = steps_of(0.05, seed, drift_at=200)
    assert not flagged and len(shifts) == 1
    at, factor = shifts[0]
    assert at < 200 + 12 and factor == pytest.approx(1.3, rel=0.1)
    now_us = 1.3 * PROFILE.call_us(key(1024))
    assert model.predict(key(1024)).mean_us == pytest.approx(now_us, rel=0.06)


# ------------------------------------------------------------------------------------ in a plan

ROWS = [(i * 100_000, (512, 1024)[i % 2], 30_000_000) for i in range(60)]


def slow_case(policy, until_us=1 << 60, **settings):
    straggler = Straggler(worker="w0001", from_us=0, until_us=until_us, factor=1.8)
    return msgspec.structs.replace(
        case(ROWS, policy=policy, workers=4, **settings),
        stragglers=(straggler,),
        costs=Costs(noise=0.02),
    )


@pytest.mark.parametrize("policy", ["hocket", "tetriserve", "edf", "genserve"])
def test_a_slow_worker_gets_nothing_more(policy):
    loop = Loop(slow_case(policy, straggler_retry_us=3_600_000_000))
    given = []
    while loop.instant():
        if loop.scheduler.slow_workers().get("w0001", (0, False))[1]:
            given.append(loop.scheduler.take_notices())
    assert given, "it was flagged and avoided"
    seen = [
        i for i, p in enumerate(loop.result.plans) for a in p.assignments if "w0001" in a.workers
    ]
    assert max(seen) < len(loop.result.plans) / 2
    assert len(loop.result.ended) == len(ROWS)
    assert {n.worker for notices in given for n in notices if isinstance(n, Slow)} == {"w0001"}


@pytest.mark.parametrize("members_tell", [True, False])
def test_a_slow_worker_is_found_although_it_is_only_seen_in_one_group(members_tell):
    """All workers are in every group: there is nobody else to compare with."""
    loop = Loop(slow_case("fixed-4", straggler_avoid=100.0))
    observe = loop.scheduler.observe

    def silent(fact):
        if isinstance(fact, StepsEnded):
            assert len(fact.member_time_us) in (0, 4)
            fact = msgspec.structs.replace(fact, member_time_us=())
        return observe(fact)

    if not members_tell:
        loop.scheduler.observe = silent
    for _ in range(40):
        loop.instant()
    assert set(loop.scheduler.slow_workers()) == ({"w0001"} if members_tell else set())


def test_a_worker_that_recovers_works_again():
    one = slow_case("hocket", until_us=2_000_000, straggler_retry_us=500_000)
    loop = Loop(one)
    was_slow = False
    while loop.instant():
        was_slow = was_slow or bool(loop.scheduler.slow_workers())
    assert was_slow and not loop.scheduler.slow_workers()
    last = [p for p in loop.result.plans if p.assignments][-20:]
    assert any("w0001" in a.workers for p in last for a in p.assignments)


def test_workers_that_share_cores_are_not_compared():
    """Which of them is slow changes with what the host's other processes do."""
    one = slow_case("edf")
    loop = Loop(one)
    for lease in one.cluster.leases(0, one.loads):
        loop.add(msgspec.structs.replace(lease, shares_cores=True))
    while loop.instant():
        assert not loop.scheduler.slow_workers()
    assert len(loop.result.ended) == len(ROWS)


def test_avoidance_is_as_deterministic_as_all_else():
    assert run(slow_case("hocket")).digests == run(slow_case("hocket")).digests
