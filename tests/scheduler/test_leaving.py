"""Workers that leave: a drain is one truth that outlives its worker, parked latents go ahead."""

from collections import Counter

import pytest

from bench.sim.case import FaultSpec
from bench.sim.loop import run
from control.scheduler.books.cluster import Cluster
from control.scheduler.books.fetches import AGAIN_US, TRIES_MAX
from control.scheduler.books.ledger import FORGOTTEN_AFTER_US
from control.scheduler.resilience.evacuation import WORKER_MAX
from control.scheduler.values import (
    DrainRequested,
    GroupHeld,
    Held,
    NothingHeard,
    Outcome,
    WorkerUp,
)

from .driving import FLUX, World, case, only


def drain(world, worker, draining=True):
    world.observe(DrainRequested(at_us=world.now_us, worker=worker, draining=draining))


def views(world):
    return {w.name: w for w in world.scheduler.workers()}


def tell(world, worker, latents=(), stopping=False, **fields):
    """A heartbeat that is news."""
    fact = WorkerUp(
        at_us=world.now_us,
        worker=worker,
        incarnation=fields.pop("incarnation", "1"),
        gpu="h100",
        host="h0",
        models=(FLUX,),
        latents=tuple(Held(request=r, steps_done=n) for r, n in latents),
        stopping=stopping,
        **fields,
    )
    world.observe(fact)


def test_a_drain_outlives_the_process_the_lease_and_any_absence():
    world = World(workers=2)
    drain(world, "w0")
    world.up("w0", incarnation="2")
    assert views(world)["w0"].draining and not views(world)["w0"].usable
    world.lose("w0")
    world.up("w0", incarnation="3")
    assert not views(world)["w0"].usable and world.scheduler.draining() == ("w0",)
    drain(world, "w0", draining=False)
    assert views(world)["w0"].usable and world.scheduler.draining() == ()


def test_a_drain_may_come_before_its_worker_and_be_taken_back_after_it():
    world = World(workers=1)
    drain(world, "w7")
    world.up("w7")
    assert not views(world)["w7"].usable
    world.lose("w7")
    drain(world, "w7", draining=False)
    world.up("w7")
    assert views(world)["w7"].usable


def test_a_stopping_worker_is_as_drained_but_nobody_remembers():
    world = World(workers=2)
    tell(world, "w0", stopping=True)
    assert not views(world)["w0"].usable and world.scheduler.draining() == ()
    tell(world, "w0", incarnation="2")
    assert views(world)["w0"].usable


def test_a_forgotten_worker_is_still_drained():
    world = World(workers=2)
    drain(world, "w0")
    world.lose("w0")
    world.now_us += FORGOTTEN_AFTER_US + 1
    world.up("w9")
    assert "w0" not in views(world)
    world.up("w0", incarnation="2")
    assert not views(world)["w0"].usable


@pytest.fixture
def full():
    """w0 has the latents of requests that wait; others come up, and run what they are given."""
    world = World(workers=1)
    for i in range(6):
        world.arrive(f"r{i}", steps=20, slo_us=60_000_000)
    for _ in range(6):
        for a in world.plan().assignments:
            world.over(a) if a.node == "text" else None
    held = [v.request for v in world.scheduler.jobs() if v.holders and not v.outstanding]
    assert len(held) >= 4
    return world, held


def test_parked_latents_of_a_draining_worker_are_copied(full):
    world, _ = full
    world.up("w1", host="h0")
    world.plan()
    drain(world, "w0")
    assert world.scheduler.due(world.now_us)
    plan = world.plan()
    waiting = [v.request for v in world.scheduler.jobs() if v.holders and not v.outstanding]
    alone = set(world.scheduler.latents_alone("w0"))
    assert set(waiting) <= alone and len(waiting) > WORKER_MAX
    assert len(plan.fetches) == WORKER_MAX, "a few at a time"
    assert {(f.holder, f.worker) for f in plan.fetches} == {("w0", "w1")}
    assert world.scheduler.awaits("w1") and not world.scheduler.awaits("w0")
    assert not world.plan().fetches, "not twice"
    first = plan.fetches[0]
    tell(world, "w1", latents=[(first.request, first.steps_done)])
    assert world.scheduler.due(world.now_us), "there is room for the next"
    assert world.scheduler.safe_to_release("w0") == (first.request,)
    assert first.request not in world.scheduler.latents_alone("w0")
    (more,) = world.plan().fetches
    assert more.request not in {f.request for f in plan.fetches}


def test_so_are_those_of_a_stopping_one(full):
    world, _ = full
    world.up("w1", host="h0")
    world.plan()
    tell(world, "w0", stopping=True)
    assert world.plan().fetches


def test_a_fetch_that_nobody_tells_of_is_tried_again_and_not_for_ever(full):
    world, _ = full
    world.up("w1", host="h0")
    world.plan()
    drain(world, "w0")
    tried = Counter(f.request for f in world.plan().fetches)
    for _ in range(4 * TRIES_MAX):
        world.observe(NothingHeard(at_us=world.now_us + AGAIN_US))
        world.now_us += AGAIN_US
        tried.update(f.request for f in world.plan().fetches)
    assert max(tried.values()) == TRIES_MAX and len(tried) > WORKER_MAX


def test_a_destination_that_goes_away_leaves_control_at_rest(full):
    """What cannot be fetched by anybody is due again when a worker comes, not all the time."""
    world, _ = full
    world.up("w1", host="h0")
    world.plan()
    drain(world, "w0")
    assert world.plan().fetches
    world.lose("w1")
    world.now_us += AGAIN_US
    world.observe(NothingHeard(at_us=world.now_us))
    assert not world.plan().fetches
    wake_us = world.scheduler.wake_us()
    assert not world.scheduler.due(world.now_us) and (wake_us is None or wake_us > world.now_us)
    world.up("w2", host="h0")
    assert world.scheduler.due(world.now_us)
    assert {f.worker for f in world.plan().fetches} == {"w2"}


