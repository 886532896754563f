"""A job that failed goes elsewhere: not to workers it failed on since it last got on, as long as
others can serve it. Nor to those that are on trial: its failure there would say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..books.ledger import Ledger
from ..outlook.standing import next_node
from ..starts import Start

NOBODY: frozenset[str] = frozenset()


def barred(ledger: Ledger, request: str) -> frozenset[str]:
    """Workers that a request does not go to now."""
    failed_on = ledger.quarantine.failed_on(request)
    if not failed_on or request not in ledger.tracked:
        return NOBODY
    able = _able(ledger, request)
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
    if out and out.issuperset(_able(ledger, requests[0])):
        return NOBODY  # together they would have nowhere to go
    return out


def open_to(ledger: Ledger, request: str, names: Sequence[str], degree: int) -> Sequence[str]:
    """Those of some workers that a job may go to at that width: not those barred, if others can."""
    out = barred_of(ledger, (request,))
    if not out:
        return names
    left = [n for n in _able(ledger, request, degree) if n not in out]
    return names if len(left) < degree else [n for n in names if n not in out]


def degrees(ledger: Ledger, request: str, offered: tuple[int, ...]) -> tuple[int, ...]:
    """Widths that a job can run in without the workers that it does not go to."""
    out = barred_of(ledger, (request,))
    if not out:
        return offered
    able = _able(ledger, request)
    left = sum(name not in out for name in able)
    return tuple(d for d in offered if d <= left) or offered


def waiting(ledger: Ledger, requests: Iterable[str], idle: Sequence[str]) -> set[str]:
    """Requests that failed on all idle workers that could serve them, and wait for others."""
    found: set[str] = set()
    for request in requests if ledger.quarantine.any_failing else ():
        out = barred(ledger, request)
        able = _able(ledger, request)
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
        able = _able_for(ledger, start)
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
    able = {*other.workers}.issubset(_able_for(ledger, one)) and {*one.workers}.issubset(
        _able_for(ledger, other)
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


def fitting(ledger: Ledger, starts: Sequence[Start], idle: Sequence[str]) -> list[Start]:
    """The starts of one decision whose workers can run them. One that cannot goes, if it is a call
    of a single worker, to an idle one that can and that nobody else got; else it waits.
    """
    if not ledger.named and not ledger.cluster.partial:
        return list(starts)
    found: list[Start] = []
    unfit = [s for s in starts if not {*s.workers}.issubset(_able_for(ledger, s))]
    taken = {w for s in starts if s not in unfit for w in s.workers}
    for start in starts:
        if start in unfit:
            able = _able_for(ledger, start)
            spare = [w for w in idle if w in able and w not in taken]
            if len(start.workers) > 1 or not spare:
                continue
            start = _on(ledger, start, spare[:1])
            taken.update(start.workers)
        found.append(start)
    return found


def _able(ledger: Ledger, request: str, degree: int = 1) -> tuple[str, ...]:
    """Usable workers for what a request runs next."""
    tracked = ledger.tracked[request]
    node = next_node(ledger, tracked)
    wide = degree if node == tracked.stepped.node else 1
    return ledger.able_names(tracked.request, node, wide)


def _able_for(ledger: Ledger, start: Start) -> tuple[str, ...]:
    request = ledger.tracked[start.requests[0]].request
    return ledger.able_names(request, start.node, len(start.workers))
