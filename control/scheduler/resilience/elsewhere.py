"""A job that failed goes elsewhere: not to workers it failed on since it last got on, as long as
others can serve it. Nor to those that are on trial: its failure there would say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..books.ledger import Ledger
from ..starts import Start

NOBODY: frozenset[str] = frozenset()


def barred(ledger: Ledger, request: str) -> frozenset[str]:
    """Workers that a request does not go to now."""
    failed_on = ledger.quarantine.failed_on(request)
    if not failed_on or request not in ledger.tracked:
        return NOBODY
    model = _model(ledger, request)
    able = ledger.cluster.able_names(model)
    failed = frozenset(failed_on)
    for names in (failed.union(ledger.quarantine.on_trial()), failed):
        if not names.issuperset(able):
            return names
    return NOBODY


def barred_of(ledger: Ledger, requests: Sequence[str]) -> frozenset[str]:
    """The same of a batch."""
    if not ledger.quarantine.any_failing:
        return NOBODY
    out = NOBODY.union(*(barred(ledger, request) for request in requests))
    if out and out.issuperset(ledger.cluster.able_names(_model(ledger, requests[0]))):
        return NOBODY  # together they would have nowhere to go
    return out


def open_to(ledger: Ledger, request: str, names: Sequence[str], degree: int) -> Sequence[str]:
    """Those of some workers that a job may go to at that width: not those barred, if others can."""
    out = barred_of(ledger, (request,))
    if not out:
        return names
    model = _model(ledger, request)
    left = [n for n in ledger.cluster.able_names(model, degree) if n not in out]
    return names if len(left) < degree else [n for n in names if n not in out]


def degrees(ledger: Ledger, request: str, offered: tuple[int, ...]) -> tuple[int, ...]:
    """Widths that a job can run in without the workers that it does not go to."""
    out = barred_of(ledger, (request,))
    if not out:
        return offered
    able = ledger.cluster.able_names(_model(ledger, request))
    left = sum(name not in out for name in able)
    return tuple(d for d in offered if d <= left) or offered


def waiting(ledger: Ledger, requests: Iterable[str], idle: Sequence[str]) -> set[str]:
    """Requests that failed on all idle workers that could serve them, and wait for others."""
    found: set[str] = set()
    for request in requests if ledger.quarantine.any_failing else ():
        out = barred(ledger, request)
        able = ledger.cluster.able_names(_model(ledger, request))
        if out and not any(w in able and w not in out for w in idle):
            found.add(request)
    return found


def moved(ledger: Ledger, starts: Sequence[Start], idle: Sequence[str]) -> list[Start]:
    """The starts of one decision, so that nobody goes where it is barred: it takes idle workers
    that nobody else got, or changes places, or runs narrower, or waits.
    """
    found = list(starts)
    if not ledger.quarantine.any_failing:
        return found
    out = [barred_of(ledger, start.requests) for start in found]
    waits: set[int] = set()
    for i, start in enumerate(found):
        if out[i].isdisjoint(start.workers):
            continue
        taken = {w for j, s in enumerate(found) if j != i and j not in waits for w in s.workers}
        model = _model(ledger, start.requests[0])
        able = ledger.cluster.able_names(model, len(start.workers))
        spare = [w for w in idle if w in able and w not in taken and w not in out[i]]
        kept = [w for w in start.workers if w not in out[i]]
        spare = [*kept, *(w for w in spare if w not in kept)]
        other = next(
            (
                j
                for j in range(len(found))
                if j not in waits and _may_swap(ledger, found, out, i, j)
            ),
            None,
        )
        if len(spare) >= len(start.workers):
            found[i] = _on(ledger, start, spare[: len(start.workers)])
        elif other is not None:
            found[i] = replace(start, workers=found[other].workers)
            found[other] = replace(found[other], workers=start.workers)
        else:
            narrower = _narrower(ledger, start, spare)
            if narrower is None:
                waits.add(i)
            else:
                found[i] = narrower
    return [start for i, start in enumerate(found) if i not in waits]


def _may_swap(
    ledger: Ledger, starts: Sequence[Start], out: Sequence[frozenset[str]], i: int, j: int
) -> bool:
    one, other = starts[i], starts[j]
    if i == j or len(one.workers) != len(other.workers):
        return False
    models = [_model(ledger, s.requests[0]) for s in (one, other)]
    workers, width = ledger.cluster.workers, len(one.workers)
    able = all(
        workers[w].can(model, width)
        for model, names in ((models[0], other.workers), (models[1], one.workers))
        for w in names
    )
    return able and out[i].isdisjoint(other.workers) and out[j].isdisjoint(one.workers)


def _narrower(ledger: Ledger, start: Start, spare: Sequence[str]) -> Start | None:
    tracked = ledger.tracked[start.requests[0]]
    if start.node != tracked.stepped.node:
        return None
    request = tracked.request
    for degree in sorted(ledger.degrees(request), reverse=True):
        able = ledger.cluster.able_names(request.model, degree)
        fitting = [w for w in spare if w in able]
        if degree < len(start.workers) and degree <= len(fitting):
            return _on(ledger, start, fitting[:degree])
    return None


def _on(ledger: Ledger, start: Start, workers: Sequence[str]) -> Start:
    return replace(start, workers=ledger.cluster.canonical(workers))


def _model(ledger: Ledger, request: str) -> str:
    return ledger.tracked[request].request.model
