"""What each fact changes in the ledger. Failures, the longest story, have their own module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .books import latents
from .books.board import Flight
from .books.ledger import Ledger
from .books.lifecycle import JobState, WorkerState
from .books.stragglers import own_excesses
from .books.tracker import Tracked
from .resilience import evacuation, failures
from .times.profile import CellKey
from .values import (
    Arrived,
    Assignment,
    AssignmentFailed,
    CancelRequested,
    DrainRequested,
    Ended,
    Event,
    JobProgress,
    Layout,
    Member,
    NothingHeard,
    Outcome,
    StepsEnded,
    WorkerLost,
    WorkerUp,
)
from .workflow import NodeKind

_KINDS: tuple[type[Event], ...] = (
    WorkerUp,
    WorkerLost,
    NothingHeard,
    DrainRequested,
    AssignmentFailed,
    StepsEnded,
    Arrived,
    CancelRequested,
)


def in_order(facts: Iterable[Event]) -> list[Event]:
    """The order in which facts are observed: by stamp, equal stamps by kind and subject.

    Who gathers facts of one instant from several sources (simulated or manual time makes such
    instants common) sorts them with this, so that all drivers agree.
    """
    return sorted(facts, key=_fact_order)


def _fact_order(fact: Event) -> tuple[int, int, int, str]:
    rank = _KINDS.index(type(fact))
    match fact:
        case Arrived():
            return (fact.at_us, rank, 0, fact.request.id)
        case CancelRequested():
            return (fact.at_us, rank, 0, fact.request)
        case StepsEnded():
            return (fact.at_us, rank, fact.sequence, _steps_told(fact))
        case AssignmentFailed():
            return (fact.at_us, rank, fact.sequence, fact.worker)
        case WorkerUp() | WorkerLost() | DrainRequested():
            return (fact.at_us, rank, 0, fact.worker)
        case NothingHeard():
            return (fact.at_us, rank, 0, "")


def _steps_told(fact: StepsEnded) -> str:
    return str(fact.jobs[0].steps_done if fact.jobs else 0).zfill(9)


def apply(ledger: Ledger, fact: Event) -> tuple[Ended, ...]:
    """Enters one fact; returns the requests that it ended."""
    ended = _enter(ledger, fact)
    settle(ledger, fact.at_us)
    return ended


def settle(ledger: Ledger, at_us: int) -> None:
    """Decides anew which workers get no work, where something speaks for it."""
    changed = ledger.quarantine.settle(ledger.cluster, ledger.board.flights, at_us)
    ledger.notices.extend(ledger.quarantine.notices)
    ledger.quarantine.notices.clear()
    if ledger.stragglers.settle(ledger.cluster, at_us) or changed:
        ledger.due = ledger.due or bool(ledger.tracked)


def _enter(ledger: Ledger, fact: Event) -> tuple[Ended, ...]:
    match fact:
        case Arrived():
            return _arrived(ledger, fact)
        case CancelRequested():
            tracked = ledger.tracked.get(fact.request)
            return () if tracked is None else (ledger.end(tracked, Outcome.CANCELLED, fact.at_us),)
        case WorkerUp():
            return _worker_up(ledger, fact)
        case WorkerLost():
            return failures.worker_lost(ledger, fact.worker, fact.at_us)
        case NothingHeard():
            ledger.overdue.deaf(fact.at_us)
            return ()
        case DrainRequested():
            return _drain(ledger, fact)
        case StepsEnded():
            return _steps_ended(ledger, fact)
        case AssignmentFailed():
            return failures.assignment_failed(ledger, fact)


def _arrived(ledger: Ledger, fact: Arrived) -> tuple[Ended, ...]:
    request = fact.request
    if request.id in ledger.tracked:
        return ()
    legs = ledger.enter(request)
    views = tuple([ledger.workflow(leg) for leg in legs])
    tracked = Tracked(request, ledger.arrivals, fact.at_us, fact.at_us, legs, views)
    if not tracked.workflow.plain:
        ledger.named[request.id] = None
    tracked.promised = request.firm and fact.on_time and request.deadline_us is not None
    ledger.tracked[request.id] = tracked
    ledger.arrivals += 1
    ledger.progress(request.id)
    ledger.touched[request.id] = None
    for worker in ledger.cluster.workers.values():
        if request.id in worker.unclaimed:
            held = worker.unclaimed.pop(request.id)
            latents.adopt(ledger, worker.name, held, fact.at_us, fresh=True)
    ledger.due = True
    return ()


def _worker_up(ledger: Ledger, fact: WorkerUp) -> tuple[Ended, ...]:
    known = ledger.cluster.workers.get(fact.worker)
    ended: tuple[Ended, ...] = ()
    restarted = known is not None and known.incarnation != fact.incarnation
    if known is not None and restarted and known.state is not WorkerState.LOST:
        ended = failures.worker_lost(ledger, fact.worker, fact.at_us)
    news = known is None or known.state is not WorkerState.UP
    fresh = known is None or restarted or known.state is WorkerState.LOST
    worker = ledger.cluster.lease(fact)
    if known is None or restarted:
        worker.freed_us = fact.at_us
        worker.drain(worker.name in ledger.drained)
        ledger.stragglers.forget(worker.name)
        ledger.quarantine.forget(worker.name)
    flights = ledger.board.flights.values()
    idle = all(fact.worker not in flight.assignment.workers for flight in flights)
    ledger.residency.told(worker, fact.weights, idle=idle)
    latents.adopt(ledger, fact.worker, fact.latents, fact.at_us, fresh=fresh)
    worker.unclaimed = {}
    for held in fact.latents:
        if held.request not in ledger.tracked:
            worker.unclaimed.setdefault(held.request, []).append(held)
    if fact.given_up:
        ledger.cluster.give_up(fact.given_up, {f.assignment.workers for f in flights})
    if known is None:
        ledger.forget_workers(fact.at_us)
    if evacuation.came(ledger, worker.name) or worker.leaving:
        ledger.due = ledger.due or evacuation.due(ledger)
    if news:
        for tracked in list(ledger.tracked.values()):
            latents.profit(ledger, tracked.id)
        ledger.due = ledger.due or bool(ledger.tracked)
    return ended


def _drain(ledger: Ledger, fact: DrainRequested) -> tuple[Ended, ...]:
    ledger.drain(fact.worker, fact.draining)
    if fact.worker in ledger.cluster.workers:
        again = not fact.draining and bool(ledger.tracked)
        ledger.due = ledger.due or again or evacuation.due(ledger)
    return ()


def _steps_ended(ledger: Ledger, fact: StepsEnded) -> tuple[Ended, ...]:
    flight = ledger.board.flights.get(fact.sequence)
    if flight is None:
        failures.late_report(ledger, fact)
        return ()
    assignment = flight.assignment
    told = {(p.request, p.attempt): p for p in fact.jobs}
    staying = [(m, told.get((m.request, m.attempt))) for m in assignment.batch]
    news = any(progress for _, progress in staying)
    if not news and not (fact.last and (flight.left or not fact.jobs)):
        failures.late_copies(ledger, assignment, flight.left, fact.jobs, fact.at_us)
        return ()
    once = flight.kind is NodeKind.ONCE
    over = fact.last or (once and all(progress for _, progress in staying))
    _learn(ledger, flight, fact, over)
    if flight.reported_us is None:
        ledger.moving.observe(fact)
    if over or not once:
        flight.reported_us = fact.at_us
        ledger.overdue.look_again((fact.sequence,))
        ledger.move(assignment.workers)
    ledger.cluster.formed(assignment.workers, assignment.epoch)
    if news:
        call = ledger.call(ledger.tracked[assignment.batch[0].request].request, assignment.node)
        ledger.quarantine.succeeded(assignment.workers, (call.model, call.op))
    if over:
        ledger.board.end(fact.sequence)
        requests = [m.request for m in assignment.batch]
        ledger.overdue.look_again(ledger.board.behind(assignment.workers, requests))
        for name in assignment.workers:
            worker = ledger.cluster.workers[name]
            worker.freed_us = max(worker.freed_us, fact.at_us)
    ended = _tell_jobs(ledger, flight, staying, fact, over)
    failures.late_copies(ledger, assignment, flight.left, fact.jobs, fact.at_us)
    return ended


def _tell_jobs(
    ledger: Ledger,
    flight: Flight,
    staying: list[tuple[Member, JobProgress | None]],
    fact: StepsEnded,
    over: bool,
) -> tuple[Ended, ...]:
    """What a report says of the jobs that are in the flight; an encode or decode may tell of some
    of them before the others.
    """
    assignment, once = flight.assignment, flight.kind is NodeKind.ONCE
    ended: list[Ended] = []
    steps_before = flight.steps_done
    for member, progress in staying:
        tracked = ledger.tracked[member.request]
        if progress is None:
            if over:  # what told of it got lost: nobody will say it again
                tracked.jobs[assignment.node].outstanding.remove(fact.sequence)
                latents.restart(ledger, tracked, fact.at_us)
            continue
        if not once and tracked.stepped.node == assignment.node:
            steps = min(progress.steps_done - member.first_step, assignment.steps)
            flight.steps_done = max(flight.steps_done, steps)
            if steps > steps_before:
                rank = tracked.workflow.rank[assignment.node]
                tracked.advance(member.first_step + steps, assignment.workers, fact.at_us)
                ledger.quarantine.got_on(tracked.id, (rank, tracked.steps_done))
                ledger.progress(tracked.id)
        if over:
            ended += _job_over(ledger, tracked, flight, fact.at_us)
        elif once:
            flight.part(member.request)
            ended += _job_over(ledger, tracked, flight, fact.at_us)
    return tuple(ended)


def _learn(ledger: Ledger, flight: Flight, fact: StepsEnded, over: bool) -> None:
    """Refines the latency model and the workers' records.

    A mixed group teaches nothing about either kind, one with a slow worker nothing about its cell,
    and a batch that some have left nothing about its size.
    """
    assignment = flight.assignment
    gpus = ledger.gpus(assignment.workers)
    tracked = ledger.tracked.get(assignment.batch[0].request)
    if len(gpus) != 1 or tracked is None or flight.left:
        return
    times_us = fact.step_time_us
    if flight.kind is NodeKind.ONCE:  # one call, however many reports tell of it
        flight.spent_us += sum(times_us)
        times_us = (flight.spent_us,) if over and flight.spent_us else ()
    call = ledger.call(tracked.request, assignment.node)
    # Times are kept by degree: a request is split in one way at each.
    layout = Layout(ulysses=assignment.layout.degree)
    key = CellKey(call.model, gpus[0], call.op, call.shape, layout, flight.size)
    latency, stragglers, group = ledger.latency, ledger.stragglers, assignment.workers
    compared = not any(ledger.cluster.workers[name].shares_cores for name in group)
    for step_us, own_us in zip(times_us, _own_times(fact, times_us, len(group)), strict=True):
        sample = latency.judge(key, step_us, group) if compared else None
        excesses = own_excesses(own_us, latency.spread(key)) if compared else ()
        for news in stragglers.observe(group, sample, fact.at_us, excesses):
            ledger.notices.append(news)
            if news.factor > 1.0:
                latency.disown(news.worker)
        for name in group:
            ledger.cluster.workers[name].suspected = stragglers.suspects(name)
        shift = latency.observe(key, step_us, group) if stragglers.factor(group) == 1.0 else None
        if shift is not None:
            stragglers.forgive()
            ledger.notices.append(shift)


def _own_times(fact: StepsEnded, times_us: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    """How much of each of these steps was each member's own; empty where that is not known."""
    known = len(fact.member_time_us) == size * len(times_us)
    for step in range(len(times_us)):
        yield fact.member_time_us[step * size : (step + 1) * size] if known else ()


