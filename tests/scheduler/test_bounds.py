"""What grows with the load stays bounded: plans, what is sent ahead, and what is remembered."""

from control.scheduler.books import cluster as cluster_module
from control.scheduler.books import ledger as ledger_module
from control.scheduler.books.board import Board
from control.scheduler.books.cluster import Cluster
from control.scheduler.values import WorkerUp

from .driving import World


def counted_forecasts(monkeypatch):
    calls = []
    real = Board.forecast

    def forecast(self, cluster, now_us):
        calls.append(now_us)
        return real(self, cluster, now_us)

    monkeypatch.setattr(Board, "forecast", forecast)
    return calls


def test_a_plan_looks_ahead_once_however_many_wait(monkeypatch):
    world = World(workers=8)
    for i in range(100):
        world.arrive(f"r{i}")
    calls = counted_forecasts(monkeypatch)
    plan = world.plan()
    assert len(plan.assignments) > 8 and len(calls) == 1


def test_stages_follow_each_other_on_the_board_as_predicted():
    world = World(workers=2)
    for i in range(6):
        world.arrive(f"r{i}")
    plan = world.plan()
    assert [a.workers[0] for a in plan.assignments] == ["w0", "w1"] * 3
    ends = {"w0": world.now_us, "w1": world.now_us}
    for a in plan.assignments:
        assert a.start_us == ends[a.workers[0]]
        ends[a.workers[0]] = a.end_us
    assert {w.name: len(w.outstanding) for w in world.scheduler.workers()} == {"w0": 3, "w1": 3}


def test_a_burst_is_not_bound_all_at_once():
    world = World(workers=2, stages_ahead=3, amend=False)
    world.encoded("running", px=2048)
    for i in range(20):
        world.arrive(f"r{i}")
    sent = world.plan().assignments
    assert len(sent) == 6 and not world.plan().assignments
    world.arrive("urgent", priority=5)
    assert not world.plan().assignments and not world.scheduler.due(world.now_us)
    world.over(sent[0])
    assert world.scheduler.due(world.now_us), "there is room again"
    plan = world.plan()
    stages = [a for a in plan.assignments if a.node == "text"]
    assert [a.batch[0].request for a in stages] == ["urgent"]
    assert stages[0].workers == sent[0].workers


def test_a_burst_drains_to_the_last():
    world = World(workers=2, stages_ahead=1, rounds=False)
    for i in range(9):
        world.arrive(f"r{i}", steps=1)
    for _ in range(1000):
        world.plan()
        flights = world.scheduler.outstanding()
        if not flights:
            break
        world.over(min(flights, key=lambda a: (a.end_us, a.sequence)))
    assert len(world.ended) == 9


def test_estimates_sum_the_queue_up_once(monkeypatch):
    world = World(workers=4)
    for i in range(50):
        world.arrive(f"r{i}", px=(512, 1024)[i % 2], slo_us=(None, 9_000_000)[i % 3 == 0])
    world.plan()
    calls = counted_forecasts(monkeypatch)
    etas = [world.scheduler.eta_us(f"r{i}", world.now_us) for i in range(50)]
    assert len(calls) == 1
    assert etas == [world.scheduler.eta_us(f"r{i}", world.now_us) for i in range(50)]
    world.arrive("first", priority=9)
    later = [world.scheduler.eta_us(f"r{i}", world.now_us) for i in range(50)]
    assert any(a < b for a, b in zip(etas, later, strict=True)), "what was summed up is out of date"


def test_lost_workers_are_forgotten_beyond_a_bound(monkeypatch):
    monkeypatch.setattr(ledger_module, "WORKERS_MAX", 10)
    world = World(workers=2)
    world.encoded("a", px=512, slo_us=60_000_000)
    for i in range(100):
        world.up(f"x{i}", host="h9")
        world.lose(f"x{i}")
    names = [w.name for w in world.scheduler.workers()]
    assert len(names) <= 11 and names[:2] == ["w0", "w1"]
    assert world.view("a").attempt == 0
    world.up("x1", host="h9")
    assert any(w.name == "x1" and w.usable for w in world.scheduler.workers())


def up(cluster, name):
    cluster.lease(WorkerUp(at_us=0, worker=name, incarnation="1", gpu="h100", host="h0"))


def test_forgotten_groups_never_reuse_an_epoch(monkeypatch):
    monkeypatch.setattr(cluster_module, "EPOCHS_MAX", 20)
    cluster = Cluster(epoch_base=1)
    up(cluster, "a")
    for i in range(50):
        up(cluster, f"b{i:02}")
    seen = {}
    for _ in range(3):
        for i in range(50):
            group = ("a", f"b{i:02}")
            epoch = cluster.epoch(group)
            assert epoch == cluster.epoch(group) > seen.get(group, 0)
            seen[group] = epoch
    assert sum(cluster.warm(g) for g in seen) <= 20
