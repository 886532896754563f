"""Who ran what and when, from a schedule log: tiles, and the Chrome trace of them.

A tile is one run on its group of workers; consecutive runs of the same requests on the same workers
make one tile in pictures. A Chrome trace has one track a worker, on which a group's or a batch's
run appears once for every member of the group (the tid is the worker's number in the log).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.sim.trace import TraceRequest
from control.scheduler.schedule_log import (
    CancelledLine,
    DoneLine,
    FailedLine,
    HeaderLine,
    Line,
    LostLine,
    RejectedLine,
    RunLine,
)

JOIN_US = 1000  # a shorter pause between two runs of the same group does not part their tiles


@dataclass(frozen=True)
class Tile:
    """One run, or several joined; µs from the trace's start."""

    node: str
    requests: tuple[str, ...]
    gpus: tuple[int, ...]
    start_us: int
    end_us: int
    first_step: tuple[int, ...]  # parallel to requests
    steps: int
    lost: bool


@dataclass(frozen=True)
class Fate:
    """How a request ended. `missed` is None where the deadline is not known."""

    kind: str  # done, rejected, cancelled, failed
    at_us: int
    missed: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Timeline:
    """Everything that pictures and traces show."""

    workers: tuple[str, ...]
    tiles: tuple[Tile, ...]  # one a run, by start
    fates: dict[str, Fate]
    requests: dict[str, TraceRequest]  # empty without a trace

    @property
    def end_us(self) -> int:
        ends = [t.end_us for t in self.tiles] + [f.at_us for f in self.fates.values()]
        return max(ends, default=0)

    def missed(self, request: str) -> bool:
        fate = self.fates.get(request)
        return fate is not None and bool(fate.missed)

    def size(self, request: str) -> str:
        """`1024²`, `832×480×81`; empty without a trace."""
        r = self.requests.get(request)
        if r is None:
            return ""
        sides = f"{r.width}²" if r.width == r.height else f"{r.width}×{r.height}"
        return sides if r.frames == 1 else f"{sides}×{r.frames}"

    def joined(self) -> tuple[Tile, ...]:
        """Tiles with consecutive runs of the same requests on the same group made one."""
        found: dict[tuple[object, ...], Tile] = {}
        done: list[Tile] = []
        for tile in self.tiles:
            key = (tile.node, tile.requests, tile.gpus, tile.lost)
            before = found.get(key)
            if before is not None and 0 <= tile.start_us - before.end_us <= JOIN_US:
                steps = before.steps + tile.steps
                found[key] = replace(before, end_us=tile.end_us, steps=steps)
                continue
            if before is not None:
                done.append(before)
            found[key] = tile
        return tuple(sorted([*done, *found.values()], key=lambda t: (t.start_us, t.gpus)))


def timeline_of(lines: Iterable[Line], trace: Sequence[TraceRequest] = ()) -> Timeline:
    """From the lines of a schedule log; a trace adds sizes, arrivals and deadlines."""
    requests = {r.id: r for r in trace}
    workers: tuple[str, ...] = ()
    tiles: list[Tile] = []
    fates: dict[str, Fate] = {}
    for line in lines:
        match line:
            case HeaderLine():
                workers = line.workers
            case RunLine():
                tiles.append(_tile(line))
            case DoneLine():
                r = requests.get(line.request)
                late = None if r is None else line.finish_us > r.arrival_us + r.slo_us
                fates[line.request] = Fate("done", line.finish_us, late)
            case RejectedLine():
                fates[line.request] = Fate("rejected", line.at_us, True, line.reason)
            case CancelledLine():
                fates[line.request] = Fate("cancelled", line.at_us, True, line.reason)
            case FailedLine():
                fates[line.request] = Fate("failed", line.at_us, True, line.reason)
            case _:
                pass
    tiles.sort(key=lambda t: (t.start_us, t.gpus))
    return Timeline(workers, tuple(tiles), fates, requests)


