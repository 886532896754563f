"""What a lost worker or a failed assignment costs: the steps since the last surviving latent.

Whatever goes wrong, the answer is one: call off everything outstanding of the requests concerned,
count a new attempt, and go on from the furthest latent that a living worker still holds, or from
the encode. Reports of called-off work that come in late may at most tell of latents that nobody had
counted on.

Whose fault was it? A job that ran alone, or that the report names, gets a strike; those in a batch
with it get none. Of a batch whose failure names nobody, all go on one by one at that node, where
the culprit will be found; a batch that was too large for the memory goes on in halves. The worker
that gave up, or those that it accuses, get strikes as well (resilience/quarantine.py), and the job
goes elsewhere first; a job's strikes on workers that turn out bad do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..books import latents
from ..books.latents import restart
from ..books.ledger import Ledger
from ..books.lifecycle import WorkerState
from ..books.overdue import HUNG
from ..books.quarantine import place
from ..books.tracker import Tracked
from ..values import (
    Assignment,
    AssignmentFailed,
    Ended,
    JobProgress,
    Member,
    Outcome,
    StepsEnded,
)

# The reporter asked the named holders in vain: they do not have what we believed they had.
LATENT_MISSING = "LATENT_MISSING"
GROUP_LOST = "GROUP_LOST"  # a member of the group, or its connection: no job's fault
# A member had given up the communicator of that name: the group is formed anew. Nobody's fault.
GROUP_SPENT = "GROUP_SPENT"
OUT_OF_MEMORY = "OUT_OF_MEMORY"
# A message was lost on its way (the broker restarted, say): nobody's fault, and no strike, unless
# it is always this one that gets lost.
MESSAGE_LOST = "MESSAGE_LOST"
MESSAGES_LOST_MAX = 20  # in a row at one place
BLAMED_FACTOR = 4  # failures that a worker is blamed for end a request at this many failures_max
# A file that the request brought did not come in time; the store has not said that it is gone.
INPUT_AWAY = "INPUT_AWAY"
NOBODYS = (MESSAGE_LOST, GROUP_SPENT, INPUT_AWAY)
INPUT_MISSING = "INPUT_MISSING"  # a file that the request brought is gone
CALL_REFUSED = "CALL_REFUSED"  # the request asks for what cannot be done
HOPELESS = (INPUT_MISSING, CALL_REFUSED)  # the same wherever it is tried: the request ends
# Reasons that say nothing of the worker that reports them.
NOT_THE_REPORTER = (*NOBODYS, GROUP_LOST, LATENT_MISSING, OUT_OF_MEMORY, *HOPELESS)


def worker_lost(ledger: Ledger, name: str, at_us: int) -> tuple[Ended, ...]:
    """A lease ended or a worker restarted: what it ran stops, what it held is gone."""
    worker = ledger.cluster.workers.get(name)
    if worker is None or worker.state is WorkerState.LOST:
        return ()
    worker.move(WorkerState.LOST)
    worker.lost_us = at_us
    ledger.cluster.raise_epochs((name,))
    for tracked in list(ledger.tracked.values()):
        held = tracked.lose(name)
        if _depends_on(ledger, tracked, name):
            restart(ledger, tracked, at_us)
        elif held and not (tracked.outstanding and tracked.workflow.plain):
            ledger.fall_back(tracked, parked=not tracked.outstanding)
    ledger.due = True
    return ()


def assignment_failed(ledger: Ledger, fact: AssignmentFailed) -> tuple[Ended, ...]:
    """A member gave up; only the first report of an assignment restarts its requests."""
    flight = ledger.board.flights.get(fact.sequence)
    assignment = flight.assignment if flight else ledger.board.retired.get(fact.sequence)
    if assignment is None or fact.worker not in assignment.workers:
        return ()
    if fact.reason != HUNG:
        ledger.cluster.workers[fact.worker].revive(fact.sequence)
    requests = {m.request for m in (*assignment.batch, *(flight.left if flight else ()))}
    copies = [p for p in fact.jobs if p.request in requests]
    for progress in copies:
        # What a worker says of its own copy is exact.
        node = _latents_of(ledger, progress.request, assignment.node)
        if node is not None:
            done = progress.steps_done
            latents.hold(ledger, progress.request, fact.worker, done, node, exact=True)
    if flight is None:
        for progress in copies:
            latents.profit(ledger, progress.request)
        return ()
    _blame(ledger, assignment, fact)
    if fact.goes_on:
        return _one_failed(ledger, assignment, fact, copies)
    for name in fact.suspects:
        worker = ledger.cluster.workers.get(name)
        if worker is not None and worker.state is WorkerState.UP:
            worker.move(WorkerState.SUSPECT)
        if worker is not None and fact.reason == HUNG:
            worker.hang(fact.sequence)
    if fact.reason != LATENT_MISSING:  # nothing broke: the group stands
        ledger.cluster.raise_epochs(fact.suspects, assignment.workers)
    concerned = [
        t for t in ledger.tracked.values() if _concerned(ledger, t, assignment, fact.suspects)
    ]
    together = fact.batch or flight.size
    elsewhere = (
        fact.reason == OUT_OF_MEMORY and not fact.request and _overrun(ledger, assignment, together)
    )
    ended: list[Ended] = []
    for tracked in concerned:
        member = next((m for m in assignment.batch if m.request == tracked.id), None)
        if member is None or elsewhere:
            restart(ledger, tracked, fact.at_us)
        elif fact.request == tracked.id or (together == 1 and not fact.request):
            ended += _own_failure(ledger, tracked, member, assignment.node, fact, copies)
        elif fact.suspects or fact.reason in (GROUP_LOST, *NOBODYS):
            ended += _strike(ledger, tracked, assignment.node, fact)
        else:
            if not fact.request:
                tracked.alone = assignment.node
            restart(ledger, tracked, fact.at_us)
    ledger.due = True
    return tuple(ended)


def overdue(ledger: Ledger, now_us: int) -> tuple[Ended, ...]:
    """Assignments that nobody has heard of for too long: as if their workers had accused each
    other.
    """
    ended: list[Ended] = []
    while (flight := ledger.overdue.find(ledger.board, ledger.cluster, now_us)) is not None:
        a = flight.assignment
        fact = AssignmentFailed(
            at_us=now_us,
            sequence=a.sequence,
            worker=a.workers[0],
            jobs=(),
            reason=HUNG,
            suspects=a.workers,
        )
        ended += assignment_failed(ledger, fact)
    return tuple(ended)


def late_report(ledger: Ledger, fact: StepsEnded) -> None:
    """Steps of called-off work that ended after all: their latents count if they come in time."""
    assignment = ledger.board.retired.get(fact.sequence)
    if assignment is not None:
        _not_hung(ledger, assignment)
        late_copies(ledger, assignment, assignment.batch, fact.jobs, fact.at_us)


def _not_hung(ledger: Ledger, assignment: Assignment) -> None:
    """It was taken for hung, and goes on: a call of its kind takes longer than was thought."""
    workers = [ledger.cluster.workers.get(name) for name in assignment.workers]
    hung = [w for w in workers if w is not None and assignment.sequence in w.hung]
    for worker in hung:
        worker.revive(assignment.sequence)
    tracked = next((t for m in assignment.batch if (t := ledger.tracked.get(m.request))), None)
    if hung and tracked is not None:
        ledger.overdue.mistaken(assignment, tracked.request.model)
        ledger.due = True


def _blame(ledger: Ledger, assignment: Assignment, fact: AssignmentFailed) -> None:
    """Strikes for those who may have been at fault; the jobs go elsewhere first."""
    blamed = _blamed(assignment, fact)
    named = [m for m in assignment.batch if m.request == fact.request]
    members = [m for m in named or assignment.batch if m.request in ledger.tracked]
    for i, member in enumerate(members):
        tracked = ledger.tracked[member.request]
        at = place(tracked.workflow, assignment.node, tracked.steps_done)
        part = _part(ledger, tracked, assignment.node)
        for name in blamed:
            if i == 0:  # one failure, one strike
                others = len(blamed) > 1
                ledger.quarantine.strike(name, part, member.request, at, fact.at_us, others)
            else:
                ledger.quarantine.shun(name, member.request, at)
    if blamed and members:
        ledger.quarantine.settle(ledger.cluster, ledger.board.flights, fact.at_us)


def _blamed(assignment: Assignment, fact: AssignmentFailed) -> tuple[str, ...]:
    """Workers that a failure speaks against."""
    if fact.suspects:
        return tuple(name for name in fact.suspects if name in assignment.workers)
    return () if fact.reason in NOT_THE_REPORTER else (fact.worker,)


def late_copies(
    ledger: Ledger,
    assignment: Assignment,
    members: Sequence[Member],
    jobs: tuple[JobProgress, ...],
    at_us: int,
) -> None:
    """What a report tells of jobs that their assignment no longer counts on."""
    known = {(m.request, m.attempt) for m in members}
    for progress in jobs:
        if (progress.request, progress.attempt) in known:
            latents.hold_late(ledger, progress, assignment.node, assignment.workers, at_us)


def _latents_of(ledger: Ledger, request: str, node: str) -> str | None:
    """Stepped node whose latents workers have at the end of a node; None: of none."""
    tracked = ledger.tracked.get(request)
    if tracked is None:
        return None
    if node in tracked.marks:
        return node
    return tracked.stepped.node if node in tracked.workflow.leave_latents else None


def _one_failed(
    ledger: Ledger,
    assignment: Assignment,
    fact: AssignmentFailed,
    copies: list[JobProgress],
) -> tuple[Ended, ...]:
    """One job of a batch was given up; the others go on, and get no strike."""
    tracked = ledger.tracked.get(fact.request)
    member = next((m for m in assignment.batch if m.request == fact.request), None)
    if tracked is None or member is None:
        return ()
    ledger.due = True
    return _own_failure(ledger, tracked, member, assignment.node, fact, copies)


def _own_failure(
    ledger: Ledger,
    tracked: Tracked,
    member: Member,
    node: str,
    fact: AssignmentFailed,
    copies: list[JobProgress],
) -> tuple[Ended, ...]:
    """It was this very job that failed."""
    if fact.reason == LATENT_MISSING:
        held = any(p.request == tracked.id for p in copies)
        own = _latents_of(ledger, tracked.id, node)  # what the reporter has told of its copies
        for name in (*(fact.tried or [h.worker for h in member.holders]), fact.worker):
            if not tracked.workflow.plain:
                wanted = [i for i in member.inputs if fact.artifact in ("", i.artifact)]
                if name == fact.worker and held:
                    wanted = [i for i in wanted if tracked.workflow.maker[i.artifact] != own]
                tracked.lose_inputs(name, wanted)
            elif name == fact.worker and held:
                continue
            elif tracked.holders.get(name, -1) >= member.first_step:  # not: still on its way
                tracked.lose(name)
    if fact.reason in HOPELESS:
        return (ledger.end(tracked, Outcome.FAILED, fact.at_us, fact.reason),)
    return _strike(ledger, tracked, node, fact)


def _strike(
    ledger: Ledger, tracked: Tracked, node: str, fact: AssignmentFailed
) -> tuple[Ended, ...]:
    if _struck_out(ledger, tracked, node, fact):
        return (ledger.end(tracked, Outcome.FAILED, fact.at_us, fact.reason),)
    restart(ledger, tracked, fact.at_us)
    return ()


def _overrun(ledger: Ledger, assignment: Assignment, together: int) -> bool:
    """So many jobs do not fit there: planners ask for fewer from now on, or for a wider group or
    another kind of workers. Whether that is news, and leaves them a choice.
    """
    tracked = ledger.tracked.get(assignment.batch[0].request)
    if tracked is None:
        return False
    request, gpus = tracked.request, ledger.gpus(assignment.workers)
    degree = len(assignment.workers)
    call = ledger.call(request, assignment.node)
    news = ledger.memory.overrun(call, gpus, degree, together)
    return news and (
        together > 1 or (assignment.node == tracked.stepped.node and ledger.may_fit(request))
    )


def _depends_on(ledger: Ledger, tracked: Tracked, name: str) -> bool:
    """Something outstanding runs on the worker, or has yet to fetch its latent from it alone."""
    for sequence in tracked.outstanding:
        flight = ledger.board.flights[sequence]
        if name in flight.assignment.workers:
            return True
        waits = flight.reported_us is None
        for sources in _sources(flight.assignment, tracked.id) if waits else ():
            if name in sources and not any(ledger.cluster.living(s) for s in sources):
                return True
    return False


def _sources(assignment: Assignment, request: str) -> list[tuple[str, ...]]:
    """Of each thing that a job of it takes: the workers that have it."""
    (member,) = [m for m in assignment.batch if m.request == request]
    if member.inputs:
        return [one.holders for one in member.inputs]
    return [tuple([h.worker for h in member.holders])]


def _part(ledger: Ledger, tracked: Tracked, node: str) -> tuple[str, str]:
    call = ledger.call(tracked.request, node)
    return call.model, call.op


def _concerned(
    ledger: Ledger, tracked: Tracked, failed: Assignment, suspects: tuple[str, ...]
) -> bool:
    """It ran there, waits for the same communicator, or needs one of the suspects."""
    for sequence in tracked.outstanding:
        same_group = ledger.board.flights[sequence].assignment.workers == failed.workers
        if sequence == failed.sequence or (same_group and len(failed.workers) > 1):
            return True
    return any(_depends_on(ledger, tracked, name) for name in suspects)


def _struck_out(ledger: Ledger, tracked: Tracked, node: str, fact: AssignmentFailed) -> bool:
    """Counts a failure by whose fault it was; true at the last one allowed at this place. Those
    on workers that are kept out count for a blamed worker's, no more for the job's own.
    """
    blamed_max = ledger.settings.failures_max * BLAMED_FACTOR
    limits = {
        "message": MESSAGES_LOST_MAX,
        "worker": blamed_max,
        "own": ledger.settings.failures_max,
    }
    kind = "worker" if fact.suspects else "own"
    if fact.reason in (*NOBODYS, LATENT_MISSING):  # of the latter, a holder's, or its connection's
        kind = "message"
    else:
        tracked.failures.pop((node, tracked.steps_done, "message"), None)
    failed = tracked.failures.setdefault((node, tracked.steps_done, kind), [])
    failed.append(() if fact.reason in NOT_THE_REPORTER else fact.suspects or (fact.worker,))
    forgiven = sum(bool(b) and all(map(ledger.quarantine.bad, b)) for b in failed)
    if len(failed) >= max(limits[kind], blamed_max):
        return True
    part, able = _part(ledger, tracked, node), ledger.able_names(tracked.request, node)
    return len(failed) - forgiven >= limits[kind] and (
        kind != "own" or ledger.quarantine.may_end(tracked.id, part, able)
    )
