"""Who was interrupted when, and for whom: read off the steps that workers recorded.

    video  ████████░░░░░░░░████████      a pause: longer than one of its own steps
    apple          ████████              ran on its workers meanwhile: overtook it

A *stretch* is a run of one request's steps on the same workers without a pause. Between two
stretches of one request something happened to it: it was paused, or it changed workers or degree.
Pure: spans in, values out. A pause that is due to a lost worker looks like any other here; the
trace of the request says which it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from hocket.tracing import spans as names
from hocket.tracing.span_file import SpanRecord

DENOISER = "dit"  # of a plain chain
DENOISERS = (DENOISER, "denoise")  # operations that have steps


class Stretch(NamedTuple):
    """Steps of one request, one after the other on the same workers. Times: unix nanoseconds."""

    request: str
    node: str
    operation: str  # what the node does
    workers: tuple[str, ...]  # first member first
    first_step: int  # 1-based
    last_step: int
    start_ns: int
    end_ns: int

    @property
    def step_ns(self) -> float:
        """Mean time of a step, what lay between steps included."""
        return (self.end_ns - self.start_ns) / (self.last_step - self.first_step + 1)


class InterruptionKind(StrEnum):
    """What happened between two stretches of a request."""

    PAUSED = "paused"
    NARROWED = "narrowed"
    WIDENED = "widened"
    MOVED = "moved"


class Interruption(NamedTuple):
    """A request between two of its stretches."""

    kind: InterruptionKind
    before: Stretch
    after: Stretch
    overtakers: tuple[str, ...]  # requests that ran on its workers in a pause, or took them over

    @property
    def request(self) -> str:
        return self.before.request

    @property
    def gap_ns(self) -> int:
        return self.after.start_ns - self.before.end_ns


def stretches(spans: Iterable[SpanRecord]) -> list[Stretch]:
    """All stretches of all requests and nodes, by start."""
    steps = sorted(
        (step for span in spans if (step := _step(span)) is not None),
        key=lambda step: (step.request, step.start_ns, step.node),
    )
    found: list[Stretch] = []
    for step in steps:
        last = found[-1] if found else None
        if last is not None and _goes_on(last, step):
            found[-1] = last._replace(last_step=step.last_step, end_ns=step.end_ns)
        else:
            found.append(step)
    return sorted(found, key=lambda s: (s.start_ns, s.request))


def interruptions(found: Sequence[Stretch]) -> list[Interruption]:
    """What happened to every request between two stretches of its denoising, by time."""
    by_node: dict[tuple[str, str], list[Stretch]] = {}
    for stretch in found:
        if stretch.operation in DENOISERS:
            by_node.setdefault((stretch.request, stretch.node), []).append(stretch)
    told = [
        Interruption(_kind(before, after), before, after, _overtakers(before, after, found))
        for own in by_node.values()
        for before, after in pairwise(own)
        if after.first_step > before.first_step  # else a worker was lost, and steps are repeated
    ]
    return sorted(told, key=lambda i: i.before.end_ns)


def _step(span: SpanRecord) -> Stretch | None:
    seen = span.attributes
    if span.name != names.STEP or names.NODE not in seen:
        return None
    members = seen.get(names.WORKERS)
    workers = tuple(str(m) for m in members) if isinstance(members, list) else ()
    number, node = int(str(seen.get(names.STEP_INDEX, 1))), str(seen[names.NODE])
    return Stretch(
        request=str(seen.get(names.REQUEST, "")),
        node=node,
        operation=str(seen.get(names.OPERATION, node)),
        workers=workers or (str(seen.get(names.WORKER, span.instance)),),
        first_step=number,
        last_step=number,
        start_ns=span.start_unix_ns,
        end_ns=span.end_unix_ns,
    )


def _goes_on(last: Stretch, step: Stretch) -> bool:
    same = last.request == step.request and last.node == step.node
    if not same or set(last.workers) != set(step.workers) or step.first_step != last.last_step + 1:
        return False
    return step.start_ns - last.end_ns <= max(last.step_ns, step.step_ns)


def _kind(before: Stretch, after: Stretch) -> InterruptionKind:
    if after.start_ns - before.end_ns > max(before.step_ns, after.step_ns):
        return InterruptionKind.PAUSED
    if len(after.workers) != len(before.workers):
        return (
            InterruptionKind.NARROWED
            if len(after.workers) < len(before.workers)
            else InterruptionKind.WIDENED
        )
    return InterruptionKind.MOVED


def _overtakers(before: Stretch, after: Stretch, found: Sequence[Stretch]) -> tuple[str, ...]:
    """Requests that began on workers it had left, before it went on or soon after."""
    left = set(before.workers)
    if _kind(before, after) is not InterruptionKind.PAUSED:
        left -= set(after.workers)
    until_ns = max(after.start_ns, before.end_ns + int(after.step_ns))
    others = [
        other.request
        for other in found
        if other.request != before.request
        and left.intersection(other.workers)
        and before.end_ns - int(before.step_ns) <= other.start_ns < until_ns
    ]
    return tuple(dict.fromkeys(others))
