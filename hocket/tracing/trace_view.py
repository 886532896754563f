"""The timeline of one request as text, and of all workers as a Chrome trace. Pure: spans in, lines
or JSON values out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hocket.tracing import spans as names
from hocket.tracing.span_file import SpanRecord

_LABEL_COLUMNS = 34
_BAR_COLUMNS = 30
WAITED_SHOWN = 0.1  # of the slowest member's own time: a shorter wait is no news
_ON_WORKER = (names.STEP, names.GROUP, names.TRANSFER, names.PUBLISH)


def spans_of(request_id: str, spans: Iterable[SpanRecord]) -> list[SpanRecord]:
    """Every span of the traces that name the request."""
    known = list(spans)
    traces = {s.trace_id for s in known if s.attributes.get(names.REQUEST) == request_id}
    return [span for span in known if span.trace_id in traces]


def latest_request(spans: Iterable[SpanRecord]) -> str:
    """The request whose call began last; empty when there is none."""
    calls = [s for s in spans if s.name == names.GENERATE and names.REQUEST in s.attributes]
    last = max(calls, key=lambda span: span.start_unix_ns, default=None)
    return str(last.attributes[names.REQUEST]) if last is not None else ""


def timeline(spans: Sequence[SpanRecord]) -> list[str]:
    """One line a span: where it ran, what it was, when it began, how long it took, a bar.

    Times are milliseconds from the first span's start. Children stand below their parents.
    """
    if not spans:
        return []
    start_ns = min(span.start_unix_ns for span in spans)
    end_ns = max(span.end_unix_ns for span in spans)
    scale = _Scale(start_ns, max(end_ns - start_ns, 1))
    lines = [f"{'':{_LABEL_COLUMNS}} {'start ms':>9} {'took ms':>9}"]
    for depth, span in _tree(spans):
        label = f"{'  ' * depth}{span.service}-{span.instance}: {span.name}"
        at_ms = (span.start_unix_ns - start_ns) / 1e6
        took_ms = (span.end_unix_ns - span.start_unix_ns) / 1e6
        if len(label) > _LABEL_COLUMNS:
            label = label[: _LABEL_COLUMNS - 1] + "…"
        head = f"{label:{_LABEL_COLUMNS}} {at_ms:9.1f} {took_ms:9.1f}"
        lines.append(f"{head} {scale.bar(span)} {_facts(span, took_ms)}".rstrip())
    return lines


def chrome_trace(spans: Sequence[SpanRecord]) -> dict[str, object]:
    """A Chrome-trace document (opens in Perfetto): one track a worker, one slice a step.

    A step stands on the track of every member of its group. Times are microseconds from the first
    slice.
    """
    shown = [s for s in spans if s.name in _ON_WORKER]
    start_ns = min((span.start_unix_ns for span in shown), default=0)
    workers = sorted({worker for span in shown for worker in _workers(span)}, key=_by_number)
    tracks = {worker: number for number, worker in enumerate(workers)}
    events: list[dict[str, object]] = [_metadata("process_name", 0, "workers")]
    for worker, track in tracks.items():
        events.append(_metadata("thread_name", track, worker))
        events.append({**_metadata("thread_sort_index", track, ""), "args": {"sort_index": track}})
    for span in shown:
        for worker in _workers(span):
            events.append(_slice(span, worker, tracks[worker], start_ns))
    return {"displayTimeUnit": "ms", "traceEvents": events}


@dataclass(frozen=True)
class _Scale:
    start_ns: int
    length_ns: int

    def bar(self, span: SpanRecord) -> str:
        first = self._column(span.start_unix_ns)
        last = max(self._column(span.end_unix_ns), first + 1)
        return f"{' ' * first}{'█' * (last - first)}".ljust(_BAR_COLUMNS)[:_BAR_COLUMNS]

    def _column(self, at_ns: int) -> int:
        return min((at_ns - self.start_ns) * _BAR_COLUMNS // self.length_ns, _BAR_COLUMNS - 1)


def _tree(spans: Sequence[SpanRecord]) -> list[tuple[int, SpanRecord]]:
    known = {span.span_id for span in spans}
    children: dict[str, list[SpanRecord]] = defaultdict(list)
    for span in sorted(spans, key=lambda s: (s.start_unix_ns, -s.end_unix_ns, s.span_id)):
        children[span.parent_id if span.parent_id in known else ""].append(span)
    ordered: list[tuple[int, SpanRecord]] = []
    todo = [(0, span) for span in reversed(children[""])]
    while todo:
        depth, span = todo.pop()
        ordered.append((depth, span))
        todo.extend((depth + 1, child) for child in reversed(children[span.span_id]))
    return ordered


def _facts(span: SpanRecord, took_ms: float) -> str:
    """What the span's attributes say, shortest first."""
    seen = span.attributes
    facts: list[str] = []
    if names.NODE in seen:
        facts.append(str(seen[names.NODE]))
    if names.PART in seen:
        facts.append(f"{seen[names.PART]}, waited {int(str(seen[names.WAITED_US])) / 1e3:.1f} ms")
    if names.STEP_INDEX in seen:
        facts.append(f"{seen[names.STEP_INDEX]}/{seen.get(names.STEPS, '?')}")
    elif span.name == names.ROUND:
        facts.append(f"#{seen.get(names.ROUND_NUMBER, '?')}: {seen.get(names.STEPS, '?')} steps")
    if names.DEGREE in seen:
        facts.append(f"x{seen[names.DEGREE]}")
    if names.WORKERS in seen:
        facts.append(f"[{' '.join(_workers(span))}]")
    if span.name == names.STEP and _number(seen.get(names.PREDICTED_US)) > 0:
        predicted_ms = _number(seen[names.PREDICTED_US]) / 1e3
        facts.append(f"predicted {predicted_ms:.1f} ms ({took_ms / predicted_ms - 1:+.0%})")
    if waited := _waited(span):
        facts.append(waited)
    if names.FROM in seen or names.TO in seen:
        facts.append(f"{seen.get(names.FROM, '?')} -> {seen.get(names.TO, '?')}")
    if names.BYTES in seen:
        facts.append(f"{_number(seen[names.BYTES]) / 1024:.0f} KiB")
    if names.OUTCOME in seen:
        facts.append(str(seen[names.OUTCOME]))
    if span.status.startswith("error"):
        facts.append(span.status)
    return " ".join(facts)


