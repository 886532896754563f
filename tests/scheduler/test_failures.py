"""What a failure costs: the steps since the last surviving latent, and never a request."""

import pytest

from control.scheduler.values import (
    CancelRequested,
    DrainRequested,
    JobProgress,
    Outcome,
    StepsEnded,
    WorkerLost,
)

from .driving import World, only


def lose(world, worker):
    world.observe(WorkerLost(at_us=world.now_us, worker=worker))


def wide(steps_reported=2):
    """A world where request a runs on all of four workers."""
    world = World(workers=4)
    running = only(world.encoded("a", px=2048, slo_us=60_000_000))
    assert len(running.workers) == 4 and running.steps > steps_reported
    for done in range(1, steps_reported + 1):
        world.now_us += running.step_time_us
        world.step(running, done)
    return world, running


def test_a_lost_member_costs_the_step_under_way_only():
    world, running = wide()
    lose(world, "w1")
    plan = world.plan()
    (truncation,) = plan.truncations
    assert (truncation.request, truncation.attempt, truncation.stop_at_step) == ("a", 0, 0)
    assert truncation.workers == running.workers and not truncation.release
    again = only(plan)
    member = again.batch[0]
    assert (member.attempt, member.first_step) == (1, 2)
    assert "w1" not in again.workers
    assert {h.worker for h in member.holders} == {"w0", "w2", "w3"}
    assert world.view("a").steps_lost == 0


def test_former_holders_are_checkpoints():
    world = World(workers=2, policy_settings={"scale_up": False})
    first = only(world.encoded("a", slo_us=60_000_000))
    world.over(first)
    lose(world, first.workers[0])
    view = world.view("a")
    assert view.steps_done == 0 and view.state == "queued", "nobody else had a copy: encode again"
    assert view.steps_lost == first.steps
    encode = only(world.plan())
    assert encode.node == "text" and encode.batch[0].attempt == 1, "it runs steps again"

    world, running = wide(2)
    world.over(running)
    second = only(world.plan())
    assert world.view("a").steps_done == running.steps
    for worker in second.workers[:3]:
        lose(world, worker)
    view = world.view("a")
    assert view.steps_done == running.steps and view.steps_lost == 0
    assert [h.worker for h in view.holders] == [second.workers[3]]


def test_a_fall_back_to_an_older_copy_counts_the_steps_between():
    world = World(workers=3, policy_settings={"scale_up": False})
    first = only(world.encoded("a", slo_us=60_000_000))
    world.over(first)
    old = first.workers[0]
    world.observe(DrainRequested(at_us=world.now_us, worker=old))
    second = only(world.plan())
    world.over(second)
    lose(world, second.workers[0])
    view = world.view("a")
    assert (view.steps_done, view.steps_lost) == (first.steps, second.steps)
    third = only(world.plan())
    assert third.batch[0].first_step == first.steps
    assert [h.worker for h in third.batch[0].holders] == [old], "draining workers still hand out"


def test_the_first_report_counts_and_duplicates_are_harmless():
    world, running = wide()
    world.fail(running, "w0", "PEER_LOST", holds=2, suspects=("w3",))
    assert world.view("a").attempt == 1
    plan = world.plan()
    again = only(plan)
    world.fail(running, "w1", "PEER_LOST", holds=2, suspects=("w3",))
    world.fail(running, "w1", "PEER_LOST", holds=2, suspects=("w3",))
    assert world.view("a").attempt == 1 and world.view("a").outstanding == (again.sequence,)
    assert not world.plan().truncations
    assert "w3" not in again.workers and again.epoch == 1
    states = {w.name: w.state for w in world.scheduler.workers()}
    assert states["w3"] == "suspect"


def test_groups_with_a_suspect_are_formed_anew_once_it_is_back():
    world, running = wide()
    world.fail(running, "w0", "PEER_LOST", holds=2, suspects=("w3",))
    second = only(world.plan())
    world.up("w3")
    world.over(second)
    third = only(world.plan())
    assert third.workers == running.workers and third.epoch == running.epoch + 1


def test_late_reports_may_still_help():
    world, running = wide()
    for worker in ("w0", "w1", "w2"):
        lose(world, worker)
    world.observe(WorkerLost(at_us=world.now_us, worker="w0"))
    world.fail(running, "w3", "PEER_LOST", holds=2)
    assert world.view("a").steps_done == 2 and world.view("a").attempt == 1
    progress = JobProgress(request="a", attempt=0, steps_done=3)
    world.observe(
        StepsEnded(
            at_us=world.now_us,
            sequence=running.sequence,
            jobs=(progress,),
            step_time_us=(1,),
            last=True,
        )
    )
    assert world.view("a").steps_done == 3, "its last step ended after all"
    world.observe(
        StepsEnded(at_us=world.now_us, sequence=999, jobs=(progress,), step_time_us=(1,), last=True)
    )


