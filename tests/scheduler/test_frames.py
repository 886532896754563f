"""Videos of numbers of frames that no profile row has: what they are predicted to take, and that
each length keeps to itself.
"""

import pytest

from control.scheduler.settings import Settings
from control.scheduler.times.latency import LatencyModel
from control.scheduler.times.profile import CellKey, Profile
from control.scheduler.values import DIT, Layout, Outcome, Shape

from .desk import Desk

HEAD = "model,gpu,node,width,height,frames,degree,batch,call_us\n"


def rows(frames, text_us, alone_us, pair_us, vae_us):
    calls = (("text", 1, text_us), ("dit", 1, alone_us), ("dit", 2, pair_us), ("vae", 1, vae_us))
    return "".join(f"wan,g,{node},832,480,{frames},{d},1,{us}\n" for node, d, us in calls)


ONE_LENGTH = HEAD + rows(81, 50_000, 8_000_000, 4_200_000, 6_000_000)
TWO_LENGTHS = ONE_LENGTH + rows(17, 50_000, 1_200_000, 700_000, 1_300_000)


def predicted_us(profile, node, frames, degree=1):
    shape = Shape(width=832, height=480, frames=frames)
    key = CellKey("wan", "g", node, shape, Layout(ulysses=degree), 1)
    return LatencyModel(Profile.from_csv(profile), Settings()).predict(key).mean_us


@pytest.mark.parametrize("node", ["dit", "vae"])
@pytest.mark.parametrize("frames", [17, 33, 49, 121])
def test_a_length_beyond_the_only_known_one_is_scaled_by_its_frames(node, frames):
    known_us = predicted_us(ONE_LENGTH, node, 81)
    latent_frames = (frames + 3) / 84  # of a compression by four, the first frame alone
    found = predicted_us(ONE_LENGTH, node, frames) / known_us
    assert found == pytest.approx(latent_frames, rel=0.15)


@pytest.mark.parametrize("frames", [1, 17, 49, 121])
def test_the_text_does_not_grow_with_the_video(frames):
    assert predicted_us(ONE_LENGTH, "text", frames) == 50_000


@pytest.mark.parametrize("degree", [1, 2])
def test_a_length_between_two_known_ones_lies_between_them(degree):
    short, middle, long = (predicted_us(TWO_LENGTHS, "dit", n, degree) for n in (17, 49, 81))
    assert 1.5 * short < middle < long / 1.5
    assert middle == pytest.approx((short + long) / 2, rel=0.1)


@pytest.mark.parametrize("policy", ["hocket", "diflow", "edf"])
def test_jobs_of_different_lengths_are_never_in_one_batch(policy):
    desk = Desk(policy, workers=1)
    lengths = dict(zip("abcdefgh", (9, 17, 9, 17, 9, 17, 33, 33), strict=True))
    for name, frames in lengths.items():
        desk.arrive(name, shape=Shape(width=512, height=512, frames=frames), plan=False)
    desk.plan()
    for _ in range(300):
        if len(desk.ended) == len(lengths):
            break
        desk.next()
    assert {e.outcome for e in desk.ended.values()} == {Outcome.DONE}
    together = [{lengths[m.request] for m in a.batch} for a in desk.log if len(a.batch) > 1]
    assert all(len(several) == 1 for several in together)
    assert together or policy != "diflow", "equal lengths do share one"


def test_a_longer_video_is_predicted_to_take_longer():
    """By the plan itself: the steps of both start at once, on workers alike."""
    desk = Desk("hocket", workers=2)
    for name, frames in (("short", 9), ("long", 33)):
        desk.arrive(name, steps=1, shape=Shape(width=512, height=512, frames=frames), plan=False)
    desk.plan()
    while {m.request for a in desk.log if a.node == DIT for m in a.batch} != {"short", "long"}:
        desk.next()
    took = {a.batch[0].request: a.step_time_us for a in desk.log if a.node == DIT}
    assert took["long"] > 2 * took["short"]
