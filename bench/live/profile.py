"""A profile out of live runs: what calls took on this machine, beside everything else that runs.

`gpuworker profile` measures workers alone. On a host whose cores the workers fill, the services and
the agents take their part of them, too, and a planned step waits a little between two others. The
simulator knows no such thing; so it is given the times of live runs.

    step k of a request   [ gap | call ]     the gap counts where the step before ran in the same
                                             place just before
    another worker        [  step   ]        it computed in the middle of the call: "beside"
"""

from __future__ import annotations

import csv
import io
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median
from typing import NamedTuple

from bench.sim.call_times import Contention
from bench.sim.trace import TraceRequest
from control.scheduler.times.profile import Profile
from hocket.tracing import spans as names
from hocket.tracing.interruptions import DENOISER
from hocket.tracing.span_file import SpanRecord

_GAP_MAX_NS = 20_000_000  # a longer one was a pause
_OUTLIER = 3.0  # times over this many medians count as that much
_SAMPLES_MIN = 5
_STATE_MIN = 20  # of calls alone, or beside others

Cell = tuple[str, str, int, int, int, int, int]  # model, node, width, height, frames, degree, batch


class _Call(NamedTuple):
    us: float
    beside: bool  # another worker computed, too


def live_profile(
    base_csv: str, spans: Sequence[SpanRecord], requests: Mapping[str, TraceRequest]
) -> tuple[str, Contention]:
    """The base profile with measured cells in place of its own, and the rest scaled like them; and
    what calls took alone and beside others (as on the whole, where one of the two was too rare).

    `requests`: what was asked for, by the name that traces know.
    """
    calls = _calls(spans, requests)
    whole = _means(calls, _SAMPLES_MIN)
    alone, beside = (
        _means({k: [c for c in v if c.beside == state] for k, v in calls.items()}, _STATE_MIN)
        for state in (False, True)
    )
    contention = Contention(
        alone_csv=_written(base_csv, whole | alone), beside_csv=_written(base_csv, whole | beside)
    )
    return _written(base_csv, whole), contention


def _written(base_csv: str, found: Mapping[Cell, int]) -> str:
    known = {
        (
            *(k.model, k.node, k.shape.width, k.shape.height, k.shape.frames),
            k.layout.degree,
            k.batch,
        ): t
        for k, t in Profile.from_csv(base_csv).cells.items()
    }
    ratios = {
        node: median([t / known[c] for c, t in found.items() if c in known and c[1] == node] or [1])
        for node in {cell[1] for cell in known}
    }
    rows = list(csv.DictReader(io.StringIO(base_csv)))
    for row in rows:
        cell = _cell_of(row)
        own = found.get(cell)
        row["call_us"] = str(own or round(int(row["call_us"]) * ratios[cell[1]]))
        row["source"] = "[M] in a live run" if own else "[M] scaled by a live run"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _calls(
    spans: Sequence[SpanRecord], requests: Mapping[str, TraceRequest]
) -> dict[Cell, list[_Call]]:
    everybodys = [s for s in spans if s.name == names.STEP]
    steps = [s for s in everybodys if _request(s) in requests]
    steps.sort(key=lambda s: (_request(s), s.start_unix_ns))
    batches = Counter((s.attributes[names.SEQUENCE], s.start_unix_ns) for s in steps)
    busy = _Busy(everybodys)
    found: dict[Cell, list[_Call]] = defaultdict(list)
    before: SpanRecord | None = None
    for step in steps:
        begin_ns, node = step.start_unix_ns, str(step.attributes[names.NODE])
        if before is not None and node == DENOISER and _goes_on(before, step):
            begin_ns = before.end_unix_ns
        asked = requests[_request(step)]
        cell = (
            *(asked.model, node, asked.width, asked.height, asked.frames),
            _number(step, names.DEGREE),
            batches[step.attributes[names.SEQUENCE], step.start_unix_ns],
        )
        found[cell].append(_Call((step.end_unix_ns - begin_ns) / 1000, busy.beside(step)))
        before = step
    return found


class _Busy:
    """When each worker was in a step."""

    def __init__(self, steps: Sequence[SpanRecord]) -> None:
        self._spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for step in steps:
            for worker in _workers(step):
                self._spans[worker].append((step.start_unix_ns, step.end_unix_ns))
        for spans in self._spans.values():
            spans.sort()

    def beside(self, step: SpanRecord) -> bool:
        """In the middle of the step, a worker that had no part in it was in another."""
        middle_ns = (step.start_unix_ns + step.end_unix_ns) // 2
        own = set(_workers(step))
        for worker, spans in self._spans.items():
            place = bisect_right(spans, middle_ns, key=lambda span: span[0]) - 1
            if worker not in own and place >= 0 and middle_ns < spans[place][1]:
                return True
        return False


def _goes_on(before: SpanRecord, step: SpanRecord) -> bool:
    same = (names.REQUEST, names.NODE, names.WORKERS)
    gap_ns = step.start_unix_ns - before.end_unix_ns
    return 0 <= gap_ns < _GAP_MAX_NS and all(
        before.attributes.get(name) == step.attributes.get(name) for name in same
    )


def _means(calls: Mapping[Cell, Sequence[_Call]], at_least: int) -> dict[Cell, int]:
    """Of cells with enough calls, microseconds; a single slow call counts so much at most."""
    found = {}
    for cell, some in calls.items():
        if len(some) >= at_least:
            most = _OUTLIER * median(c.us for c in some)
            found[cell] = round(mean(min(c.us, most) for c in some))
    return found


def _request(span: SpanRecord) -> str:
    return str(span.attributes.get(names.REQUEST, ""))


def _workers(span: SpanRecord) -> Iterator[str]:
    workers = span.attributes[names.WORKERS]
    assert isinstance(workers, Sequence)
    return (str(w) for w in workers)


def _number(span: SpanRecord, name: str) -> int:
    return int(str(span.attributes[name]))


def _cell_of(row: Mapping[str, str]) -> Cell:
    width, height, frames, degree, batch = (
        int(row[name]) for name in ("width", "height", "frames", "degree", "batch")
    )
    return row["model"], row["node"], width, height, frames, degree, batch
