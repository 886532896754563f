"""What the runs of an experiment say: cells, verdicts, sweeps, paper numbers. Values, no text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.sim.paper import PaperRow

from .rows import Cell, ClassRow, RecordedExperiment, RunRow, Value, matching
from .statistics import (
    Interval,
    PolicyVerdict,
    Ratio,
    Sustained,
    mean_interval,
    paired_difference,
    sustained,
    sustained_ratio,
    verdict,
)

TARGET = 0.9  # attainment that counts as sustained
# Swept numbers that mean more work when they grow; the first two say how a burst is written.
LOADS = ("burst_factor", "burst", "rate", "per_second", "request_scale", "scale", "video_share")


@dataclass(frozen=True)
class PolicyStanding:
    """One policy in one cell."""

    series: str
    attainment: Interval
    p50_s: Interval
    p99_s: Interval
    preemptions: float  # these four: mean of the seeds
    degree_changes: float
    rejected: float
    utilisation: float
    difference: Interval | None  # baseline minus this one, paired
    gap: Interval | None  # bound minus attainment, paired

    @property
    def verdict(self) -> PolicyVerdict | None:
        """How the baseline stands to this policy."""
        return None if self.difference is None else verdict(self.difference)


@dataclass(frozen=True)
class ClassStanding:
    """One class of requests under one policy, pooled over the seeds."""

    series: str
    name: str
    attainment: Interval
    latency_s: tuple[float, ...]  # of the finished, ascending
    requests: int
    slo_s: float | None


@dataclass(frozen=True)
class CellStanding:
    """One cell, policies in the experiment's order."""

    cell: Cell
    standings: tuple[PolicyStanding, ...]
    best_rival: PolicyStanding | None
    bound: Interval | None

    def of(self, series: str) -> PolicyStanding | None:
        return next((s for s in self.standings if s.series == series), None)


@dataclass(frozen=True)
class Sweep:
    """Attainment over one swept number, all else equal."""

    name: str
    rest: Cell
    curves: dict[str, dict[float, dict[int, float]]]  # series -> x -> seed -> attainment
    bound: dict[float, dict[int, float]]

    @property
    def is_load(self) -> bool:
        return self.name in LOADS

    @property
    def xs(self) -> tuple[float, ...]:
        return tuple(sorted({x for curve in self.curves.values() for x in curve}))


@dataclass(frozen=True)
class Carried:
    """The load a policy sustains in a sweep, and the baseline's over it."""

    series: str
    load: Sustained
    ratio: Ratio | None


@dataclass(frozen=True)
class PaperComparison:
    """A published number beside ours; `ours` is None where the runs do not have it."""

    paper: PaperRow
    cell: Cell | None
    ours: Interval | None


def standings(e: RecordedExperiment) -> tuple[CellStanding, ...]:
    """Every cell, in order."""
    return tuple(_cell_standing(e, cell) for cell in e.cells)


def class_standings(e: RecordedExperiment, cell: Cell) -> dict[str, tuple[ClassStanding, ...]]:
    """By class name, policies in order."""
    found: dict[str, list[ClassStanding]] = {}
    for series in e.series:
        runs = e.runs(cell, series)
        names = sorted({n for r in runs.values() for n in r.classes})
        for name in names:
            rows = [r.classes[name] for r in runs.values() if name in r.classes]
            shares = [c.met / c.requests for c in rows if c.requests]
            if shares:
                found.setdefault(name, []).append(_class_standing(series, name, rows, shares))
    return {name: tuple(found[name]) for name in sorted(found, key=_natural)}


def sweeps(e: RecordedExperiment) -> tuple[Sweep, ...]:
    """One for each number that takes several values while the rest of the cell stays."""
    found: dict[tuple[str, Cell], Sweep] = {}
    for row in e.rows:
        for name, value in row.place:
            if isinstance(value, str | bool):
                continue
            rest = tuple(item for item in row.place if item[0] != name)
            sweep = found.setdefault((name, rest), Sweep(name, rest, {}, {}))
            curve = sweep.curves.setdefault(row.series, {})
            curve.setdefault(float(value), {})[row.seed] = row.summary.attainment
            if row.bound is not None:
                sweep.bound.setdefault(float(value), {})[row.seed] = row.bound
    return tuple(s for s in found.values() if len(s.xs) > 1)


def carried(e: RecordedExperiment, sweep: Sweep, target: float = TARGET) -> tuple[Carried, ...]:
    """What each policy sustains in a sweep of a load."""
    ours = sweep.curves.get(e.baseline)
    found = []
    for series in e.series:
        if series not in sweep.curves:
            continue
        curve = sweep.curves[series]
        means = {x: mean_interval(list(s.values())).mean for x, s in curve.items()}
        ratio = None
        if ours is not None and series != e.baseline:
            ratio = sustained_ratio(ours, curve, target)
        found.append(Carried(series, sustained(means, target), ratio))
    return tuple(found)


def compared(e: RecordedExperiment) -> tuple[PaperComparison, ...]:
    """The paper's rows, each beside every cell it speaks of (one row without, if there is none)."""
    found = []
    for paper in e.paper:
        cells = [c for c in e.cells if matching(paper.cell, c)]
        ours = [(c, _ours(e, paper, c)) for c in cells]
        found += [PaperComparison(paper, c, i) for c, i in ours if i is not None]
        if all(i is None for _, i in ours):
            found.append(PaperComparison(paper, None, None))
    return tuple(found)


