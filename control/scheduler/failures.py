"""What a lost worker or a failed assignment costs: the steps since the last surviving latent.

Whatever goes wrong, the answer is one: call off everything outstanding of the requests concerned,
count a new attempt, and go on from the furthest latent that a living worker still holds, or from
the encode. Reports of called-off work that come in late may at most tell of latents that nobody had
counted on.
"""

from __future__ import annotations

from .ledger import Ledger
from .lifecycle import WorkerState
from .tracker import Tracked
from .values import TEXT, Assignment, AssignmentFailed, Ended, JobProgress, Outcome, StepsEnded

# The reporter asked the named holders in vain: they do not have what we believed they had.
LATENT_MISSING = "LATENT_MISSING"
# A message was lost on its way (the broker restarted, say): nobody's fault, and no strike.
MESSAGE_LOST = "MESSAGE_LOST"


def worker_lost(ledger: Ledger, name: str, at_us: int) -> tuple[Ended, ...]:
    """A lease ended or a worker restarted: what it ran stops, what it held is gone."""
    worker = ledger.cluster.workers.get(name)
    if worker is None or worker.state is WorkerState.LOST:
        return ()
    worker.move(WorkerState.LOST)
    ledger.cluster.raise_epochs((name,))
    for tracked in list(ledger.tracked.values()):
        held = tracked.holders.pop(name, None)
        if _depends_on(ledger, tracked, name):
            restart(ledger, tracked, at_us)
        elif held is not None and not tracked.outstanding:
            fall_back(ledger, tracked)
    ledger.due = True
    return ()


def assignment_failed(ledger: Ledger, fact: AssignmentFailed) -> tuple[Ended, ...]:
    """A member gave up; only the first report of an assignment restarts its requests."""
    flight = ledger.board.flights.get(fact.sequence)
    assignment = flight.assignment if flight else ledger.board.retired.get(fact.sequence)
    if assignment is None or fact.worker not in assignment.workers:
        return ()
    requests = {m.request for m in assignment.batch}
    copies = [p for p in fact.jobs if p.request in requests]
    for progress in copies:  # what a worker says of its own copy is exact
        _hold(ledger, progress, fact.worker, exact=True)
    if flight is None:
        for progress in copies:
            profit(ledger, progress.request)
        return ()
    for name in fact.suspects:
        worker = ledger.cluster.workers.get(name)
        if worker is not None and worker.state is WorkerState.UP:
            worker.move(WorkerState.SUSPECT)
    ledger.cluster.raise_epochs(fact.suspects, assignment.workers)
    concerned = [
        t for t in ledger.tracked.values() if _concerned(ledger, t, assignment, fact.suspects)
    ]
    ended: list[Ended] = []
    for tracked in concerned:
        member = next((m for m in assignment.batch if m.request == tracked.id), None)
        if member is not None and fact.reason == LATENT_MISSING:
            for holder in member.holders:
                if holder.worker != fact.worker:
                    tracked.holders.pop(holder.worker, None)
        if (
            member is not None
            and not fact.suspects
            and fact.reason != MESSAGE_LOST
            and _struck_out(ledger, tracked, assignment.node)
        ):
            ended.append(ledger.end(tracked, Outcome.FAILED, fact.at_us, fact.reason))
        else:
            restart(ledger, tracked, fact.at_us)
    ledger.due = True
    return tuple(ended)


def restart(ledger: Ledger, tracked: Tracked, at_us: int) -> None:
    """Calls everything off and goes on from what survived, as a new attempt."""
    ledger.call_off(tracked, at_us)
    tracked.attempt += 1
    fall_back(ledger, tracked)
    ledger.due = True


def fall_back(ledger: Ledger, tracked: Tracked) -> None:
    """Stands a request without outstanding work at its latest surviving latent."""
    assert not tracked.outstanding
    surviving = [done for w, done in tracked.holders.items() if ledger.cluster.living(w)]
    tracked.resume_from(max(surviving, default=None))


def late_report(ledger: Ledger, fact: StepsEnded) -> None:
    """Steps of called-off work that ended after all: their latents count if they come in time."""
    assignment = ledger.board.retired.get(fact.sequence)
    if assignment is None:
        return
    for progress in fact.jobs:
        for name in assignment.workers:
            _hold(ledger, progress, name, exact=False)
        profit(ledger, progress.request)


def profit(ledger: Ledger, request: str) -> None:
    """A request that still waits goes on from the best latent there is now."""
    tracked = ledger.tracked.get(request)
    if tracked is None or tracked.outstanding or not tracked.holders:
        return
    before = tracked.steps_done, tracked.jobs[TEXT].state
    fall_back(ledger, tracked)
    if before != (tracked.steps_done, tracked.jobs[TEXT].state):
        ledger.due = True


def _depends_on(ledger: Ledger, tracked: Tracked, name: str) -> bool:
    """Something outstanding runs on the worker, or has yet to fetch its latent from it alone."""
    for sequence in tracked.outstanding:
        flight = ledger.board.flights[sequence]
        if name in flight.assignment.workers:
            return True
        sources = [
            h.worker for m in flight.assignment.batch if m.request == tracked.id for h in m.holders
        ]
        if flight.reported_us is None and name in sources:
            return not any(ledger.cluster.living(s) for s in sources)
    return False


def _concerned(
    ledger: Ledger, tracked: Tracked, failed: Assignment, suspects: tuple[str, ...]
) -> bool:
    """It ran there, waits for the same communicator, or needs one of the suspects."""
    for sequence in tracked.outstanding:
        same_group = ledger.board.flights[sequence].assignment.workers == failed.workers
        if sequence == failed.sequence or (same_group and len(failed.workers) > 1):
            return True
    return any(_depends_on(ledger, tracked, name) for name in suspects)


def _struck_out(ledger: Ledger, tracked: Tracked, node: str) -> bool:
    """Counts a failure that no worker is blamed for; true at the last one allowed at this place."""
    place = (node, tracked.steps_done)
    tracked.failures[place] = tracked.failures.get(place, 0) + 1
    return tracked.failures[place] >= ledger.settings.failures_max


def _hold(ledger: Ledger, progress: JobProgress, worker: str, *, exact: bool) -> None:
    tracked = ledger.tracked.get(progress.request)
    if tracked is None or not ledger.cluster.living(worker):
        return
    known = tracked.holders.get(worker, -1)
    tracked.holders[worker] = progress.steps_done if exact else max(known, progress.steps_done)
