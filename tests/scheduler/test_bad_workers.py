"""Who fails whatever it is given takes no request down; and a request that fails everywhere does
not take workers out.
"""

from collections import Counter

import pytest

from control.scheduler.books.quarantine import Quarantined
from control.scheduler.policies import registry
from control.scheduler.settings import SettingError, Settings
from control.scheduler.values import Outcome

from .bad_workers import Cluster
from .driving import World, only

SOME = ["hocket", "edf", "tetriserve", "sjf", "genserve"]
FAILURES_MAX = Settings().failures_max


def one_bad(worker, request, now_us):
    return worker == "w0000"


@pytest.mark.parametrize("policy", registry.names())
def test_one_bad_worker_of_eight_fails_no_request(policy):
    """At 88 percent load it would be free first, always."""
    cluster = Cluster(policy, fails=one_bad, every_us=150_000)
    cluster.run()
    assert not cluster.failed
    assert len(cluster.loop.result.ended) == 60
    assert len(cluster.workers.failures) <= 8, "most of the requests never meet it"


@pytest.mark.parametrize("lead_us", [0, 20_000])
@pytest.mark.parametrize("policy", SOME)
def test_nor_does_it_in_a_crowd(policy, lead_us):
    cluster = Cluster(policy, fails=one_bad, lead_us=lead_us)
    cluster.run()
    assert not cluster.failed


@pytest.mark.parametrize("policy", SOME)
def test_two_bad_workers_fail_no_request_either(policy):
    cluster = Cluster(policy, fails=lambda w, r, t: w in ("w0000", "w0001"), every_us=150_000)
    cluster.run()
    assert not cluster.failed


@pytest.mark.parametrize("policy", SOME)
def test_a_bad_host_costs_the_first_requests_at_most(policy):
    """Four of eight: before anybody has shown that it is well, they look like a bad request."""
    cluster = Cluster(policy, fails=lambda w, r, t: w < "w0004", every_us=260_000)
    cluster.run()
    first = {f"r{i}" for i in range(5)}
    assert cluster.failed <= first and len(cluster.failed) <= 4


@pytest.mark.parametrize("policy", SOME)
def test_a_worker_that_is_well_again_gets_work_again(policy):
    cluster = Cluster(policy, fails=lambda w, r, t: w == "w0000" and t < 3_000_000)
    cluster.run()
    assert not cluster.failed and not cluster.loop.scheduler.quarantined()
    told = [n for n in cluster.loop.scheduler.take_notices() if isinstance(n, Quarantined)]
    assert [(n.worker, bool(n.strikes)) for n in told] == [("w0000", True), ("w0000", False)]
    late = [a for p in cluster.loop.result.plans if p.now_us > 6_000_000 for a in p.assignments]
    assert any("w0000" in a.workers for a in late)


@pytest.mark.parametrize("policy", SOME)
def test_a_bad_request_ends_after_so_many_failures_on_as_many_workers(policy):
    cluster = Cluster(policy, fails=lambda w, r, t: r == "r7")
    cluster.run()
    assert cluster.failed == {"r7"}
    assert len({f.worker for f in cluster.workers.failures}) == FAILURES_MAX
    assert len(cluster.workers.failures) == FAILURES_MAX
    assert not cluster.loop.scheduler.take_notices(), "no worker is kept out for it"


@pytest.mark.parametrize("policy", SOME)
def test_many_bad_requests_keep_no_worker_out_for_long(policy):
    bad = {f"r{i}" for i in range(0, 60, 4)}
    cluster = Cluster(policy, fails=lambda w, r, t: r in bad)
    cluster.run()
    assert cluster.failed == bad
    assert max(Counter(f.request for f in cluster.workers.failures).values()) <= 8
    assert not cluster.loop.scheduler.quarantined()


@pytest.mark.parametrize("policy", SOME)
@pytest.mark.parametrize("workers", [1, 8])
def test_where_all_fail_everybody_is_told_soon(policy, workers):
    cluster = Cluster(policy, fails=lambda w, r, t: True, requests=12, workers=workers)
    cluster.run()
    assert {e.outcome for e in cluster.loop.result.ended} == {Outcome.FAILED}
    assert len(cluster.loop.result.ended) == 12
    assert max(Counter(f.request for f in cluster.workers.failures).values()) <= 12


def test_a_failed_job_goes_elsewhere_at_once_and_back_when_nobody_else_is_there():
    world = World(workers=2, policy="sjf")
    running = only(world.encoded("a"))
    first = running.workers[0]
    world.fail(running, first, "MODEL_ERROR", holds=0)
    again = only(world.plan())
    assert first not in again.workers
    world.lose(again.workers[0])
    back = only(world.plan())
    assert back.workers == (first,), "better than nowhere"


def test_the_same_request_failing_again_at_one_step_is_one_strike():
    world = World(workers=1)
    running = only(world.encoded("a"))
    for _ in range(2):
        world.fail(running, "w0", "MODEL_ERROR", holds=0)
        running = only(world.plan())
    world.up("w1")
    assert not world.scheduler.quarantined()


@pytest.mark.parametrize(
    "reason",
    [
        "GROUP_LOST",
        "MESSAGE_LOST",
        "GROUP_SPENT",
        "OUT_OF_MEMORY",
        "INPUT_MISSING",
        "INPUT_AWAY",
        "CALL_REFUSED",
    ],
)
def test_what_is_not_the_reporters_fault_strikes_nobody(reason):
    assert not struck_by(reason), reason
    assert struck_by("MODEL_ERROR") == ["w0"]


def struck_by(reason):
    """Who is kept out once four requests have failed on the first of two workers."""
    world = World(workers=2, policy="sjf")
    for name in "abcd":
        world.arrive(name)
    world.plan()
    for _ in range(4):
        first = [a for a in world.scheduler.outstanding() if a.workers == ("w0",)]
        for encode in first[:1]:
            world.fail(encode, "w0", reason)
            world.plan()
    return [n.worker for n in world.scheduler.take_notices() if isinstance(n, Quarantined)]


def test_a_group_whose_communicator_was_given_up_is_formed_anew_without_a_strike():
    world = World(workers=4)
    running = only(world.encoded("a", px=2048, slo_us=60_000_000))
    for attempt in range(2 * FAILURES_MAX):
        world.fail(running, running.workers[0], "GROUP_SPENT", holds=0)
        again = only(world.plan())
        assert again.workers == running.workers and again.epoch == running.epoch + 1
        assert again.batch[0].attempt == attempt + 1
        running = again
    assert not world.ended


def test_settings_are_checked():
    for key in ("quarantine_failures", "hung_after_factor"):
        with pytest.raises(SettingError):
            Settings(**{key: -1})
    with pytest.raises(SettingError):
        Settings(hung_min_us=0)
    with pytest.raises(SettingError):
        Settings(quarantine_retry_us=0)
