"""Static, shortest-first, EDF and GENSERVE: one rule a test, then whole runs."""

import pytest

from bench.sim.loop import run
from control.scheduler.settings import SettingError
from control.scheduler.values import (
    DIT,
    TEXT,
    VAE,
)

from .driving import World, case, only
from .mixed import Mixed, names

RIVALS = ("rssp", "rasp", "sjf", "srtf", "edf-greedy", "edf", "genserve")


def world(policy, workers=8, **policy_settings):
    return World(workers, policy=policy, policy_settings=policy_settings)


def drain(some, limit=2_000):
    """Ends what is under way, in the order of the ends, until nothing is."""
    for _ in range(limit):
        some.plan()
        under_way = some.scheduler.outstanding()
        if not under_way:
            return
        some.over(min(under_way, key=lambda a: (a.end_us, a.sequence)))
    raise AssertionError("it does not end")


# -------------------------------------------------------------------------------- static degrees


@pytest.mark.parametrize(("px", "degree"), [(256, 1), (512, 1), (1024, 2), (2048, 8)])
def test_rssp_takes_the_published_degree_of_a_size(px, degree):
    encoded = world("rssp").encoded("a", px=px)
    assert len(only(encoded).workers) == degree
    assert only(encoded).steps == 28, "to completion"


def test_rssp_takes_the_nearest_size_and_what_the_cluster_has():
    assert len(only(world("rssp").encoded("a", px=768)).workers) == 2
    assert len(only(world("rssp", 4).encoded("a", px=2048)).workers) == 4
    assert len(only(world("rssp", degrees="256=4").encoded("a", px=1024)).workers) == 4


@pytest.mark.parametrize("degrees", ["", "256", "256=", "256=x", "256=0", "0=1", "-256=1"])
def test_rssp_refuses_a_table_that_is_none(degrees):
    with pytest.raises(SettingError, match="degrees"):
        world("rssp", degrees=degrees)


def test_rssp_by_arrival_or_by_deadline():
    for queue, first in (("fcfs", "slow"), ("edf", "urgent")):
        w = world("rssp", 1, queue=queue)
        w.arrive("slow", slo_us=9_000_000)
        w.arrive("urgent", slo_us=3_000_000)
        assert names(only(w.plan())) == [first]


def test_rasp_spreads_videos_not_pictures():
    w = Mixed("rasp", 4)
    w.ask("picture", "pic", 64)
    w.ask("video", "vid", 480)
    for encode in w.plan().assignments:
        w.over(encode)
    widths = {a.batch[0].request: len(a.workers) for a in w.plan().assignments}
    assert widths == {"picture": 1, "video": 2}


# -------------------------------------------------------------------------------- shortest first


def test_sjf_begins_with_the_shortest_and_does_not_preempt():
    w = world("sjf", 1)
    w.arrive("long", px=1024)
    w.arrive("short", px=256)
    encode = only(w.plan())
    assert names(encode) == ["short"]
    w.arrive("shorter", px=256, steps=5)
    w.over(encode)
    denoise = only(w.plan())
    assert names(denoise) == ["short"], "who has begun goes on"
    assert denoise.steps == 28
    w.over(denoise)
    assert only(w.plan()).node == VAE, "to its end"


def test_sjf_counts_the_whole_request():
    w = world("sjf", 1)
    w.arrive("few-large-steps", px=1024, steps=2)  # 0.40 s
    w.arrive("many-small-steps", px=256, steps=28)  # 0.62 s
    assert names(only(w.plan())) == ["few-large-steps"]


def test_srtf_preempts_at_a_step_boundary_and_goes_back():
    w = world("srtf", 1)
    denoise = only(w.encoded("long", px=1024))
    assert denoise.steps == 1
    w.arrive("short", px=256, steps=2)
    assert not w.plan().assignments, "not inside a step"
    w.over(denoise)
    ran = []
    for _ in range(5):
        a = only(w.plan())
        ran.append((names(a)[0], a.node))
        w.over(a)
    served = [("short", TEXT), ("short", DIT), ("short", DIT), ("short", VAE)]
    assert ran == [*served, ("long", DIT)]