def _slice(span: SpanRecord, worker: str, track: int, start_ns: int) -> dict[str, object]:
    seen = span.attributes
    title = str(seen.get(names.NODE, span.name)) if span.name == names.STEP else span.name
    facts = {
        "request": seen.get(names.REQUEST),
        "step": seen.get(names.STEP_INDEX),
        "degree": seen.get(names.DEGREE),
        "predicted_us": seen.get(names.PREDICTED_US),
        "own_us": _own_us(span).get(worker),
        "trace": span.trace_id,
    }
    return {
        "name": f"{title} {facts['step']}" if facts["step"] is not None else title,
        "cat": span.name,
        "ph": "X",
        "pid": 0,
        "tid": track,
        "ts": (span.start_unix_ns - start_ns) / 1e3,
        "dur": (span.end_unix_ns - span.start_unix_ns) / 1e3,
        "args": {key: value for key, value in facts.items() if value is not None},
    }


def _metadata(kind: str, track: int, name: str) -> dict[str, object]:
    return {"name": kind, "ph": "M", "pid": 0, "tid": track, "args": {"name": name}}


def _workers(span: SpanRecord) -> list[str]:
    # A step belongs to its whole group, a transfer or a group's making to the worker that did it.
    members = span.attributes.get(names.WORKERS)
    if span.name in (names.STEP, names.ROUND) and isinstance(members, list) and members:
        return [str(member) for member in members]
    return [str(span.attributes.get(names.WORKER, span.instance))]


def _by_number(worker: str) -> tuple[str, int]:
    stem = worker.rstrip("0123456789")
    return stem, int(worker[len(stem) :] or 0)


def _waited(span: SpanRecord) -> str:
    """How long the members of a step waited for the slowest; nothing where that is no news."""
    own_us = _own_us(span)
    if not own_us:
        return ""
    slowest = max(own_us, key=lambda worker: own_us[worker])
    longest_us = own_us[slowest] - min(own_us.values())
    if longest_us < WAITED_SHOWN * own_us[slowest]:
        return ""
    return f"waited {longest_us / 1e3:.1f} ms for {slowest}"


def _own_us(span: SpanRecord) -> dict[str, float]:
    """How much of a step was each worker's own; empty where that is not known."""
    members, told = _workers(span), span.attributes.get(names.MEMBERS_US)
    if span.name != names.STEP or not isinstance(told, list) or len(told) != len(members):
        return {}
    return {worker: _number(own_us) for worker, own_us in zip(members, told, strict=True)}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
