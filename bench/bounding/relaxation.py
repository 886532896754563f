"""The relaxation: which requests could be on time if steps were divisible, as a linear programme.

Time is cut into intervals at arrivals, deadlines and the ends of stage windows. An on-time request
(variable x = 1) spreads shares of its steps over modes and intervals, and of its text and decode
over intervals. Rows, each of which every real schedule obeys:

    work       the shares of each stage sum to x
    serial     steps of one request never overlap: their wall time within an interval is at most
               the part of the interval that lies between the end of the shortest text stage and
               the start of the shortest decode before the deadline, times x
    capacity   the GPU time charged within an interval is at most gpus x its length
    windows    text leaves time for all fastest steps and the decode, decode comes after text and
               all fastest steps; only intervals within these windows have variables

A step that crosses a cut is split in proportion to time; a batch of b on k GPUs for t charges
k t / b to each member; late requests are charged nothing. Hence any schedule, clairvoyant or not,
is a point of this polytope whose objective (sum of x) is its number of requests on time. Coarser
cuts only merge rows, so the bound stays valid when the grid is thinned to fit a size limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .demand import Mode, RequestDemand, Stage

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
THINNEST = 8  # cuts that thinning always leaves


@dataclass(frozen=True)
class Programme:
    """max sum of the first `requests` variables; low <= A z <= high; 0 <= z <= upper."""

    requests: int
    rows: Integers  # of the entries of A
    columns: Integers
    entries: Floats
    low: Floats
    high: Floats
    upper: Floats

    @property
    def objective(self) -> Floats:
        c = np.zeros(len(self.upper))
        c[: self.requests] = 1.0
        return c


@dataclass(frozen=True)
class StageWindow:
    """Where a stage may run, and the modes it has there."""

    begin_s: float
    end_s: float
    modes: tuple[Mode, ...]


def windows(demand: RequestDemand) -> tuple[StageWindow, StageWindow, StageWindow]:
    """Denoising, text and decode, each as wide as the other two at their shortest allow."""
    text, decode = demand.text, demand.decode
    ready_s = demand.arrival_s + text.wall_s
    latest_s = demand.deadline_s - decode.wall_s
    return (
        StageWindow(ready_s, latest_s, demand.modes),
        StageWindow(demand.arrival_s, latest_s - demand.denoise_s, _charge(text)),
        StageWindow(ready_s + demand.denoise_s, demand.deadline_s, _charge(decode)),
    )


def cuts(demands: Sequence[RequestDemand], variables_max: int) -> Floats:
    """The finest grid whose programme has at most `variables_max` variables.

    All window ends; else arrivals and deadlines; else these without those that follow the last
    kept one too closely (at least `THINNEST` of them remain, whatever the limit).
    """
    ends = [t for d in demands for w in windows(d) for t in (w.begin_s, w.end_s)]
    coarse = np.unique([t for d in demands for t in (d.arrival_s, d.deadline_s)])
    fine = np.unique(np.concatenate([coarse, ends]))
    for grid in (fine, coarse):
        if variable_count(demands, grid) <= variables_max:
            return grid
    narrow_s, wide_s = 0.0, float(coarse[-1] - coarse[0]) / THINNEST
    for _ in range(40):
        gap_s = (narrow_s + wide_s) / 2
        if variable_count(demands, _thinned(coarse, gap_s)) <= variables_max:
            wide_s = gap_s
        else:
            narrow_s = gap_s
    return _thinned(coarse, wide_s)


def variable_count(demands: Sequence[RequestDemand], grid: Floats) -> int:
    """How many variables `programme` makes on a grid."""
    count = len(demands)
    for demand in demands:
        for window in windows(demand):
            first, last = _span(window, grid)
            count += len(window.modes) * (last - first)
    return count


def programme(demands: Sequence[RequestDemand], gpus: int, grid: Floats) -> Programme:
    """The relaxation of requests that are feasible alone, on a grid that covers all windows."""
    build = _Build(grid, len(demands))
    for place, demand in enumerate(demands):
        denoise, *others = windows(demand)
        build.stage(place, denoise, calls=demand.steps, serial=True)
        for window in others:
            build.stage(place, window, calls=1, serial=False)
    return build.finish(gpus)


@dataclass
class _Build:
    """Gathers rows and columns; rows 0 … intervals - 1 are the capacities."""

    grid: Floats
    requests: int
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    rows: list[Integers] = field(default_factory=list)
    columns: list[Integers] = field(default_factory=list)
    entries: list[Floats] = field(default_factory=list)
    upper: list[Floats] = field(default_factory=list)
    variables: int = 0

    def __post_init__(self) -> None:
        self.variables = self.requests
        self.upper.append(np.ones(self.requests))

    def stage(self, place: int, window: StageWindow, calls: int, serial: bool) -> None:
        """One stage of request `place`; its variables are shares of its `calls`."""
        if not window.modes:
            return
        first, last = _span(window, self.grid)
        intervals = np.arange(first, last)
        ends_s = np.minimum(self.grid[first + 1 : last + 1], window.end_s)
        parts_s = np.maximum(0.0, ends_s - np.maximum(self.grid[first:last], window.begin_s))
        work = self._row(0.0, 0.0)
        self._enter(np.array([work]), np.array([place]), np.array([-1.0]))
        serials = np.array([self._row(-math.inf, 0.0) for _ in intervals] if serial else [], int)
        if serial:
            self._enter(serials, np.full(len(serials), place), -parts_s)
        for mode in window.modes:
            new = np.arange(self.variables, self.variables + len(intervals))
            self.variables += len(intervals)
            ones = np.ones(len(intervals))
            self._enter(np.full(len(new), work), new, ones)
            self._enter(intervals, new, ones * calls * mode.gpu_s)
            if serial:
                self._enter(serials, new, ones * calls * mode.wall_s)
                self.upper.append(np.minimum(1.0, parts_s / (calls * mode.wall_s)))
            else:
                self.upper.append(ones)

    def finish(self, gpus: int) -> Programme:
        lengths_s = np.diff(self.grid)
        return Programme(
            requests=self.requests,
            rows=np.concatenate(self.rows),
            columns=np.concatenate(self.columns),
            entries=np.concatenate(self.entries),
            low=np.concatenate([np.full(len(lengths_s), -math.inf), self.low]),
            high=np.concatenate([gpus * lengths_s, self.high]),
            upper=np.concatenate(self.upper),
        )

    def _row(self, low: float, high: float) -> int:
        self.low.append(low)
        self.high.append(high)
        return len(self.grid) - 1 + len(self.low) - 1

    def _enter(self, rows: Integers, columns: Integers, entries: Floats) -> None:
        self.rows.append(rows)
        self.columns.append(columns)
        self.entries.append(entries)


def _charge(stage: Stage) -> tuple[Mode, ...]:
    return (Mode(stage.wall_s, stage.gpu_s),) if stage.gpu_s > 0 else ()


def _span(window: StageWindow, grid: Floats) -> tuple[int, int]:
    """Half-open range of the intervals that meet a window; one, where it is a mere instant."""
    first = max(0, int(np.searchsorted(grid, window.begin_s, "right")) - 1)
    last = int(np.searchsorted(grid, window.end_s, "left"))
    first = min(first, len(grid) - 2)
    return first, max(first + 1, min(last, len(grid) - 1))


def _thinned(grid: Floats, gap_s: float) -> Floats:
    kept = [grid[0]]
    for cut in grid[1:-1]:
        if cut - kept[-1] >= gap_s:
            kept.append(cut)
    return np.array([*kept, grid[-1]])
