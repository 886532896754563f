"""What must hold when a run is over. Each check gives the violations that it found, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bench.chaos import wishes
from bench.chaos.history import CANCELLED, FAILED, FINISHED, GIVEN_UP, QUIT, History, ObservedCall

OPEN = "open"


@dataclass(frozen=True)
class Written:
    """What the cluster has written down about one request."""

    request_id: str
    state: str  # OPEN, FINISHED, CANCELLED or FAILED
    key: str = ""
    endings: int = 1  # how often it was ended; 0 while it is open


@dataclass
class Leftovers:
    """What was there before the load and after it, by name."""

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    growth_max: dict[str, float] = field(default_factory=dict)  # allowed, by name; absent: 0


def all_checks(history: History, written: Iterable[Written], leftovers: Leftovers) -> list[str]:
    """Every violation."""
    known = list(written)
    found = [v for observed in history.calls.values() for v in told_well(observed)]
    found += accepted_is_ended(history, known)
    found += nothing_for_nobody(history, known)
    found += nothing_left(leftovers)
    return found


def told_well(observed: ObservedCall) -> list[str]:
    """One call's view: one request, one end, and the right file."""
    name = f"{observed.behaviour} {observed.key}"
    found = []
    if len(observed.ids) > 1 and observed.behaviour != wishes.CANCELLER:
        found.append(f"{name}: doubled, one key had the requests {', '.join(observed.ids)}")
    if not observed.ended:
        found.append(f"{name}: lost, it never ended")
    if observed.ended == GIVEN_UP:
        found.append(f"{name}: lost, its caller gave up waiting: {observed.problem}")
    if observed.ended == FAILED:
        found.append(f"{name}: failed: {observed.problem}")
    if observed.ended == CANCELLED and observed.behaviour not in (wishes.CANCELLER, wishes.QUITTER):
        found.append(f"{name}: cancelled, and nobody had asked for it")
    if observed.finishes > 1:
        found.append(f"{name}: told {observed.finishes} times that it has finished")
    if observed.ended == FINISHED and observed.picture not in ("equal", "within a level"):
        found.append(f"{name}: its file is {observed.picture or 'missing'}")
    return found


def accepted_is_ended(history: History, written: list[Written]) -> list[str]:
    """What was accepted is written down, and has ended, once."""
    found = []
    records = {one.request_id: one for one in written}
    for observed in history.calls.values():
        for request_id in observed.ids:
            if request_id not in records:
                found.append(f"{observed.key}: accepted as {request_id}, written down nowhere")
            elif request_id != observed.ids[-1] and observed.behaviour == wishes.CANCELLER:
                continue  # asked again by its key, behind a cancel that took effect unheard
            elif observed.ended == FINISHED and records[request_id].state != FINISHED:
                state = records[request_id].state
                found.append(f"{observed.key}: finished for its caller, written down as {state}")
    found += [f"{one.request_id}: still open" for one in written if one.state == OPEN]
    found += [
        f"{one.request_id}: ended {one.endings} times"
        for one in written
        if one.state != OPEN and one.endings != 1
    ]
    return found


def nothing_for_nobody(history: History, written: list[Written]) -> list[str]:
    """No request that no caller knows has run to its end; no key has two requests.

    A key whose request its caller cancelled makes another one when it is used again. A caller that
    left before it heard `accepted` may come back within the grace, and the requests here are
    shorter than that: those are known by their key.
    """
    seen = {request_id for observed in history.calls.values() for request_id in observed.ids}
    left = {s.key for s in history.calls.values() if s.ended in (QUIT, GIVEN_UP) and not s.ids}
    found = [
        f"{one.request_id}: made for nobody (key {one.key or 'unknown'})"
        for one in written
        if one.state == FINISHED and one.request_id not in seen and one.key not in left
    ]
    cancelling = {s.key for s in history.calls.values() if s.behaviour == wishes.CANCELLER}
    keys = Counter(
        one.key
        for one in written
        if one.key and not (one.state == CANCELLED and one.key in cancelling)
    )
    return found + [f"{key}: {count} requests" for key, count in keys.items() if count > 1]


def nothing_left(leftovers: Leftovers) -> list[str]:
    """What is counted has come back to what it was, or grew by no more than is allowed."""
    found = []
    for name, after in leftovers.after.items():
        before = leftovers.before.get(name, 0)
        most = before + leftovers.growth_max.get(name, 0)
        if after > most:
            found.append(f"left over: {name} {before:g} before, {after:g} after (at most {most:g})")
    return found


def ends(history: History) -> Mapping[str, int]:
    """Calls by behaviour and end."""
    calls = history.calls.values()
    return dict(sorted(Counter(f"{s.behaviour}: {s.ended or 'open'}" for s in calls).items()))