def _job_over(ledger: Ledger, tracked: Tracked, flight: Flight, at_us: int) -> tuple[Ended, ...]:
    """The last report of one of a request's assignments."""
    assignment = flight.assignment
    job = tracked.jobs[assignment.node]
    job.outstanding.remove(assignment.sequence)
    for other in tracked.jobs.values():
        for sequence in other.outstanding:
            ledger.board.flights[sequence].behind_us = at_us
    ledger.touched[tracked.id] = None
    if flight.kind is NodeKind.ONCE:
        return _call_over(ledger, tracked, assignment, at_us)
    if flight.steps_left:  # ended early: what follows it starts from a step that nobody reached
        latents.restart(ledger, tracked, at_us)
    elif tracked.steps_done >= tracked.request.steps:
        if job is tracked.last:
            job.move(JobState.DONE)
            return (ledger.end(tracked, Outcome.DONE, at_us),)
        tracked.pass_over()
        ledger.due = True
        if not tracked.workflow.plain:
            ledger.progress(tracked.id)
            if tracked.lacks:
                ledger.fall_back(tracked, parked=True)
    elif not job.outstanding:
        job.move(JobState.READY)
        ledger.due = ledger.due or ledger.eager
    return ()


def _call_over(
    ledger: Ledger, tracked: Tracked, assignment: Assignment, at_us: int
) -> tuple[Ended, ...]:
    """A node that is called once was."""
    node, workflow = assignment.node, tracked.workflow
    ledger.due = ledger.due or ledger.stages_wait
    ledger.quarantine.got_on(tracked.id, (workflow.rank[node], tracked.request.steps + 1))
    if node == workflow.last:
        tracked.last.move(JobState.DONE)
        return (ledger.end(tracked, Outcome.DONE, at_us),)
    released = tracked.called(node, assignment.workers, at_us)
    if tracked.lacks and not workflow.plain:  # something was lost meanwhile
        ledger.fall_back(tracked, parked=not tracked.outstanding)
    calls = any(workflow.node[n].kind is NodeKind.ONCE for n in released)
    idle = not ledger.board.denoising()
    ledger.due = ledger.due or ledger.eager or idle or calls
    return ()
