"""Groups on demand: collectives, cache, epochs, formation that cannot succeed."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.groups import GroupLost
from gpuworker.collectives.rendezvous import Rendezvous
from tests.worker import worker_tasks as tasks
from tests.worker.worker_jobs import meet
from tests.worker.worker_pool import CPU, Pool

NEVER_S = 3600.0  # a time-out that no test lives to see: what ends before has another cause


@pytest.mark.parametrize("lengths", [(3, 1), (2, 2), (4, 0), (3, 2, 1, 1), (1, 0, 0, 2)])
def test_collectives_of_uneven_length(pool: Pool, lengths: tuple[int, ...]) -> None:
    size = len(lengths)
    results = pool.each(
        pool.names[:size], tasks.collectives, meet(pool, pool.names[:size]), lengths
    )
    gathered = [[float(rank) for rank, n in enumerate(lengths) for _ in range(n)]] * 2
    for rank, (whole, exchanged, word, words, text, empty, tensor) in enumerate(results):
        assert whole == gathered
        assert exchanged == [10 * sender + rank for sender in range(size) for _ in range(rank + 1)]
        assert words == [[sender, -(1 << 40)] for sender in range(size)]
        assert (word, text, empty) == (-(1 << 40), 6000, 0)
        assert tensor == [size - 1.0] * 3


def test_a_group_of_one_needs_nobody() -> None:
    rendezvous = Rendezvous()
    group = GroupCache(rendezvous, "only", CPU).get(1, ["only"], "nowhere:1", 0.1)
    tensor = torch.arange(4)
    assert (group.rank, group.size) == (0, 1)
    assert group.all_gather(tensor, 0, [4]) is tensor
    assert group.broadcast_word(7) == 7
    assert group.broadcast_blob(b"x") == b"x"


def test_some_members_may_have_a_channel_of_their_own(pool: Pool) -> None:
    parts = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3))
    found = pool.each(pool.names[:4], tasks.part_sums, meet(pool, pool.names[:4]), parts)
    assert found == [[1, 2, 6], [1, 4, 6], [5, 2, 6], [5, 4, 6]]


def test_a_cached_group_is_found_without_its_peers(pool: Pool) -> None:
    pair = pool.names[:2]
    meeting = meet(pool, pair)
    pool.each(pair, tasks.join, meeting)
    assert pool.one(pair[0], tasks.join, meeting) is True
    assert (meeting.epoch, meeting.members) in pool.one(pair[1], tasks.cached)
    assert pool.each(pair, tasks.rank_sum, meeting) == [1, 1]
    drain(pool, pair)


def test_a_higher_epoch_replaces_the_group(pool: Pool) -> None:
    pair = pool.names[:2]
    old, new = meet(pool, pair), meet(pool, pair)
    for meeting in (old, new):
        assert pool.each(pair, tasks.rank_sum, meeting) == [1, 1]
        drain(pool, pair)
    names = pool.one(pair[0], tasks.cached)
    assert (new.epoch, new.members) in names and (old.epoch, old.members) not in names
    loss = pool.one(pair[0], tasks.join, old)
    assert "in use" in loss.cause, "an older epoch is refused at once"


def test_the_cache_is_bounded_and_never_remakes_a_name(pool: Pool) -> None:
    first, *others = pool.names
    pool.each(pool.names, tasks.fresh_cache, 2)
    pairs = [meet(pool, (first, other)) for other in others]
    for meeting in pairs:
        assert pool.each(meeting.members, tasks.rank_sum, meeting) == [1, 1]
        drain(pool, meeting.members)
    assert [epoch for epoch, _ in pool.one(first, tasks.cached)] == [m.epoch for m in pairs[1:]]
    # Evicted but not closed: the peer sees no difference until a step has been acknowledged, or
    # until the group is asked for.
    members = pairs[0].members
    losses = pool.each(members, tasks.rank_sum, replace(pairs[0], timeout_s=NEVER_S))
    assert pool.note(others[0]) == "joined"
    assert "in use" in losses[0].cause
    assert [loss.spent for loss in losses] == [(first,), (first,)], "both say who gave it up"
    assert not any(loss.suspects for loss in losses), "nobody failed"
    again = meet(pool, (first, others[0]))
    assert pool.each(again.members, tasks.rank_sum, again) == [1, 1]
    drain(pool, again.members)
    pool.each(pool.names, tasks.fresh_cache, 16)


def test_a_peer_learns_who_gave_a_group_up_long_ago(pool: Pool) -> None:
    """Whoever evicted it: also where the peer hosts the store, and where the group was closed."""
    first, second, *others = pool.names
    pool.each(pool.names, tasks.fresh_cache, 1)
    pair = meet(pool, (second, first), timeout_s=NEVER_S)
    assert pool.each(pair.members, tasks.rank_sum, pair) == [1, 1]
    other = meet(pool, (first, others[0]))
    assert pool.each(other.members, tasks.rank_sum, other) == [1, 1]
    drain(pool, [first, second, *other.members])
    pool.one(first, tasks.acknowledge)
    lone = pool.one(second, tasks.rank_sum, pair)
    assert pool.note(second) == "joined"
    assert (lone.spent, lone.suspects) == ((first,), ())
    # A member that has forgotten everything does not wait for one that will not come.
    pool.one(first, tasks.rank_sum, pair)
    pool.one(second, tasks.fresh_cache, 16)
    forgetful = pool.one(second, tasks.join, pair, NEVER_S)
    assert forgetful.spent == (first,)
    pool.each(pool.names, tasks.fresh_cache, 16)


def test_forming_leaves_nothing_in_the_store(pool: Pool) -> None:
    first, *others = pool.names
    pool.each(pool.names, tasks.fresh_cache, 2)
    counts = []
    for turn in range(10):
        meeting = meet(pool, (first, others[turn % 3], others[(turn + 1) % 3]))
        assert pool.each(meeting.members, tasks.rank_sum, meeting) == [3, 3, 3]
        drain(pool, meeting.members)
        for name in meeting.members:
            pool.one(name, tasks.acknowledge)
        counts.append(pool.one(first, tasks.store_keys))
    assert len(set(counts[6:])) == 1, counts  # one mark stays for each of the three member lists
    pool.each(pool.names, tasks.fresh_cache, 16)


def test_formation_without_a_member_ends_by_time_out(pool: Pool) -> None:
    here, absent = pool.names[:2]
    loss = pool.one(here, tasks.join, meet(pool, (here, absent)), 0.3)
    assert (loss.cause, loss.suspects) == ("not formed: time-out", (absent,))


@pytest.mark.parametrize("first", [True, False])
def test_formation_can_be_cancelled(pool: Pool, first: bool) -> None:
    here, absent = pool.names[:2]
    members = (here, absent) if first else (absent, here)
    loss = pool.one(here, tasks.join, meet(pool, members), NEVER_S, 0.1)
    assert (loss.cause, loss.suspects) == ("not formed: cancelled", ())


def test_formation_at_a_dead_rendezvous_needs_no_time_out(pool: Pool) -> None:
    here, dead = pool.names[:2]
    meeting = meet(pool, (dead, here))
    pool.kill(dead)
    loss = pool.one(here, tasks.join, meeting, NEVER_S)
    assert loss.suspects == (dead,) and "refused" in loss.cause


def test_formation_at_a_stopped_rendezvous_ends_by_time_out(pool: Pool) -> None:
    here, stopped = pool.names[:2]
    meeting = meet(pool, (stopped, here))
    pool.signal(stopped, signal.SIGSTOP)
    try:
        loss = pool.one(here, tasks.join, meeting, 0.3)
    finally:
        pool.kill(stopped)
    assert (loss.cause, loss.suspects) == ("not formed: time-out", (stopped,))


def test_blobs_larger_than_a_store_value_are_fetched_whole(pool: Pool) -> None:
    holder, other = pool.names[:2]
    size = (9 << 20) + 256
    pool.one(holder, tasks.put, "big", size)
    got = pool.one(other, tasks.fetch, pool.address(holder), "big", 20.0)
    assert got == bytes(range(256)) * (size // 256)
    pool.one(holder, tasks.drop, "big")
    assert "time-out" in pool.one(other, tasks.fetch, pool.address(holder), "big", 0.2).cause


def test_fetching_from_a_holder_that_dies_needs_no_time_out(pool: Pool) -> None:
    holder, other = pool.names[:2]
    pool.one(holder, tasks.put, "once", 256)
    assert len(pool.one(other, tasks.fetch, pool.address(holder), "once", 20.0)) == 256
    pool.start(other, tasks.fetch, pool.address(holder), "never", NEVER_S)
    pool.kill(holder)
    loss = pool.result(other)
    assert isinstance(loss, tasks.Loss) and "time-out" not in loss.cause


def test_an_error_of_a_closed_group_names_it() -> None:
    group = GroupCache(Rendezvous(), "a", CPU)
    with pytest.raises(AssertionError):
        group.get(1, ["b", "c"], "nowhere:1", 0.1)
    lost = GroupLost(("a", "b"), 3, "reset\nlong story", ("b",))
    assert (lost.members, lost.epoch, lost.cause, lost.suspects) == (("a", "b"), 3, "reset", ("b",))


def drain(pool: Pool, names: list[str] | tuple[str, ...]) -> None:
    """Takes the "joined" notes that `rank_sum` leaves."""
    for name in names:
        assert pool.note(name) == "joined"
