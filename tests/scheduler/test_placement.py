"""Binding widths to workers."""

import pytest

from control.scheduler.books.cluster import Cluster
from control.scheduler.outlook.placement import Demand, Placement
from control.scheduler.values import WorkerUp

from .driving import FLUX


@pytest.fixture
def cluster():
    made = Cluster(epoch_base=1)
    for i in range(8):
        made.lease(
            WorkerUp(
                at_us=0,
                worker=f"w{i}",
                incarnation="1",
                gpu="h100",
                host=f"h{i // 4}",
                models=(FLUX,),
            )
        )
    return made


def find(cluster, degree, *, free=None, group=(), holders=(), ready_us=0, step_us=100):
    names = [f"w{i}" for i in range(8)]
    placement = Placement(cluster, dict.fromkeys(names, 0) if free is None else free)
    return placement.find(Demand(degree, step_us, ready_us, group, holders), names)


def test_blocks_are_aligned_and_inside_a_host(cluster):
    assert find(cluster, 2) == ("w0", "w1")
    free = {f"w{i}": 0 for i in (1, 2, 3, 4, 5, 6, 7)}
    assert find(cluster, 2, free=free) == ("w2", "w3")
    assert find(cluster, 4, free=free) == ("w4", "w5", "w6", "w7")


def test_the_same_group_is_kept(cluster):
    group = ("w1", "w6")
    assert find(cluster, 2, group=group, holders=group) == group


def test_widening_covers_the_holders(cluster):
    assert find(cluster, 4, group=("w4", "w5"), holders=("w4", "w5")) == ("w4", "w5", "w6", "w7")


def test_shrinking_stays_on_holders(cluster):
    group = ("w4", "w5", "w6", "w7")
    assert find(cluster, 2, group=group, holders=group) == ("w4", "w5")


def test_warm_groups_are_preferred_to_cold_ones(cluster):
    cluster.epoch(("w2", "w3"))
    assert find(cluster, 2) == ("w2", "w3")


def test_nobody_waits_whole_steps_for_its_old_group(cluster):
    group = ("w0", "w1")
    free = {f"w{i}": 1_000 if i < 2 else 0 for i in range(8)}
    assert find(cluster, 2, free=free, group=group, holders=group) == ("w2", "w3")
    nearly = {f"w{i}": 40 if i < 2 else 0 for i in range(8)}
    assert find(cluster, 2, free=nearly, group=group, holders=group) == group


def test_a_worker_is_bound_once_and_too_few_are_none(cluster):
    names = [f"w{i}" for i in range(8)]
    placement = Placement(cluster, dict.fromkeys(names, 0))
    seen = []
    for _ in range(2):
        members = placement.find(Demand(4, 100, 0, (), ()), names)
        placement.bind(members)
        seen += members
    assert sorted(seen) == names and placement.left == 0
    assert placement.find(Demand(1, 100, 0, (), ()), names) is None


def test_epochs_rise_for_groups_with_that_member_only(cluster):
    for group in (("w0", "w1"), ("w2", "w3"), ("w0", "w1", "w2", "w3")):
        assert cluster.epoch(group) == 1
    cluster.raise_epochs(("w0",))
    assert cluster.epoch(("w0", "w1")) == 2
    assert cluster.epoch(("w0", "w1", "w2", "w3")) == 2
    assert cluster.epoch(("w2", "w3")) == 1