@pytest.mark.parametrize("policy", ["sjf", "srtf"])
def test_the_degree_of_shortest_first_is_a_setting(policy):
    assert len(only(world(policy, degree=1).encoded("a", px=2048)).workers) == 1
    assert len(only(world(policy, degree=4).encoded("a", px=2048)).workers) == 4
    assert len(only(world(policy, degree=0).encoded("a", px=2048)).workers) == 8
    assert len(only(world(policy, degree=0).encoded("a", px=256)).workers) == 1


# -------------------------------------------------------------------------------- EDF


def two_large(policy, slo_us, **settings):
    """Widths of two equally large requests at one instant; the first one's SLO is given."""
    w = world(policy, **settings)
    w.arrive("a", px=2048, slo_us=slo_us)
    w.arrive("b", px=2048, slo_us=60_000_000)
    for encode in w.plan().assignments:
        w.over(encode)
    return {names(a)[0]: len(a.workers) for a in w.plan().assignments}


def test_best_fit_is_as_narrow_as_the_deadline_allows():
    # 28 steps of 0.999 / 0.515 / 0.266 / 0.142 s at degree 1 / 2 / 4 / 8
    assert two_large("edf", 5_000_000) == {"a": 8}
    assert two_large("edf", 8_500_000) == {"a": 4, "b": 4}, "b needs 1, the rest is left over"
    assert two_large("edf-greedy", 8_500_000) == {"a": 8}


def test_leftovers_go_to_the_most_urgent_and_only_where_they_help():
    assert two_large("edf", 30_000_000) == {"a": 4, "b": 4}
    w = world("edf")
    assert len(only(w.encoded("small", px=512, slo_us=60_000_000)).workers) == 1


def test_best_fit_counts_the_decode():
    slo_us = 30_000 + 28 * 108_500 + 60_000  # at 2 its steps would end in time, its decode not
    for reserve, degree in ((True, 4), (False, 2)):
        w = world("edf", 6, reserve_decode=reserve)
        w.arrive("a", px=1024, slo_us=slo_us)
        w.arrive("b", px=2048, slo_us=28 * 265_600 + 900_000)  # takes what is left
        for encode in w.plan().assignments:
            w.over(encode)
        widths = {names(a)[0]: len(a.workers) for a in w.plan().assignments}
        assert widths == {"a": degree, "b": 6 - degree}


def test_edf_keeps_the_hopeless_in_front_at_its_fastest():
    assert two_large("edf", 1_000_000) == {"a": 8}, "as published: it is not demoted"


def test_edf_orders_encodes_and_decodes_too():
    w = world("edf", 1)
    w.arrive("late", slo_us=9_000_000)
    w.arrive("soon", slo_us=3_000_000)
    assert names(only(w.plan())) == ["soon"]


def test_edf_preempts_at_the_end_of_what_was_committed():
    for commit_steps in (1, 4):
        w = world("edf", 1, commit_steps=commit_steps)
        denoise = only(w.encoded("a", px=512, slo_us=60_000_000))
        assert denoise.steps == commit_steps
        w.arrive("b", px=512, slo_us=3_000_000)
        w.over(denoise)
        assert names(only(w.plan())) == ["b"]


# -------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("policy", RIVALS)
def test_every_request_ends(policy):
    sizes = (256, 2048, 512, 1024)
    rows = [(i * 150_000, sizes[i % 4], (1 + i % 3) * 2_000_000) for i in range(16)]
    result = run(case(rows, policy=policy))
    assert sorted(e.request for e in result.ended) == sorted(f"r{i}" for i in range(16))
    assert sum(e.on_time for e in result.ended) >= 8
    again = run(case(rows, policy=policy))
    assert again.digests == result.digests


@pytest.mark.parametrize("policy", [*RIVALS, "genserve-rules"])
def test_every_request_of_a_mix_ends(policy):
    rules = {"pause": "slack", "resume": "rules", "paused_max": 1, "plan": "all"}
    w = Mixed("genserve", 2, **rules) if policy == "genserve-rules" else Mixed(policy, 2)
    for i in range(12):
        model, px = (("vid", 256), ("pic", 64), ("vid", 480), ("pic", 96))[i % 4]
        w.ask(f"r{i}", model, px, steps=4, slo_us=(i % 5) * 300_000 + 1)
    drain(w)
    assert len(w.ended) == 12
