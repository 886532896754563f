"""Who holds a request's latents and other artifacts, and standing it at the best copies there are.

Copies become known in three ways: calls that ended, what a member that gave up still has, and what
a worker says of itself when its lease begins or goes on (`adopt`): a lease may end while its worker
lives, and a new leader knows of no steps at all.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..values import Held, JobProgress
from .ledger import Ledger
from .lifecycle import JobState
from .tracker import Tracked


def restart(ledger: Ledger, tracked: Tracked, at_us: int) -> None:
    """Calls everything off and goes on from what survived, as a new attempt."""
    ledger.call_off(tracked, at_us)
    tracked.attempt += 1
    ledger.fall_back(tracked)
    ledger.due = True


def profit(ledger: Ledger, request: str) -> None:
    """A request that still waits goes on from the best latent there is now."""
    tracked = ledger.tracked.get(request)
    if tracked is None or tracked.outstanding or not tracked.everywhere():
        return
    before = _place(tracked)
    ledger.fall_back(tracked, parked=True)
    if before != _place(tracked):
        ledger.due = True


def _place(tracked: Tracked) -> tuple[int, list[JobState]]:
    return tracked.steps_over, [job.state for job in tracked.jobs.values()]


def hold(
    ledger: Ledger, request: str, worker: str, steps_done: int, node: str = "", *, exact: bool
) -> bool:
    """Enters a living worker's copy of a stepped node's latents, of the present pass's where no
    node is named; unless exact, it never takes back a later one.
    """
    tracked = ledger.tracked.get(request)
    if tracked is None or not ledger.cluster.living(worker):
        return False
    node = node or tracked.stepped.node
    if not 0 <= steps_done <= tracked.steps_of(node):
        return False
    marks = tracked.marks[node]
    if steps_done == 0 and not tracked.workflow.plain:  # no step: it begins from its inputs
        return exact and marks.pop(worker, None) is not None
    known = marks.get(worker, -1)
    marks[worker] = steps_done if exact else max(known, steps_done)
    return True


def hold_late(
    ledger: Ledger, progress: JobProgress, node: str, workers: tuple[str, ...], at_us: int
) -> None:
    """Enters what workers made, or took, in a run that nobody counted on any more."""
    request, steps_done = progress.request, progress.steps_done
    tracked = ledger.tracked.get(request)
    if tracked is None:
        return
    if node in tracked.marks or node in tracked.workflow.leave_latents:
        of = node if node in tracked.marks else ""
        for name in workers:
            hold(ledger, request, name, steps_done, of, exact=False)
    elif living := tuple([name for name in workers if ledger.cluster.living(name)]):
        tracked.made(node, living)
    if tracked.workflow.plain:
        profit(ledger, request)
        return
    out = tracked.stepped.outstanding
    ahead = bool(out) and node == tracked.stepped.node and steps_done > ledger.steps_behind(tracked)
    _go_on(ledger, tracked, at_us, ahead)


def adopt(ledger: Ledger, worker: str, held: Iterable[Held], at_us: int, *, fresh: bool) -> None:
    """Enters what a worker says it holds; a request that stands at a worse place goes on from it.

    A worker that was there all along (not `fresh`) may tell of steps whose reports are on their
    way, so it never disturbs work that it takes part in or that will get as far.
    """
    named: dict[str, None] = {}
    for one in held:
        tracked = ledger.tracked.get(one.request)
        if tracked is None:
            continue
        if not tracked.workflow.plain:
            if _adopt_named(ledger, tracked, worker, one):
                named[one.request] = None
            continue
        if one.artifact or not hold(ledger, one.request, worker, one.steps_done, exact=False):
            continue
        if not _better(ledger, tracked, worker, one.steps_done, fresh):
            continue
        if tracked.outstanding:
            restart(ledger, tracked, at_us)
        else:
            profit(ledger, one.request)
    for request in named:
        _go_on(ledger, ledger.tracked[request], at_us, fresh)


def _adopt_named(ledger: Ledger, tracked: Tracked, worker: str, held: Held) -> bool:
    """Enters an artifact of a workflow that names its own; whether it was news."""
    workflow = tracked.workflow
    maker = workflow.maker.get(held.artifact)
    if maker is None or not ledger.cluster.living(worker):
        return False
    if maker in tracked.marks:
        before = tracked.marks[maker].get(worker)
        hold(ledger, tracked.id, worker, held.steps_done, maker, exact=False)
        return before != tracked.marks[maker].get(worker)
    known = tracked.copies.get(held.artifact, ())
    if worker in known:
        return False
    tracked.copies[held.artifact] = (*known, worker)
    return True


def _go_on(ledger: Ledger, tracked: Tracked, at_us: int, fresh: bool) -> None:
    """From what turned up. What is under way goes on, unless a worker came (back) with what makes
    it vain.
    """
    if not tracked.outstanding:
        profit(ledger, tracked.id)
    elif fresh and tracked.vain(ledger.cluster.living):
        restart(ledger, tracked, at_us)
    else:
        ledger.fall_back(tracked)


def _better(ledger: Ledger, tracked: Tracked, worker: str, steps_done: int, fresh: bool) -> bool:
    prepared = tracked.prepared
    if prepared and steps_done <= tracked.steps_done:
        return False
    if fresh:
        return True
    flights = [ledger.board.flights[s].assignment for s in tracked.outstanding]
    if any(worker in a.workers for a in flights):
        return False
    ends = [
        m.first_step + a.steps
        for a in flights
        for m in a.batch
        if a.node == tracked.stepped.node and m.request == tracked.id
    ]
    return not prepared or steps_done > max(ends, default=tracked.steps_done)
