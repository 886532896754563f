"""Traces of requests: the frozen JSONL format (DESIGN.md section 10), read, written and checked.

One object a line with exactly the fields of `TraceRequest`; times are microseconds from the trace's
start.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from control.scheduler.values import Request, Shape


class TraceError(ValueError):
    """A line is not as the format says; `line` counts from 1."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"trace line {line}: {problem}")
        self.line = line
        self.problem = problem


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a trace; field order is the order in which it is written."""

    id: str
    arrival_us: int
    model: str
    workflow: str
    width: int
    height: int
    frames: int
    steps: int
    slo_us: int
    priority: int

    def to_request(self, start_us: int = 0) -> Request:
        """As the scheduler takes it, with the trace's start at `start_us`."""
        return Request(
            id=self.id,
            model=self.model,
            shape=Shape(width=self.width, height=self.height, frames=self.frames),
            steps=self.steps,
            deadline_us=start_us + self.arrival_us + self.slo_us,
            priority=self.priority,
        )


def read_trace(text: str) -> tuple[TraceRequest, ...]:
    """Reads and checks a trace. Raises: TraceError with the line's number."""
    requests: list[TraceRequest] = []
    seen: set[str] = set()
    decoder = msgspec.json.Decoder(TraceRequest)
    for line, row in enumerate(text.splitlines(), start=1):
        if not row.strip():
            continue
        try:
            request = decoder.decode(row)
        except msgspec.DecodeError as error:
            raise TraceError(line, str(error)) from None
        _check(line, request)
        if request.id in seen:
            raise TraceError(line, f"id {request.id} is repeated")
        seen.add(request.id)
        requests.append(request)
    return tuple(requests)


def write_trace(requests: Iterable[TraceRequest]) -> str:
    """The trace as text, one compact object a line."""
    return "".join(msgspec.json.encode(r).decode() + "\n" for r in requests)


def _check(line: int, request: TraceRequest) -> None:
    for name in ("id", "model", "workflow"):
        if not getattr(request, name):
            raise TraceError(line, f"{name} is empty")
    if request.arrival_us < 0:
        raise TraceError(line, f"arrival_us is {request.arrival_us}, negative")
    for name in ("width", "height", "frames", "steps", "slo_us"):
        if getattr(request, name) < 1:
            raise TraceError(line, f"{name} is {getattr(request, name)}, not positive")