def chrome_trace(timeline: Timeline, from_us: int = 0, until_us: int | None = None) -> Any:
    """The JSON object of a Chrome trace of what touches the window (opens in Perfetto)."""
    end_us = timeline.end_us if until_us is None else until_us
    requests_track = len(timeline.workers)
    events: list[dict[str, Any]] = [_named("process_name", 0, "workers")]
    for tid, name in enumerate((*timeline.workers, "requests")):
        events.append(_named("thread_name", tid, name))
        order = _named("thread_sort_index", tid, "")
        events.append(order | {"args": {"sort_index": tid}})
    for tile in timeline.tiles:
        if tile.end_us > from_us and tile.start_us < end_us:
            events += _slices(timeline, tile)
    for request, fate in timeline.fates.items():
        if from_us <= fate.at_us <= end_us:
            word = "missed" if fate.kind == "done" and fate.missed else fate.kind
            arguments: dict[str, Any] = {"request": request, "reason": fate.reason}
            events.append(
                _instant(f"{request} {word}", fate.at_us, requests_track, word, arguments)
            )
    for r in timeline.requests.values():
        if from_us <= r.arrival_us <= end_us:
            arguments = {"request": r.id, "deadline_us": r.arrival_us + r.slo_us}
            events.append(
                _instant(f"{r.id} arrives", r.arrival_us, requests_track, "arrival", arguments)
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def label(timeline: Timeline, tile: Tile) -> str:
    """`r17 1024² ×4`: requests, size of the first, degree."""
    names = "+".join(short(r) for r in tile.requests[:3]) + ("…" if len(tile.requests) > 3 else "")
    degree = f"×{len(tile.gpus)}" if len(tile.gpus) > 1 else ""
    return " ".join(t for t in (names, timeline.size(tile.requests[0]), degree) if t)


def short(request: str) -> str:
    """A name without the zeros that lead its number: `r000039` is `r39`."""
    return re.sub(r"(?<!\d)0+(?=\d)", "", request)


def _tile(line: RunLine) -> Tile:
    firsts = line.first_step
    if isinstance(firsts, int):
        firsts = (firsts,) * len(line.requests)
    return Tile(
        node=line.node,
        requests=line.requests,
        gpus=line.gpus,
        start_us=line.start_us,
        end_us=line.end_us,
        first_step=firsts,
        steps=line.steps,
        lost=isinstance(line, LostLine),
    )


def _slices(timeline: Timeline, tile: Tile) -> list[dict[str, Any]]:
    """A complete event on every member's track."""
    arguments = {
        "requests": list(tile.requests),
        "size": timeline.size(tile.requests[0]),
        "degree": len(tile.gpus),
        "batch": len(tile.requests),
        "first_step": list(tile.first_step),
        "steps": tile.steps,
        "workers": [timeline.workers[g] for g in tile.gpus],
        "missed": [r for r in tile.requests if timeline.missed(r)],
    }
    name = f"{'lost ' if tile.lost else ''}{tile.node} {label(timeline, tile)}"
    return [
        {
            "name": name,
            "cat": "lost" if tile.lost else tile.node,
            "ph": "X",
            "ts": tile.start_us,
            "dur": tile.end_us - tile.start_us,
            "pid": 0,
            "tid": gpu,
            "args": arguments,
        }
        for gpu in tile.gpus
    ]


def _named(kind: str, tid: int, name: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {"name": name}
    return {"name": kind, "ph": "M", "pid": 0, "tid": tid, "args": arguments}


def _instant(
    name: str, at_us: int, tid: int, category: str, arguments: dict[str, Any]
) -> dict[str, Any]:
    event: dict[str, Any] = {
        "name": name,
        "cat": category,
        "ph": "i",
        "s": "t",
        "ts": at_us,
        "pid": 0,
    }
    return {**event, "tid": tid, "args": arguments}