def test_a_restarted_worker_holds_nothing():
    world = World(workers=1)
    running = only(world.encoded("a"))
    world.now_us += running.step_time_us
    world.step(running, 1)
    world.up("w0", incarnation="2")
    view = world.view("a")
    assert view.attempt == 1 and not view.holders and view.steps_lost == 1
    plan = world.plan()
    assert only(plan).node == "text" and plan.truncations[0].attempt == 0
    world.up("w0", incarnation="2")
    assert world.view("a").attempt == 1, "a heartbeat is no restart"


def test_losing_the_encoder_before_the_first_step():
    world = World(workers=2)
    world.arrive("a")
    encode = only(world.plan())
    lose(world, encode.workers[0])
    again = only(world.plan())
    assert again.node == "text" and again.workers != encode.workers
    assert again.batch[0].attempt == 1


def test_losing_all_latents_before_the_decode_starts_over():
    world = World(workers=2, policy_settings={"scale_up": False})
    world.encoded("a", steps=2)
    (first,) = world.scheduler.outstanding()
    world.over(first)
    decode = only(world.plan())
    assert decode.node == "vae" and decode.batch[0].first_step == 2
    lose(world, decode.workers[0])
    view = world.view("a")
    assert view.nodes == {"text": "ready", "dit": "blocked", "vae": "blocked"}
    assert view.steps_lost == 2


def test_a_model_error_fails_the_request_after_three_attempts():
    world = World(workers=1)
    running = only(world.encoded("a"))
    for attempt in range(3):
        assert running.batch[0].attempt == attempt
        world.fail(running, "w0", "MODEL_ERROR", holds=0)
        if attempt < 2:
            running = only(world.plan())
    (ended,) = world.ended
    assert ended.outcome is Outcome.FAILED and ended.reason == "MODEL_ERROR"
    assert [t.release for t in world.plan().truncations] == [True]


def test_a_missing_latent_is_not_asked_for_again():
    world = World(workers=2, policy_settings={"scale_up": False})
    first = only(world.encoded("a", slo_us=60_000_000))
    world.over(first)
    world.observe(DrainRequested(at_us=world.now_us, worker=first.workers[0]))
    moved = only(world.plan())
    world.fail(moved, moved.workers[0], "LATENT_MISSING")
    assert world.view("a").nodes["text"] == "ready"


def test_one_lost_worker_leaves_other_requests_alone():
    world = World(workers=2, policy_settings={"scale_up": False})
    a = only(world.encoded("a", slo_us=60_000_000))
    b = only(world.encoded("b", slo_us=60_000_000))
    assert a.workers != b.workers
    lose(world, a.workers[0])
    assert world.view("b").attempt == 0 and world.view("b").outstanding == (b.sequence,)


@pytest.mark.parametrize("steps_seen", [0, 1])
def test_a_group_cancelled_before_its_first_step_is_formed_anew(steps_seen):
    world, running = wide(steps_seen)
    world.observe(CancelRequested(at_us=world.now_us, request="a"))
    world.plan()
    world.now_us += 10_000_000
    again = only(world.encoded("b", px=2048, slo_us=60_000_000))
    assert again.workers == running.workers
    assert again.epoch == running.epoch + (0 if steps_seen else 1)


def test_a_restart_of_a_group_raises_its_epoch_once():
    world, running = wide(0)
    world.fail(running, "w0", "GROUP_LOST", holds=0)
    again = only(world.plan())
    assert again.workers == running.workers and again.epoch == running.epoch + 1


def fail_always(reason, suspects):
    """A request whose every denoise assignment fails; how often until it ends."""
    world = World(workers=1)
    running = only(world.encoded("a"))
    for count in range(1, 100):
        world.fail(running, "w0", reason, holds=0, suspects=suspects)
        if world.ended:
            (ended,) = world.ended
            assert (ended.outcome, ended.reason) == (Outcome.FAILED, reason)
            return count
        world.up("w0")
        running = only(world.plan())
        if running.node == "text":
            world.over(running)
            running = only(world.plan())
    return None


def test_failures_that_are_always_blamed_on_a_worker_end_the_request():
    assert fail_always("PEER_LOST", ("w0",)) == 12


def test_messages_lost_again_and_again_end_the_request():
    assert fail_always("MESSAGE_LOST", ()) == 20
    assert fail_always("INPUT_AWAY", ()) == 20


def test_what_would_fail_everywhere_ends_the_request_at_once():
    for reason in ("INPUT_MISSING", "CALL_REFUSED"):
        assert fail_always(reason, ()) == 1


def test_messages_lost_count_only_in_a_row():
    world = World(workers=1)
    running = only(world.encoded("a"))
    for count in range(1, 30):
        world.fail(running, "w0", "GROUP_LOST" if count == 15 else "MESSAGE_LOST", holds=0)
        running = only(world.plan())
    assert not world.ended
