"""What a report is made of: `runs.jsonl` (one run a line), `case.toml` and `command.txt`.

A cell is one point of an experiment (workload, rate, SLO scale …); all policies ran the same seeded
traces in it. Series are told apart by `label`: one policy may run under several settings.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec

from bench.sim.paper import PaperRow

Value = str | float | int | bool
Cell = tuple[tuple[str, Value], ...]  # sorted by name


class ReportError(ValueError):
    """A folder does not hold what a report needs; says where."""


class LatencyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Arrival to finish of the finished requests, seconds."""

    p50: float
    p90: float
    p99: float


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a report reads of a run's summary; more fields may be there."""

    requests: int
    met: int
    attainment: float
    latency_s: LatencyFigures
    utilisation: float
    rejected: int
    preemptions: int
    degree_changes: int


class ClassRow(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one class in one run."""

    requests: int
    met: int
    latency_s: tuple[float, ...] = ()  # of the finished, ascending
    slo_s: float | None = None  # where the whole class has one


class RunRow(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    case: str
    cell: dict[str, Value]
    policy: str
    seed: int
    gpus: int
    summary: RunSummary
    title: str = ""
    label: str = ""
    classes: dict[str, ClassRow] = {}
    bound: float | None = None  # on attainment, 0..1

    @property
    def series(self) -> str:
        return self.label or self.policy

    @property
    def place(self) -> Cell:
        return tuple(sorted(self.cell.items()))


class CaseText(msgspec.Struct, frozen=True, kw_only=True):
    """What a report reads of a Case; the rest of it is the simulator's."""

    title: str = ""
    description: str = ""
    paper: tuple[PaperRow, ...] = ()


@dataclass(frozen=True)
class RecordedExperiment:
    """All runs of one folder. Series and cells keep the order of their first row."""

    folder: Path
    title: str
    description: str
    command: str
    rows: tuple[RunRow, ...]
    paper: tuple[PaperRow, ...]
    baseline: str  # a series

    @cached_property
    def series(self) -> tuple[str, ...]:
        """The baseline first."""
        every = dict.fromkeys(r.series for r in self.rows)
        return (self.baseline, *(s for s in every if s != self.baseline))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(dict.fromkeys(r.place for r in self.rows))

    @cached_property
    def _runs(self) -> dict[tuple[Cell, str], dict[int, RunRow]]:
        found: dict[tuple[Cell, str], dict[int, RunRow]] = {}
        for row in self.rows:
            found.setdefault((row.place, row.series), {})[row.seed] = row
        return found

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({r.seed for r in self.rows}))

    @cached_property
    def policies(self) -> dict[str, str]:
        """Policy by series."""
        return {r.series: r.policy for r in self.rows}

    @property
    def rivals(self) -> tuple[str, ...]:
        """Series of other policies than the baseline's: its own variants are no rivals."""
        policies = self.policies
        ours = policies.get(self.baseline)
        return tuple(s for s in self.series if policies.get(s) not in (ours, None))

    def runs(self, cell: Cell, series: str) -> dict[int, RunRow]:
        """By seed; of repeated runs the last counts."""
        return self._runs.get((cell, series), {})


def read_experiment(folder: Path, baseline: str) -> RecordedExperiment:
    """Reads a folder. `baseline` is a label or a policy. Raises: ReportError."""
    decoder = msgspec.json.Decoder(RunRow)
    rows: list[RunRow] = []
    path = folder / "runs.jsonl"
    if not path.exists():
        raise ReportError(f"{folder} has no runs.jsonl")
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise ReportError(f"{path} line {number}: {error}") from None
    if not rows:
        raise ReportError(f"{path} is empty")
    case = _case(folder / "case.toml")
    command = folder / "command.txt"
    return RecordedExperiment(
        folder=folder,
        title=case.title or rows[0].title or rows[0].case,
        description=case.description,
        command=command.read_text().strip() if command.exists() else "",
        rows=tuple(rows),
        paper=case.paper,
        baseline=_series_of(rows, baseline),
    )


def matching(cells: Mapping[str, Value], cell: Cell) -> bool:
    """Whether a cell has all of these values."""
    have = dict(cell)
    return all(k in have and have[k] == v for k, v in cells.items())


def _case(path: Path) -> CaseText:
    if not path.exists():
        return CaseText()
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), CaseText)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ReportError(f"{path}: {error}") from None


def _series_of(rows: list[RunRow], baseline: str) -> str:
    """The series a name means; the first one there is, if none goes by it."""
    series = dict.fromkeys(r.series for r in rows)
    if baseline in series:
        return baseline
    return next((r.series for r in rows if r.policy == baseline), next(iter(series)))
