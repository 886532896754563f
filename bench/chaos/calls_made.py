"""Which calls of requests were made, and which of them again: read off the steps that workers
recorded. Pure: spans in, values out.

A call is one step of one node of one request. It is made again where its artifact was lost. It is
*needless* to make it again where an earlier time of it had a member that lives on: that one holds
the artifact, or one behind it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hocket.tracing import spans as names
from hocket.tracing.span_file import SpanRecord


@dataclass(frozen=True)
class MadeCall:
    """One time that a step of a node was made."""

    request: str
    node: str
    step: int
    workers: tuple[str, ...]
    start_ns: int  # unix

    @property
    def call(self) -> tuple[str, str, int]:
        """What was made, whoever made it."""
        return self.request, self.node, self.step


def made_calls(spans: Iterable[SpanRecord], requests: Iterable[str] = ()) -> list[MadeCall]:
    """Every call of these requests (or of all), by start."""
    wanted = frozenset(requests)
    found = []
    for span in spans:
        request = str(span.attributes.get(names.REQUEST, ""))
        if span.name != names.STEP or (wanted and request not in wanted):
            continue
        members = span.attributes.get(names.WORKERS)
        found.append(
            MadeCall(
                request=request,
                node=str(span.attributes[names.NODE]),
                step=int(str(span.attributes[names.STEP_INDEX])),
                workers=tuple(map(str, members)) if isinstance(members, list) else (),
                start_ns=span.start_unix_ns,
            )
        )
    return sorted(found, key=lambda call: call.start_ns)


def by_node(calls: Iterable[MadeCall]) -> dict[str, int]:
    """How many calls each node had."""
    return dict(sorted(Counter(call.node for call in calls).items()))


def again(calls: Sequence[MadeCall]) -> list[MadeCall]:
    """Those that had been made before."""
    seen: set[tuple[str, str, int]] = set()
    found = []
    for call in calls:
        if call.call in seen:
            found.append(call)
        seen.add(call.call)
    return found


def needless(calls: Sequence[MadeCall], lost: str) -> list[MadeCall]:
    """Those made again though somebody beside the lost worker had made them."""
    makers: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    found = []
    for call in calls:
        if makers[call.call] - {lost}:
            found.append(call)
        makers[call.call].update(call.workers)
    return found
