"""GENSERVE: candidates, knapsack, batches, pauses; one rule a test."""

import itertools

import pytest

from control.scheduler.policies.genserve_videos import (
    Option,
    Pool,
    Video,
    options,
    picked,
    select,
)
from control.scheduler.values import TEXT, VAE, Request, Shape

from .driving import only
from .mixed import Mixed, names


def video(name="v", own=0, leader=0, deadline_us=1_000_000, steps=10, ready=True):
    request = Request(id=name, model="vid", shape=Shape(width=480, height=480, frames=9), steps=10)
    step_us = {1: 100_000, 2: 50_000, 4: 26_000}
    return Video(request, ready, 0, deadline_us, steps, step_us, 0xFF, own, leader)


def test_candidates_of_a_video():
    kinds = {o.kind: o for o in options(video(own=0b11, leader=0b10), True, True, False)}
    assert set(kinds) == {"continue", "up", "down", "hold"}
    assert kinds["hold"].value == (0, 0.0) and kinds["hold"].width == 0
    assert kinds["continue"].value == (1, 1 / 1.5), "half a second lax"
    assert (kinds["up"].width, kinds["up"].fixed) == (4, 0b11)
    assert (kinds["down"].width, kinds["down"].fixed) == (1, 0b10), "the leader keeps the state"
    bound = options(video(own=0b11, leader=0b10), False, True, False)
    assert "hold" not in {o.kind for o in bound}
    paused = options(video(leader=0b10), True, True, False)
    assert [(o.kind, o.width) for o in paused] == [
        ("hold", 0),
        ("resume", 1),
        ("resume", 2),
        ("resume", 4),
    ]
    assert [o.kind for o in options(video(leader=2), True, False, False)] == ["hold"]


def test_a_hold_is_worth_something_only_by_the_credit():
    credited = options(video(deadline_us=2_000_000), True, True, True)[0]
    assert credited.value == (1, 0.0)
    assert options(video(deadline_us=270_000), True, True, True)[0].value == (0, 0.0)


def test_the_knapsack_finds_the_best_of_disjoint_sets():
    videos = [video("a", own=0b0001, leader=1), video("b", own=0b0110, leader=2), video("c")]
    some = [
        [Option("continue", 1, 0b0001, (1, 0.2)), Option("hold", 0, 0, (0, 0.0))],
        [Option("continue", 2, 0b0110, (0, 0.9)), Option("hold", 0, 0, (0, 0.0))],
        [Option("hold", 0, 0, (0, 0.0)), Option("resume", 2, 0, (1, 0.1))],
    ]
    dp = select(videos, some, Pool((8, 1, 2, 4)), 4)
    best = max((s for s in dp if s is not None), key=lambda s: s.value)
    by_hand = max(
        (sum(o.value[0] for o in mix), sum(o.value[1] for o in mix))
        for mix in itertools.product(*some)
        if sum(o.width for o in mix) <= 4
    )
    assert by_hand == (2, pytest.approx(0.3))
    assert best.value == by_hand
    chosen = picked(best)
    assert [chosen[i][0].kind for i in range(3)] == ["continue", "hold", "resume"]
    masks = [mask for _, mask in chosen.values()]
    assert sum(masks) == best.used and masks[0] & masks[2] == 0


def test_pictures_of_one_resolution_share_a_batch():
    w = Mixed(workers=1)
    for name, px in (("a", 64), ("b", 96), ("c", 64), ("d", 64)):
        w.ask(name, "pic", px, slo_us=900_000)
    encode = only(w.plan())
    assert names(encode) == ["a", "c", "d"] and encode.node == TEXT
    w.over(encode)
    denoise = only(w.plan())
    assert names(denoise) == ["a", "c", "d"] and denoise.steps == 10, "the batch stays together"


def test_a_batch_grows_only_while_all_its_members_are_on_time():
    # 10 steps: 102 ms alone, 114 ms as two, 126 ms as three
    w = Mixed(workers=1)
    w.ask("urgent", "pic", 64, slo_us=115_000)
    for name in ("b", "c"):
        w.ask(name, "pic", 64, slo_us=900_000)
    assert names(only(w.plan())) == ["urgent", "b"]


def test_a_batch_is_bounded():
    for batch_max, size in ((0, 4), (2, 2)):
        w = Mixed(workers=1, batch_max=batch_max)
        for i in range(6):
            w.ask(f"p{i}", "pic", 64, slo_us=900_000)
        assert len(names(only(w.plan()))) == size


