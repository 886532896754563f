"""Losing a member in the middle of a step: the others learn of it, by the loss itself and not by
a time-out where there is a sign of it, and redo the step exactly.
"""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from tests.worker import worker_tasks as tasks
from tests.worker.tiny_models import Reference
from tests.worker.worker_jobs import LATENT_TOLERANCE, Job, latent_error, meet
from tests.worker.worker_pool import Pool

NEVER_S = 3600.0  # a time-out that no test lives to see: what ends before has another cause


@pytest.mark.parametrize("size", [2, 4])
def test_kill_in_a_collective_and_redo(pool: Pool, flux: Reference, size: int) -> None:
    names = pool.names[:size]
    job = Job(pool, flux, f"killed{size}")
    job.encode(names[0])
    assert job.run(names, 3) == [3] * size
    *survivors, victim = names
    segment = job.segment(names, 3, NEVER_S, "suicide")
    for name in names:
        pool.start(name, tasks.denoise, segment)
    assert pool.note(victim) == "dies"
    losses = [pool.result(name) for name in survivors]
    pool.kill(victim)  # it is dead already; this waits until the system says so
    assert all(isinstance(loss, tasks.Loss) for loss in losses), losses
    assert all(loss.members == segment.meeting.members for loss in losses), losses
    job.holders = tuple(survivors)
    assert len(set(job.states())) == 1, "survivors are left with the same state"
    team = survivors if size == 2 else survivors[:2]  # heads divide by 1, 2, 4
    assert job.run(team, 5) == [8] * len(team)
    assert latent_error(job.states()[0], flux) <= LATENT_TOLERANCE
    job.holders = ()
    pool.heal()
    job.forget()


def test_a_hung_member_is_found_by_the_time_out(pool: Pool) -> None:
    names = pool.names[:3]
    meeting = meet(pool, names, timeout_s=0.4)
    pool.each(names, tasks.join, meeting)
    pool.signal(names[2], signal.SIGSTOP)
    try:
        losses = pool.each(names[:2], tasks.rank_sum, meeting)
    finally:
        pool.kill(names[2])
    assert all(isinstance(loss, tasks.Loss) for loss in losses), losses
    assert all(loss.members == meeting.members for loss in losses), losses
    assert any("Timed out" in loss.cause for loss in losses), losses
    for name in names[:2]:
        assert pool.note(name) == "joined"
    again = meet(pool, names[:2])
    assert pool.each(names[:2], tasks.rank_sum, again) == [1, 1]
    for name in names[:2]:
        assert pool.note(name) == "joined"


def test_an_abort_wakes_the_peers(pool: Pool) -> None:
    """A member that gives up (out of memory, a bug) closes its sockets: nobody waits for it."""
    waiting, aborting = pool.names[:2]
    meeting = meet(pool, (waiting, aborting), timeout_s=NEVER_S)
    pool.start(waiting, tasks.rank_sum, meeting)
    pool.start(aborting, tasks.join_and_abort, meeting)
    assert pool.note(waiting) == "joined" and pool.note(aborting) == "joined"
    pool.result(aborting)
    loss = pool.result(waiting)
    assert isinstance(loss, tasks.Loss) and loss.members == meeting.members


def test_the_first_member_settles_where_to_stop(pool: Pool, flux: Reference) -> None:
    """Orders differ (2 steps, 8 steps), as after a truncation: the word of rank 0 decides."""
    names = pool.names[:2]
    job = Job(pool, flux, "truncated")
    job.encode(names[0])
    order = job.segment(names, 8, 20.0, "")
    pool.start(names[0], tasks.denoise, replace(order, steps=2))
    pool.start(names[1], tasks.denoise, order)
    assert [pool.result(name) for name in names] == [2, 2]
    job.holders = tuple(names)
    assert len(set(job.states())) == 1
    job.forget()
