"""A profile out of a live run: what calls took on this machine, beside everything else that runs.

`gpuworker profile` measures workers alone. On a host whose cores the workers fill, the services and
the agents take their part of them, too, and a planned step waits a little between two others. The
simulator knows no such thing; so it is given the times of a live run with other requests.

    step k of a request   [ gap | call ]     the gap counts where the step before ran in the same
                                             place just before
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean, median

from bench.sim.trace import TraceRequest
from control.scheduler.profile import Profile
from hocket import spans as names
from hocket.interruptions import DENOISER
from hocket.span_file import SpanRecord

_GAP_MAX_NS = 20_000_000  # a longer one was a pause
_OUTLIER = 3.0  # times over this many medians count as that much
_SAMPLES_MIN = 5

Cell = tuple[str, str, int, int, int, int, int]  # model, node, width, height, frames, degree, batch


def live_profile(
    base_csv: str, spans: Sequence[SpanRecord], requests: Mapping[str, TraceRequest]
) -> str:
    """The base profile with measured cells in place of its own, and the rest scaled like them.

    `requests`: what was asked for, by the name that traces know.
    """
    times_us = _times_us(spans, requests)
    known = {
        (
            *(k.model, k.node, k.shape.width, k.shape.height, k.shape.frames),
            k.layout.degree,
            k.batch,
        ): t
        for k, t in Profile.from_csv(base_csv).cells.items()
    }
    found = {cell: round(_mean(us)) for cell, us in times_us.items() if len(us) >= _SAMPLES_MIN}
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


def _times_us(
    spans: Sequence[SpanRecord], requests: Mapping[str, TraceRequest]
) -> dict[Cell, list[float]]:
    steps = [s for s in spans if s.name == names.STEP and _request(s) in requests]
    steps.sort(key=lambda s: (_request(s), s.start_unix_ns))
    batches = Counter((s.attributes[names.SEQUENCE], s.start_unix_ns) for s in steps)
    found: dict[Cell, list[float]] = defaultdict(list)
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
        found[cell].append((step.end_unix_ns - begin_ns) / 1000)
        before = step
    return found


def _goes_on(before: SpanRecord, step: SpanRecord) -> bool:
    same = (names.REQUEST, names.NODE, names.WORKERS)
    gap_ns = step.start_unix_ns - before.end_unix_ns
    return 0 <= gap_ns < _GAP_MAX_NS and all(
        before.attributes.get(name) == step.attributes.get(name) for name in same
    )


def _mean(us: Sequence[float]) -> float:
    most = _OUTLIER * median(us)
    return mean(min(t, most) for t in us)


def _request(span: SpanRecord) -> str:
    return str(span.attributes.get(names.REQUEST, ""))


def _number(span: SpanRecord, name: str) -> int:
    return int(str(span.attributes[name]))


def _cell_of(row: Mapping[str, str]) -> Cell:
    width, height, frames, degree, batch = (
        int(row[name]) for name in ("width", "height", "frames", "degree", "batch")
    )
    return row["model"], row["node"], width, height, frames, degree, batch
