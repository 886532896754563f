"""Who holds a latent: nobody who never had it, and everybody who says so when its lease begins."""

import pytest

from .driving import World, only


def narrow(workers=2):
    """A world where request a runs on one worker."""
    world = World(workers=workers, policy_settings={"scale_up": False})
    return world, only(world.encoded("a", slo_us=60_000_000))


def test_a_latent_that_never_went_out_is_encoded_again():
    world = World(workers=4)
    running = only(world.encoded("a", px=2048, slo_us=60_000_000))
    (source,) = running.batch[0].holders
    assert len(running.workers) == 4
    world.lose(source.worker)
    survivor = next(w for w in running.workers if w != source.worker)
    world.fail(running, survivor, "GROUP_LOST")
    again = only(world.plan())
    assert again.node == "text" and not world.ended
    world.fail(running, survivor, "GROUP_LOST")
    assert world.view("a").outstanding == (again.sequence,) and not world.view("a").holders


def test_a_reporter_without_the_latent_is_no_holder_itself():
    world, running = narrow(workers=1)
    world.fail(running, "w0", "LATENT_MISSING")
    again = only(world.plan())
    assert again.node == "text" and again.batch[0].attempt == 1


def test_a_reporter_that_says_it_holds_a_latent_keeps_it():
    world, running = narrow(workers=1)
    world.fail(running, "w0", "LATENT_MISSING", holds=0)
    again = only(world.plan())
    assert again.node == "dit" and [h.worker for h in again.batch[0].holders] == ["w0"]


def test_latents_that_are_asked_for_in_vain_are_no_fault_of_their_job():
    world, running = narrow(workers=1)
    for _ in range(2 * world.settings.failures_max):
        world.fail(running, "w0", "LATENT_MISSING", holds=0)
        running = only(world.plan())
    assert not world.ended


def test_a_lease_that_is_back_brings_its_latents():
    world, running = narrow(workers=1)
    world.over(running)
    done = running.steps
    world.lose("w0")
    assert world.view("a").nodes["text"] == "ready"
    world.up("w0", latents={"a": done})
    again = only(world.plan())
    assert (again.node, again.batch[0].first_step) == ("dit", done)
    assert [(h.worker, h.steps_done) for h in again.batch[0].holders] == [("w0", done)]


def test_an_encode_under_way_gives_way_to_a_latent():
    world, running = narrow()
    world.over(running)
    worker, done = running.workers[0], running.steps
    world.lose(worker)
    encode = only(world.plan())
    assert encode.node == "text"
    attempt = world.view("a").attempt
    world.up(worker, latents={"a": done})
    plan = world.plan()
    (truncation,) = plan.truncations
    assert truncation.attempt == attempt and truncation.workers == encode.workers
    again = only(plan)
    assert (again.batch[0].first_step, again.batch[0].attempt) == (done, attempt + 1)
    assert world.view("a").nodes["text"] == "done"


@pytest.mark.parametrize("planned", [False, True])
def test_a_new_leader_goes_on_from_what_workers_hold(planned):
    world = World(workers=1)
    world.arrive("a", slo_us=60_000_000)
    if planned:
        assert only(world.plan()).node == "text"
    world.up("w7", latents={"a": 7, "unknown": 3})
    again = only(world.plan())
    assert (again.node, again.batch[0].first_step) == ("dit", 7)
    assert [(h.worker, h.steps_done) for h in again.batch[0].holders] == [("w7", 7)]


def test_latents_told_before_their_request_is_known_count_when_it_arrives():
    world = World(workers=0)
    world.up("w0", latents={"a": 7})
    world.arrive("a", slo_us=60_000_000)
    assert only(world.plan()).batch[0].first_step == 7
    world.up("w1", latents={"b": 7})
    world.lose("w1")
    world.arrive("b")
    assert world.view("b").state == "queued"


def test_a_finished_latent_goes_to_the_decode():
    world = World(workers=1)
    world.arrive("a", steps=9)
    world.up("w1", latents={"a": 9})
    decode = only(world.plan())
    assert decode.node == "vae" and decode.batch[0].first_step == 9


@pytest.mark.parametrize("steps", [-1, 29])
def test_steps_that_no_request_has_are_no_latent(steps):
    world = World(workers=1)
    world.arrive("a", steps=28)
    world.up("w1", latents={"a": steps})
    assert world.view("a").state == "queued" and not world.view("a").holders


def test_a_heartbeat_disturbs_no_work_that_runs_normally():
    world, running = narrow()
    world.now_us += running.step_time_us
    world.step(running, 1)
    other = next(w for w in ("w0", "w1") if w not in running.workers)
    for worker, done in ((running.workers[0], 2), (running.workers[0], 0), (other, running.steps)):
        world.up(worker, latents={"a": done})
        view = world.view("a")
        assert (view.attempt, view.outstanding) == (0, (running.sequence,))
    holders = {h.worker: h.steps_done for h in world.view("a").holders}
    assert holders == {running.workers[0]: 2, other: running.steps}


def test_a_heartbeat_of_the_encoder_is_not_ahead_of_its_report():
    world = World(workers=1)
    world.arrive("a")
    encode = only(world.plan())
    world.up("w0", latents={"a": 0})
    assert world.view("a").outstanding == (encode.sequence,)


def test_a_heartbeat_with_a_latent_beyond_all_that_is_under_way_counts_once():
    world, running = narrow()
    other = next(w for w in ("w0", "w1") if w not in running.workers)
    world.up(other, latents={"a": running.steps + 1})
    again = only(world.plan())
    assert again.batch[0].first_step == running.steps + 1
    world.up(other, latents={"a": running.steps + 1})
    assert world.view("a").outstanding == (again.sequence,)


def test_a_lease_that_begins_with_a_better_latent_stops_the_work_under_way():
    world, running = narrow()
    other = next(w for w in ("w0", "w1") if w not in running.workers)
    world.lose(other)
    assert running.steps > 2
    world.up(other, latents={"a": 2})
    view = world.view("a")
    assert (view.steps_done, view.attempt, view.outstanding) == (2, 1, ())