def telling_cell(cells: Sequence[CellStanding], baseline: str) -> CellStanding:
    """The cell for close-ups: where the baseline comes nearest to 90 %."""

    def distance(cell: CellStanding) -> float:
        ours = cell.of(baseline)
        return 2.0 if ours is None else abs(ours.attainment.mean - TARGET)

    return min(cells, key=distance)


def chosen_series(
    e: RecordedExperiment, cells: Iterable[CellStanding], most: int = 6
) -> tuple[str, ...]:
    """The baseline and the policies with the best mean attainment, one series a policy first."""
    sums: dict[str, list[float]] = {}
    for cell in cells:
        for s in cell.standings:
            sums.setdefault(s.series, []).append(s.attainment.mean)
    policies = e.policies
    ranked = sorted(
        (s for s in e.series if s != e.baseline and s in sums),
        key=lambda s: -sum(sums[s]) / len(sums[s]),
    )
    firsts: dict[str, str] = {}
    for series in ranked:
        firsts.setdefault(policies[series], series)
    chosen = [s for s in firsts.values() if policies[s] != policies[e.baseline]]
    chosen += [s for s in ranked if s not in chosen]
    return (e.baseline, *chosen[: most - 1])


def varying(e: RecordedExperiment) -> tuple[str, ...]:
    """Names of a cell's values that differ between cells."""
    values: dict[str, set[Value]] = {}
    for cell in e.cells:
        for name, value in cell:
            values.setdefault(name, set()).add(value)
    return tuple(sorted(n for n, v in values.items() if len(v) > 1))


def _cell_standing(e: RecordedExperiment, cell: Cell) -> CellStanding:
    found: list[PolicyStanding] = []
    bounds: dict[int, float] = {}
    base = {s: r.summary.attainment for s, r in e.runs(cell, e.baseline).items()}
    for series in e.series:
        runs = e.runs(cell, series)
        if runs:
            mine = {s: r.bound for s, r in runs.items() if r.bound is not None}
            bounds.update(mine)
            found.append(_standing(series, runs, None if series == e.baseline else base))
    rivals = [s for s in found if s.series in e.rivals]
    return CellStanding(
        cell=cell,
        standings=tuple(found),
        best_rival=max(rivals, key=lambda s: s.attainment.mean, default=None),
        bound=mean_interval(list(bounds.values())) if bounds else None,
    )


def _standing(
    series: str, runs: Mapping[int, RunRow], base: Mapping[int, float] | None
) -> PolicyStanding:
    mine = {s: r.summary.attainment for s, r in runs.items()}
    bounds = {s: r.bound for s, r in runs.items() if r.bound is not None}

    def over_seeds(of: Callable[[RunRow], float]) -> Interval:
        return mean_interval([of(r) for r in runs.values()])

    return PolicyStanding(
        series=series,
        attainment=over_seeds(lambda r: r.summary.attainment),
        p50_s=over_seeds(lambda r: r.summary.latency_s.p50),
        p99_s=over_seeds(lambda r: r.summary.latency_s.p99),
        preemptions=over_seeds(lambda r: r.summary.preemptions).mean,
        degree_changes=over_seeds(lambda r: r.summary.degree_changes).mean,
        rejected=over_seeds(lambda r: r.summary.rejected).mean,
        utilisation=over_seeds(lambda r: r.summary.utilisation).mean,
        difference=None if base is None else paired_difference(base, mine),
        gap=paired_difference(bounds, mine) if bounds else None,
    )


def _class_standing(
    series: str, name: str, rows: Sequence[ClassRow], shares: Sequence[float]
) -> ClassStanding:
    slos = {c.slo_s for c in rows}
    return ClassStanding(
        series=series,
        name=name,
        attainment=mean_interval(shares),
        latency_s=tuple(sorted(x for c in rows for x in c.latency_s)),
        requests=sum(c.requests for c in rows),
        slo_s=slos.pop() if len(slos) == 1 else None,
    )


def _ours(e: RecordedExperiment, paper: PaperRow, cell: Cell) -> Interval | None:
    mine = _metric(e, paper, cell, paper.policy)
    if not paper.over:
        return mean_interval(list(mine.values())) if mine else None
    other = _metric(e, paper, cell, paper.over)
    ratios = [mine[s] / other[s] for s in sorted(mine.keys() & other.keys()) if other[s]]
    return mean_interval(ratios) if ratios else None


def _metric(e: RecordedExperiment, paper: PaperRow, cell: Cell, policy: str) -> dict[int, float]:
    """By seed: attainment, p50, p90, p99, mean (latency, s), a count, or `class:<name>`."""
    series = policy
    if policy not in e.series:
        series = next((s for s, p in e.policies.items() if p == policy), policy)
    found: dict[int, float] = {}
    for seed, row in e.runs(cell, series).items():
        summary, metric = row.summary, paper.metric
        latencies = [x for c in row.classes.values() for x in c.latency_s]
        if metric.startswith("class:"):
            one = row.classes.get(metric.removeprefix("class:"))
            if one is not None and one.requests:
                found[seed] = one.met / one.requests
        elif metric in ("p50", "p90", "p99"):
            found[seed] = float(getattr(summary.latency_s, metric))
        elif metric == "mean" and latencies:
            found[seed] = sum(latencies) / len(latencies)
        elif metric in type(summary).__struct_fields__ and metric != "latency_s":
            found[seed] = float(getattr(summary, metric))
    return found


def _natural(name: str) -> tuple[str, float]:
    """Classes by model, then by size: `model 1024x1024x1`."""
    model, _, shape = name.rpartition(" ")
    size = 1.0
    for side in shape.split("x"):
        size *= float(side) if side.isdigit() else 1.0
    return (model, size)
