"""Who holds a request's latent, and standing the request at the best copy there is.

Copies become known in three ways: steps that ended, what a member that gave up still has, and what
a worker says of itself when its lease begins or goes on (`adopt`): a lease may end while its worker
lives, and a new leader knows of no steps at all.
"""

from __future__ import annotations

from ..values import Held
from .ledger import Ledger
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
    if tracked is None or tracked.outstanding or not (tracked.holders or tracked.copies):
        return
    before = tracked.steps_done, [job.state for job in tracked.jobs.values()]
    ledger.fall_back(tracked, parked=True)
    if before != (tracked.steps_done, [job.state for job in tracked.jobs.values()]):
        ledger.due = True


def hold(ledger: Ledger, request: str, worker: str, steps_done: int, *, exact: bool) -> bool:
    """Enters a living worker's copy; unless exact, it never takes back a later one."""
    tracked = ledger.tracked.get(request)
    if tracked is None or not ledger.cluster.living(worker):
        return False
    if not 0 <= steps_done <= tracked.request.steps:
        return False
    known = tracked.holders.get(worker, -1)
    tracked.holders[worker] = steps_done if exact else max(known, steps_done)
    return True


def hold_late(
    ledger: Ledger, request: str, node: str, workers: tuple[str, ...], steps_done: int
) -> None:
    """Enters what workers made, or took, in a run that nobody counted on any more."""
    tracked = ledger.tracked.get(request)
    if tracked is None:
        return
    if node in tracked.workflow.leave_latents:
        for name in workers:
            hold(ledger, request, name, steps_done, exact=False)
    elif living := tuple([name for name in workers if ledger.cluster.living(name)]):
        tracked.made(node, living)
    profit(ledger, request)


def adopt(
    ledger: Ledger, worker: str, latents: tuple[Held, ...], at_us: int, *, fresh: bool
) -> None:
    """Enters what a worker says it holds; a request that stands at a worse place goes on from it.

    A worker that was there all along (not `fresh`) may tell of steps whose reports are on their
    way, so it never disturbs work that it takes part in or that will get as far.
    """
    for held in latents:
        if not hold(ledger, held.request, worker, held.steps_done, exact=False):
            continue
        tracked = ledger.tracked[held.request]
        if not _better(ledger, tracked, worker, held.steps_done, fresh):
            continue
        if tracked.outstanding:
            restart(ledger, tracked, at_us)
        else:
            profit(ledger, held.request)


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