def test_a_picture_waits_for_company_while_slack_permits():
    w = Mixed(workers=1, batch_wait_us=50_000)
    w.ask("a", "pic", 64, slo_us=900_000)
    assert not w.plan().assignments
    assert w.scheduler.wake_us() == 50_000
    w.now_us = 50_000
    assert names(only(w.plan())) == ["a"]


def test_a_late_picture_runs_when_nobody_on_time_wants_the_worker():
    w = Mixed(workers=1)
    w.ask("late", "pic", 64, slo_us=1_000)
    w.ask("timely", "pic", 64, slo_us=900_000)
    assert names(only(w.plan())) == ["timely"]


def begun_video(**policy_settings):
    """One worker, one lax video at its first step boundary."""
    w = Mixed(workers=1, **policy_settings)
    w.ask("video", "vid", 480, slo_us=9_000_000)
    w.over(only(w.plan()))
    step = only(w.plan())
    assert (names(step), step.steps) == (["video"], 1)
    return w, step


def test_a_picture_pauses_a_video_at_its_step_boundary_which_then_resumes():
    for pause in ("any", "slack"):
        w, step = begun_video(pause=pause)
        w.ask("picture", "pic", 64, slo_us=400_000)
        assert not w.plan().assignments
        w.over(step)
        encode = only(w.plan())
        assert names(encode) == ["picture"]
        for _ in range(3):
            w.over(w.scheduler.outstanding()[0])
            resumed = only(w.plan())
        assert names(resumed) == ["video"] and resumed.reason == "resume"


def test_a_video_without_slack_is_not_paused_by_the_rules():
    for pause, first in (("any", "picture"), ("slack", "video")):
        w = Mixed(workers=1, pause=pause)
        w.ask("video", "vid", 480, slo_us=900_000)
        w.over(only(w.plan()))
        step = only(w.plan())
        w.ask("picture", "pic", 64, slo_us=400_000)
        w.over(step)
        assert names(only(w.plan())) == [first]


def test_one_paused_video_on_a_worker_by_the_rules():
    for paused_max, first in ((0, "picture-1"), (1, "second")):
        w, step = begun_video(paused_max=paused_max)
        w.ask("second", "vid", 256, slo_us=700_000)
        w.over(step)
        w.over(only(w.plan()))  # its encode
        step = only(w.plan())
        assert names(step) == ["second"], "the first one is paused"
        w.ask("picture-1", "pic", 64, slo_us=150_000)
        w.over(step)
        assert names(only(w.plan())) == [first]


def test_a_paused_video_comes_back_by_the_rules():
    w, step = begun_video(resume="rules", resume_idle_us=500_000)
    w.ask("picture", "pic", 64, slo_us=400_000)
    asked_us = w.now_us
    w.over(step)
    w.plan()
    for _ in range(3):
        w.over(w.scheduler.outstanding()[0])
        plan = w.plan()
    assert not plan.assignments
    assert w.scheduler.wake_us() == asked_us + 500_000
    w.now_us = asked_us + 500_000
    assert names(only(w.plan())) == ["video"]


def test_idle_workers_widen_a_video_and_pictures_narrow_it():
    w = Mixed(workers=4)
    w.ask("video", "vid", 480, slo_us=9_000_000)
    w.over(only(w.plan()))
    step = only(w.plan())
    assert len(step.workers) == 4
    for px in (64, 96):
        w.ask(f"p{px}", "pic", px, slo_us=400_000)
    w.over(step)
    widths = {names(a)[0]: len(a.workers) for a in w.plan().assignments}
    assert widths == {"p64": 1, "p96": 1, "video": 2}
    assert len(only(_video_alone(scale_up=False)).workers) == 1, "the score itself prefers narrow"


def _video_alone(**policy_settings):
    w = Mixed(workers=4, **policy_settings)
    w.ask("video", "vid", 480, slo_us=9_000_000)
    w.over(only(w.plan()))
    return w.plan()


def test_the_decode_takes_one_worker():
    w = Mixed(workers=4)
    w.ask("video", "vid", 480, steps=1, slo_us=9_000_000)
    w.over(only(w.plan()))
    w.over(only(w.plan()))
    decode = only(w.plan())
    assert (decode.node, len(decode.workers)) == (VAE, 1)
