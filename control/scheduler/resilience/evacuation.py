"""Copies of latents that only leaving workers hold: on others before they go.

A worker leaves when it is drained or was told to stop. What it denoises moves on with its next
steps; what is parked there would be lost with it. So for each parked request whose latest latent
no staying worker has, one is asked to fetch it, beside its steps; a few at a time. The copy is
entered like any other, when its worker tells of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..books.cluster import Cluster, Worker
from ..books.fetches import TRIES_MAX, FetchesUnderWay, Sent
from ..books.ledger import Ledger
from ..books.lifecycle import JobState
from ..books.tracker import Tracked
from ..values import Fetch

PLAN_MAX = 16  # fetches in one plan
WORKER_MAX = 2  # under way to one worker


def plan(ledger: Ledger, now_us: int) -> tuple[Fetch, ...]:
    """Fetches that go out now."""
    found = _find(ledger, ledger.fetches, now_us)
    ledger.fetches.note()
    return found


def came(ledger: Ledger, worker: str) -> bool:
    """A worker has told what it holds: whether something that was awaited is there."""
    fetches = ledger.fetches
    there = [r for r, s in fetches.sent.items() if _is_there(ledger, s.fetch, worker)]
    for request in there:
        del fetches.sent[request]
    fetches.note()
    return bool(there)


def due(ledger: Ledger) -> bool:
    """Something that a leaving worker holds has no other copy, and no fetch under way."""
    fetches = ledger.fetches
    return any(r not in fetches.sent or r in fetches.stuck for r in _wanted(ledger))


def _find(ledger: Ledger, fetches: FetchesUnderWay, now_us: int) -> tuple[Fetch, ...]:
    wanted = _wanted(ledger)
    fetches.stuck.clear()
    fetches.sent = {
        r: s for r, s in fetches.sent.items() if r in wanted and _same(ledger, s, wanted[r])
    }
    if not wanted:
        return ()
    under_way: dict[str, int] = {}
    for sent in fetches.sent.values():
        if not sent.is_due(now_us):
            under_way[sent.fetch.worker] = under_way.get(sent.fetch.worker, 0) + 1
    copies = _copies(ledger.tracked.values())
    found: list[Fetch] = []
    for tracked in wanted.values():
        before = fetches.sent.get(tracked.id)
        if before is not None and not before.is_due(now_us):
            continue
        tries = 1 if before is None else before.tries + 1
        to = _destination(ledger, tracked, under_way, copies, before)
        if tries > TRIES_MAX:
            continue
        if to is None:
            fetches.stuck.add(tracked.id)  # news of a worker makes the next plan due
            continue
        fetch = _fetch(ledger, tracked, to)
        fetches.sent[tracked.id] = Sent(fetch, now_us, tries)
        under_way[to] = under_way.get(to, 0) + 1
        copies[to] = copies.get(to, 0) + 1
        found.append(fetch)
        if len(found) >= PLAN_MAX:
            break
    return tuple(found)


def alone(ledger: Ledger, worker: str) -> tuple[str, ...]:
    """Requests whose latest latent a worker holds, and no other living one that stays."""
    return tuple(r for r, safe in _latest_on(ledger, worker) if not safe)


def safe(ledger: Ledger, worker: str) -> tuple[str, ...]:
    """Requests whose latest latent a worker holds, and another living one that stays, too; none
    that is being worked on: its worker goes on from there.
    """
    found = (r for r, safe in _latest_on(ledger, worker) if safe)
    return tuple(r for r in found if not ledger.tracked[r].outstanding)


def _latest_on(ledger: Ledger, worker: str) -> Iterable[tuple[str, bool]]:
    for tracked in ledger.tracked.values():
        if not tracked.workflow.plain:
            if worker in tracked.everywhere():
                needed = [one for one in _needed(tracked) if worker in one.holders]
                stay = all(any(_stays(ledger.cluster, n) for n in o.holders) for o in needed)
                yield tracked.id, stay
        elif tracked.holders.get(worker) == tracked.steps_done:
            others = (h.worker for h in tracked.latest() if h.worker != worker)
            yield tracked.id, any(_stays(ledger.cluster, name) for name in others)


def _stays(cluster: Cluster, name: str) -> bool:
    return cluster.living(name) and not cluster.workers[name].leaving


def _wanted(ledger: Ledger) -> dict[str, Tracked]:
    """Parked requests of whose latest latent, or of something else that they need yet, only leaving
    workers have a copy.
    """
    cluster = ledger.cluster
    found: dict[str, Tracked] = {}
    if not cluster.leaving():
        return found
    for tracked in ledger.tracked.values():
        if not tracked.workflow.plain:
            if not tracked.outstanding and _lacking(ledger, tracked) is not None:
                found[tracked.id] = tracked
            continue
        if not tracked.holders or tracked.outstanding:
            continue
        living = [h.worker for h in tracked.latest() if cluster.living(h.worker)]
        if living and all(cluster.workers[w].leaving for w in living):
            found[tracked.id] = tracked
    return found


def _is_there(ledger: Ledger, fetch: Fetch, worker: str) -> bool:
    """The worker holds what it was to fetch, or more; an older copy is not it."""
    if fetch.worker != worker:
        return False
    tracked = ledger.tracked.get(fetch.request)
    if tracked is None:
        return True
    if tracked.workflow.plain:
        return tracked.holders.get(worker, -1) >= fetch.steps_done
    marks = tracked.marks.get(tracked.workflow.maker.get(fetch.artifact, ""))
    if marks is None:
        return worker in tracked.copies.get(fetch.artifact, ())
    return marks.get(worker, -1) >= fetch.steps_done


def _same(ledger: Ledger, sent: Sent, tracked: Tracked) -> bool:
    """The fetch is of what it still goes on from."""
    one = _fetched(ledger, tracked)
    wanted = (tracked.attempt, one.version, one.artifact)
    return (sent.fetch.attempt, sent.fetch.steps_done, sent.fetch.artifact) == wanted


class _Kept(NamedTuple):
    """Something that a request has, and needs yet."""

    artifact: str
    version: int
    taker: str  # a node that needs it
    holders: tuple[str, ...]


def _needed(tracked: Tracked) -> Iterator[_Kept]:
    """What calls take that are not done: of latents the furthest, of all else what was made. The
    latents of a pass that has begun stand for what it took.
    """
    workflow = tracked.workflow
    begun = {node for node, marks in tracked.marks.items() if marks}
    done = {node for node, job in tracked.jobs.items() if job.state is JobState.DONE}
    for artifact, maker in workflow.maker.items():
        marks = tracked.marks.get(maker)
        holders = tracked.copies.get(artifact, ())
        version = 0
        if marks is not None:
            version = max(marks.values(), default=0)
            holders = tuple(sorted(w for w, steps in marks.items() if steps == version))
        takers = [n for n in workflow.followers[maker] if artifact in workflow.node[n].inputs]
        if marks is not None and maker not in done:
            takers = [maker]
        open_ = [n for n in takers if n not in done and (n == maker or n not in begun)]
        if holders and open_:
            yield _Kept(artifact, version, open_[0], holders)


def _lacking(ledger: Ledger, tracked: Tracked) -> _Kept | None:
    """The first of these that only leaving workers have."""
    cluster = ledger.cluster
    for one in _needed(tracked):
        living = [w for w in one.holders if cluster.living(w)]
        if living and all(cluster.workers[w].leaving for w in living):
            return one
    return None


def _fetched(ledger: Ledger, tracked: Tracked) -> _Kept:
    """What is to be fetched of a wanted request."""
    if not tracked.workflow.plain and (one := _lacking(ledger, tracked)) is not None:
        return one
    names = tuple(h.worker for h in tracked.latest())
    return _Kept("", tracked.steps_done, tracked.stepped.node, names)


def _copies(requests: Iterable[Tracked]) -> dict[str, int]:
    """Latents on each worker: what its memory for them is used for."""
    copies: dict[str, int] = {}
    for tracked in requests:
        for name in tracked.holders:
            copies[name] = copies.get(name, 0) + 1
    return copies


def _destination(
    ledger: Ledger,
    tracked: Tracked,
    under_way: dict[str, int],
    copies: dict[str, int],
    before: Sent | None,
) -> str | None:
    """The usable worker with the fewest copies; another one than the last time, if it can be."""

    def load(worker: Worker) -> tuple[bool, int]:
        again = before is not None and before.fetch.worker == worker.name
        return again, copies.get(worker.name, 0)

    able = ledger.able(tracked.request, _fetched(ledger, tracked).taker)
    open_ = [w for w in able if under_way.get(w.name, 0) < WORKER_MAX]
    return min(open_, key=load).name if open_ else None


def _fetch(ledger: Ledger, tracked: Tracked, to: str) -> Fetch:
    one = _fetched(ledger, tracked)
    holders = (name for name in one.holders if ledger.cluster.living(name))
    return Fetch(
        request=tracked.id,
        attempt=tracked.attempt,
        steps_done=one.version,
        holder=next(holders),
        worker=to,
        artifact=one.artifact,
    )