def test_an_older_copy_is_not_the_one_that_was_to_come(full):
    world, _ = full
    world.up("w1", host="h0")
    world.plan()
    drain(world, "w0")
    tracked = world.scheduler._ledger.tracked
    waiting = [v.request for v in world.scheduler.jobs() if v.holders and not v.outstanding]
    for request in waiting:  # it ran on since w1 got its copy
        tracked[request].steps_done = 3
        tracked[request].holders = {"w0": 3, "w1": 1}
    sent = Counter(f.request for f in world.plan().fetches)
    for _ in range(8):
        world.now_us += AGAIN_US // 10
        tell(world, "w1", latents=[(request, 1) for request in waiting])
        sent.update(f.request for f in world.plan().fetches)
    assert sent and max(sent.values()) == 1, "each is still under way"


def test_a_stopping_worker_is_not_to_drop_what_it_works_on():
    world, group = grouped()
    running = only(world.plan())
    assert running.workers == group and not world.plan().assignments
    tell(world, group[0], stopping=True, latents=[("a", world.view("a").steps_done)])
    assert world.view("a").outstanding
    assert world.scheduler.safe_to_release(group[0]) == ()


def test_nobody_fetches_where_nobody_stays(full):
    world, held = full
    drain(world, "w0")
    assert not world.plan().fetches
    assert set(world.scheduler.latents_alone("w0")) >= set(held)


def test_a_copy_that_is_there_saves_the_steps_when_the_worker_goes(full):
    world, _ = full
    world.up("w1", host="h0")
    world.plan()
    drain(world, "w0")
    fetch = world.plan().fetches[0]
    tell(world, "w1", latents=[(fetch.request, fetch.steps_done)])
    world.lose("w0")
    view = world.view(fetch.request)
    assert view.nodes["text"] == "done" and view.steps_done == fetch.steps_done


@pytest.mark.parametrize("policy", ["hocket", "edf", "tetriserve", "fixed-1"])
def test_drained_workers_can_be_stopped_without_losing_a_step(policy):
    """Half of the cluster is drained in a crowd; once its latents have copies it goes."""
    rows = [(i * 30_000, (512, 1024)[i % 2], 60_000_000) for i in range(24)]
    drains = [FaultSpec(at_us=1_500_000, kind="drain", worker=f"w{i:04}") for i in range(4)]
    lost = [FaultSpec(at_us=4_500_000, kind="lost", worker=f"w{i:04}") for i in range(4)]
    result = run(case(rows, workers=8, faults=(*drains, *lost), policy=policy))
    assert [e.outcome for e in result.ended] == [Outcome.DONE] * 24
    assert sum(e.steps_lost for e in result.ended) == 0
    begun = [a for p in result.plans for a in p.assignments if a.node == "text"]
    assert len(begun) == 24, "no encode is made again"


# -------------------------------------------------------------------------------- groups


def grouped():
    world = World(workers=4)
    running = only(world.encoded("a", px=2048, slo_us=60_000_000))
    world.over(running)
    return world, running.workers


def test_a_group_that_a_member_gave_up_is_not_warm_and_is_formed_anew():
    world, group = grouped()
    cluster = world.scheduler._ledger.cluster
    assert cluster.warm(group)
    tell(world, group[0], given_up=(GroupHeld(epoch=1, members=group),))
    assert not cluster.warm(group)
    again = only(world.plan())
    assert (again.workers, again.epoch) == (group, 2)
    assert cluster.warm(group), "it is being formed"


def test_a_group_at_work_is_left_to_its_failure():
    world, group = grouped()
    running = only(world.plan())
    assert running.workers == group
    tell(world, group[0], given_up=(GroupHeld(epoch=1, members=group),))
    assert world.scheduler._ledger.cluster.epoch(group) == 1


def test_an_old_epoch_that_is_given_up_says_nothing():
    cluster = Cluster(3)
    assert cluster.epoch(("a", "b")) == 3
    cluster.give_up([GroupHeld(epoch=2, members=("a", "b"))], ())
    cluster.give_up([GroupHeld(epoch=2, members=("a", "c"))], ())
    assert cluster.epoch(("a", "b")) == 3 and cluster.warm(("a", "b"))


def test_a_missing_latent_in_a_group_leaves_it_standing_and_strikes_the_holders():
    world, group = grouped()
    running = only(world.plan())
    world.fail(running, group[0], "LATENT_MISSING")
    again = [a for a in world.plan().assignments if a.workers == group]
    assert world.scheduler._ledger.cluster.epoch(group) == 1 or again
    assert not [h for h in world.view("a").holders if h.worker in group]


# -------------------------------------------------------------------------------- bounds


def test_names_of_pods_that_are_gone_are_forgotten():
    """A thousand workers that live for a minute each, as a platform names them."""
    world = World(workers=2, policy="hocket")
    ledger = world.scheduler._ledger
    for i in range(1_000):
        world.now_us += 60_000_000
        world.up(f"pod-{i}", incarnation=str(i))
        world.plan()
        world.lose(f"pod-{i}")
    kept = FORGOTTEN_AFTER_US // 60_000_000 + 4
    assert len(ledger.cluster.workers) <= kept
    for known in (ledger.residency._incarnation, ledger.residency._held, ledger.board._of_worker):
        assert len(known) <= kept
    assert len(world.scheduler._planner._preloaded) <= kept
