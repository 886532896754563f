"""How much of a group's step was whose, by real groups: the slow member waits for nobody."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import pytest
import torch

from gpuworker.collectives import own_time
from gpuworker.executor import StepNote
from gpuworker.steps.run import Run
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker import worker_tasks as tasks
from tests.worker.engine_tasks import Order, Told, run_engine
from tests.worker.test_batches import assignment
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import meet
from tests.worker.worker_pool import Pool

BUSY_US = 40_000  # a call of the tiny network takes less
STEPS = 6


def run_pair(
    pool: Pool, flux: Reference, steps: int = STEPS, **of_rank: Sequence[int]
) -> tuple[list[Told], list[Told]]:
    """Two workers make steps together; what each of them tells."""
    workers = tuple(pool.names[:2])
    epoch, address = pool.next_epoch(), pool.address(workers[0])
    dit = assignment(flux, 2, "dit", workers, ("a",), count=steps, address=address, epoch=epoch)
    for rank, worker in enumerate(workers):
        text = assignment(flux, 1, "text", (worker,), ("a",))
        special = {name: values[rank] for name, values in of_rank.items()}
        pool.start(worker, run_engine, Order(flux.folder, (text, dit), **special))
    first, second = (pool.result(worker)[0] for worker in workers)
    return first, second


@pytest.mark.parametrize(
    ("slow", "ahead"),
    [(0, (False, False)), (1, (False, False)), (1, (True, True)), (0, (True, False))],
)
def test_the_report_says_which_of_two_was_slow(
    pool: Pool, flux: Reference, slow: int, ahead: tuple[bool, bool]
) -> None:
    busy = [0, 0]
    busy[slow] = BUSY_US
    notes, _ = run_pair(pool, flux, busy_us=busy, ahead=ahead)
    own = [row for note in notes if note.sequence == 2 for row in note.members_us]
    assert len(own) == STEPS and all(len(row) == 2 for row in own), "the last one's, too"
    assert all(row[slow] >= BUSY_US for row in own)
    assert median(row[1 - slow] for row in own) < BUSY_US


def test_a_worker_by_itself_tells_nothing_more(pool: Pool, flux: Reference) -> None:
    worker = pool.names[0]
    alone = (
        assignment(flux, 1, "text", (worker,), ("a",)),
        assignment(flux, 2, "dit", (worker,), ("a",), count=2),
    )
    notes, _ = pool.one(worker, run_engine, Order(flux.folder, alone))
    assert not any(row for note in notes for row in note.members_us)


def test_a_group_lost_behind_the_last_step_costs_its_own_times_only(
    pool: Pool, flux: Reference
) -> None:
    notes, _ = run_pair(pool, flux, lost_after=(STEPS + 1, 0))  # the text's call counts, too
    *_, last = notes
    assert last.last and not last.reason and last.behind == {"a": STEPS}
    assert last.members_us and not last.members_us[-1], "of the last step nobody told"


@pytest.mark.parametrize("goes_around", [False, True])
def test_exchanges_that_are_not_seen_make_it_unknown(pool: Pool, goes_around: bool) -> None:
    names = pool.names[:2]
    own = pool.each(names, tasks.own_of_a_second, meet(pool, names), goes_around)
    if goes_around:
        assert own == [None, None]
    else:
        assert all(1 <= us < 1_000_000 for us in own)


class Mark:
    """An event of a stream that has come by."""

    def __init__(self, at_ms: float) -> None:
        self._at_ms = at_ms

    def elapsed_time(self, later: Mark) -> float:
        return later._at_ms - self._at_ms


def test_on_a_gpu_marks_around_each_exchange_are_read_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stands in for a GPU, which this machine may not have."""
    times_ms = iter((1.0, 3.5, 7.0, 8.0))
    monkeypatch.setattr(own_time, "_mark", lambda: Mark(next(times_ms)))
    waited, gpu = own_time.Waited(), torch.device("cuda")
    for _ in range(2):
        waited.begin(gpu)
        waited.end(gpu)
    assert waited.own_us(10_000) == 6_500


def test_own_times_are_told_by_step_and_only_where_all_are_known() -> None:
    """On a GPU a member may be a step ahead of the others."""
    group = types_pb2.Group(members=["w0", "w1"])
    run = Run(mesh_pb2.Assignment(group=group, batch=[mesh_pb2.BatchMember(request_id="r")]))
    assert run.own() == [0, 0, 0]
    for step, own_us in enumerate((70, 71, None, 73)):
        run.ended(StepNote(step, 0, 0, 100, own_us))
        run.heard([run.own(), [step, 50 + step, 0]])  # the other one is a step behind
    assert run.own() == [4, 73, 0]
    steps = run.note(4, resolved={}).steps
    assert [step.members_us for step in steps] == [(70, 51), (71, 52), (), ()]
