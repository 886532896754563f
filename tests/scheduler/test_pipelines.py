"""Whole pipelines on single workers: the three Diffusers and the monolith."""

from __future__ import annotations

import pytest

from control.scheduler.settings import SettingError
from control.scheduler.values import DIT, TEXT, VAE, Outcome, WorkerLost

from .desk import BASE, CANNY, MS, OTHER, Desk, per_request


def test_a_pipeline_keeps_its_worker():
    desk = Desk("monolith")
    desk.arrive("a")
    desk.now_us = 5 * MS
    desk.arrive("b", steps=1)
    desk.arrive("c")
    desk.run()
    for name, place in (("a", "w0"), ("b", "w1"), ("c", "w1")):
        assert desk.places(name) == [(n, (place,)) for n in (TEXT, DIT, VAE)]
    assert all(len(a.batch) == 1 for a in desk.log)


def test_a_pipeline_goes_on_elsewhere_when_its_worker_is_lost():
    desk = Desk("monolith")
    desk.arrive("a")
    desk.scheduler.observe(WorkerLost(at_us=0, worker="w0"))
    desk.flights.clear()
    desk.plan()
    desk.run()
    assert desk.places("a")[1:] == [(n, ("w1",)) for n in (TEXT, DIT, VAE)]


def test_workers_are_dealt_out_and_stay_with_their_model():
    desk = Desk("diffusers", workers=5, memory=100)
    for i, model in enumerate((BASE, OTHER, BASE, BASE, CANNY)):
        desk.arrive(f"r{i}", model=model)
    desk.run()
    first = {r: desk.places(r)[0][1][0] for r in ("r0", "r1", "r2", "r4")}
    assert first == {"r0": "w0", "r1": "w2", "r2": "w3", "r4": "w1"}
    assert desk.places("r3")[0][1][0] in ("w0", "w3"), "waits, though w4 is idle"
    assert sum(x.load_us for x in desk.loads) == 0


def test_a_partition_can_be_given():
    desk = Desk("diffusers", workers=3, partition="base=2;other=0,1")
    desk.arrive("a")
    desk.arrive("b", model=OTHER)
    assert [desk.places(r)[0][1] for r in "ab"] == [("w2",), ("w0",)]
    with pytest.raises(SettingError):
        Desk("diffusers", partition="base=first")


def test_who_waited_beyond_the_deadline_is_dropped():
    desk = Desk("diffusers-c", workers=1)
    desk.arrive("a", slo_us=1)
    desk.arrive("b", slo_us=259 * MS)
    desk.run()
    assert desk.ended["a"].outcome is Outcome.DONE, "it had begun"
    assert desk.ended["b"].outcome is Outcome.REJECTED
    patient = Desk("diffusers-c", workers=1, drop=False)
    patient.arrive("a")
    patient.arrive("b", slo_us=1)
    patient.run()
    assert patient.ended["b"].outcome is Outcome.DONE


def test_the_queue_turns_while_it_waits():
    def second(requeue, gap_us):
        desk = Desk("diffusers-c", workers=1, requeue=requeue)
        for name in "abcd":
            desk.arrive(name)
        desk.now_us = gap_us
        desk.plan()  # a poll in between
        desk.run()
        return desk.log[3].batch[0].request

    assert second("fifo", 10) == "b"
    # one place every 10 us, until the worker is idle after 260 ms: 26,000 turns of three
    assert second("tail", 0) == "bcd"[26_000 % 3]


@pytest.mark.parametrize("memory", [100, 200])  # one pipeline fits, two do
def test_whole_pipelines_are_swapped(memory):
    desk = Desk("diffusers-c", workers=1, memory=memory, residency_aware=False)
    for name, model in (("a", BASE), ("b", CANNY), ("c", CANNY), ("d", OTHER)):
        desk.arrive(name, model=model)
        desk.run()
    loads = [sum(x.load_us for x in desk.loads if x.sequence in mine) for mine in per_request(desk)]
    assert loads == [6_100, 6_400, 0, 9_200], "shared weights are not shared by whole pipelines"


@pytest.mark.parametrize(("aware", "place"), [(True, "w1"), (False, "w0")])
def test_residency_is_looked_at_or_not(aware, place):
    desk = Desk("diffusers-c", memory=100, residency_aware=aware)
    desk.arrive("a", model=BASE)
    desk.arrive("b", model=OTHER)
    desk.run()
    desk.arrive("c", model=OTHER)
    assert desk.places("c")[0][1] == (place,)


def test_swapping_out_takes_its_time():
    desk = Desk("diffusers-c", workers=1, memory=100, swap_out_us=500 * MS)
    desk.arrive("a")
    desk.run()
    began_us = desk.now_us
    assert desk.arrive("b", model=OTHER) == [] and desk.arrive("c", model=OTHER) == []
    desk.run()
    assert desk.log[3].start_us == began_us + 500 * MS
    assert desk.log[6].start_us == desk.log[5].end_us, "the next one finds its weights"


def test_shepherd_follows_the_load():
    desk = Desk("diffusers-s", workers=4, models=(BASE, OTHER), replan_us=1_000 * MS)
    for i in range(8):
        desk.arrive(f"r{i}", steps=20)
    desk.run()
    used = [desk.places(f"r{i}")[0][1][0] for i in range(8)]
    assert used[:2] == ["w0", "w2"] and set(used) == {"w0", "w2", "w3"}
    desk.arrive("x", model=OTHER)
    assert desk.places("x")[0][1] == ("w1",), "each pipeline keeps one"
    frozen = Desk("diffusers-s", workers=4, models=(BASE, OTHER), replan_us=0)
    for i in range(8):
        frozen.arrive(f"r{i}", steps=20)
    frozen.run()
    assert {frozen.places(f"r{i}")[0][1][0] for i in range(8)} == {"w0", "w2"}


@pytest.mark.parametrize(
    ("variant", "loads_us"),
    [("resident", [0, 0]), ("offload", [6_100, 6_100]), ("reload", [6_100, 6_100])],
)
def test_what_a_monolith_loads(variant, loads_us):
    desk = Desk("monolith", workers=1, memory=200, variant=variant)
    desk.arrive("a")
    desk.arrive("b")
    desk.run()
    loads = [sum(x.load_us for x in desk.loads if x.sequence in mine) for mine in per_request(desk)]
    assert loads == loads_us


def test_a_restart_comes_before_every_request():
    desk = Desk("monolith", workers=1, variant="reload", restart_us=700 * MS)
    desk.arrive("a")
    desk.arrive("b")
    desk.run()
    assert [a.start_us // MS for a in desk.log if a.node == TEXT] == [700, 700 + 260 + 700]
