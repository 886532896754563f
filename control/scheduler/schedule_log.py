"""The schedule log and the summary: what happened, in the frozen formats of DESIGN.md section 10.

Built from the same facts and plans in the simulator and in the live system. One `run` line covers
what one assignment really ran; steps that a failure undid become `lost` lines. Times are
microseconds from the trace's start, a worker's number in `gpus` is its place in the header.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from .values import (
    DIT,
    Arrived,
    Assignment,
    Ended,
    Event,
    Member,
    Outcome,
    Plan,
    StepsEnded,
    WorkerUp,
)


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the lines; the tag field `kind` comes first."""


class HeaderLine(_Line, frozen=True, tag_field="kind", tag="header"):
    workers: tuple[str, ...]
    start: int | str  # of the trace, in whatever clock the run had


class RunLine(_Line, frozen=True, tag_field="kind", tag="run"):
    node: str
    requests: tuple[str, ...]
    gpus: tuple[int, ...]
    start_us: int
    end_us: int
    first_step: int | tuple[int, ...]
    steps: int
    batch: int


class LostLine(RunLine, frozen=True, tag_field="kind", tag="lost"):
    """As a run, of steps whose result did not survive."""


class DoneLine(_Line, frozen=True, tag_field="kind", tag="done"):
    request: str
    finish_us: int


class RejectedLine(_Line, frozen=True, tag_field="kind", tag="rejected"):
    request: str
    at_us: int
    reason: str


class CancelledLine(_Line, frozen=True, tag_field="kind", tag="cancelled"):
    request: str
    at_us: int
    reason: str = ""


class FailedLine(_Line, frozen=True, tag_field="kind", tag="failed"):
    request: str
    at_us: int
    reason: str = ""


class DegradedLine(_Line, frozen=True, tag_field="kind", tag="degraded"):
    request: str
    steps: int
    width: int
    height: int


Line = (
    HeaderLine
    | RunLine
    | LostLine
    | DoneLine
    | RejectedLine
    | CancelledLine
    | FailedLine
    | DegradedLine
)
OutcomeLine = DoneLine | RejectedLine | CancelledLine | FailedLine


class LogError(ValueError):
    """A schedule log is not as the format says; `line` counts from 1."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"schedule log line {line}: {problem}")
        self.line = line
        self.problem = problem


def read_log(text: str) -> tuple[Line, ...]:
    """Reads and checks a schedule log's form (not its physics). Raises: LogError."""
    decoder = msgspec.json.Decoder(Line)
    lines: list[Line] = []
    outcomes: set[str] = set()
    workers = 0
    for number, row in enumerate(text.splitlines(), start=1):
        try:
            line = decoder.decode(row)
        except msgspec.DecodeError as error:
            raise LogError(number, str(error)) from None
        if isinstance(line, HeaderLine) != (number == 1):
            raise LogError(number, "the header stands first and only there")
        if isinstance(line, HeaderLine):
            workers = len(line.workers)
        if isinstance(line, RunLine):
            _check_run(number, line, workers)
        if isinstance(line, OutcomeLine):
            if line.request in outcomes:
                raise LogError(number, f"{line.request} ends twice")
            outcomes.add(line.request)
        lines.append(line)
    return tuple(lines)


def _check_run(number: int, line: RunLine, workers: int) -> None:
    if line.end_us < line.start_us or line.steps < 1 or not line.requests or not line.gpus:
        raise LogError(number, "empty or backward run")
    if line.batch != len(line.requests):
        raise LogError(number, f"batch {line.batch} of {len(line.requests)} requests")
    if isinstance(line.first_step, tuple) and len(line.first_step) != line.batch:
        raise LogError(number, "first_step is not parallel to requests")
    if len(set(line.gpus)) != len(line.gpus) or not all(0 <= g < workers for g in line.gpus):
        raise LogError(number, f"gpus {line.gpus} are not distinct workers of the header")


@dataclass(slots=True)
class _Ran:
    """What an assignment has run so far: absolute start of its first step, end of each."""

    assignment: Assignment
    start_us: int
    stepped: bool
    step_end_us: list[int] = field(default_factory=list)
    took: dict[str, int] = field(default_factory=dict)  # by member: steps that it was there for
    kept: dict[str, int] = field(default_factory=dict)  # by member: steps whose result survived

    def first_step(self, request: str) -> int:
        """Of a member; 0 where the node has no steps."""
        if not self.stepped:
            return 0
        return next(m.first_step for m in self.assignment.batch if m.request == request)

    def lines(self, origin_us: int, gpus: dict[str, int]) -> list[RunLine]:
        """What survived, then what was lost; of a batch, members may differ or leave early."""
        cuts = sorted({0, *self.took.values(), *self.kept.values()})
        lines: list[RunLine] = []
        for first, last in pairwise(cuts):
            there = [m for m in self.assignment.batch if self.took[m.request] >= last]
            kept = [m for m in there if self.kept[m.request] >= last]
            lost = [m for m in there if self.kept[m.request] < last]
            for kind, members in ((RunLine, kept), (LostLine, lost)):
                if members:
                    lines.append(self._line(kind, members, first, last, origin_us, gpus))
        return lines

    def _line(
        self,
        kind: type[RunLine],
        members: list[Member],
        first: int,
        last: int,
        origin_us: int,
        gpus: dict[str, int],
    ) -> RunLine:
        a = self.assignment
        firsts = tuple(m.first_step + first if self.stepped else 0 for m in members)
        return kind(
            node=a.node,
            requests=tuple(m.request for m in members),
            gpus=tuple(gpus[w] for w in a.workers),
            start_us=(self.step_end_us[first - 1] if first else self.start_us) - origin_us,
            end_us=self.step_end_us[last - 1] - origin_us,
            first_step=firsts[0] if len(set(firsts)) == 1 else firsts,
            steps=last - first,
            batch=len(members),
        )


class ScheduleLog:
    """Gathers plans and facts; `lines` tells the story so far."""

    def __init__(self, start_us: int, start: int | str = 0) -> None:
        """`start_us`: the trace's start on the scheduler's clock; `start`: what the header says."""
        self.start_us = start_us
        self._start = start
        self._gpus: dict[str, int] = {}
        self._assignments: dict[int, Assignment] = {}
        self._ran: dict[int, _Ran] = {}
        self._by_request: dict[str, list[int]] = {}
        self._free_us: dict[str, int] = {}
        self._outcomes: dict[str, Line] = {}
        self._degraded: dict[str, Line] = {}
        self.arrivals: dict[str, Arrived] = {}

    def planned(self, plan: Plan) -> None:
        """Remembers a plan's assignments."""
        for assignment in plan.assignments:
            self._assignments[assignment.sequence] = assignment

    def observed(self, event: Event, ended: Iterable[Ended] = ()) -> None:
        """Enters a fact and what it ended."""
        match event:
            case WorkerUp():
                self._gpus.setdefault(event.worker, len(self._gpus))
            case Arrived():
                self.arrivals.setdefault(event.request.id, event)
            case StepsEnded():
                self._steps(event)
            case _:
                pass
        for end in ended:
            self.ended(end)

    def ended(self, end: Ended) -> None:
        """A request ended, by a fact or by a plan."""
        at_us = end.at_us - self.start_us
        line: Line = DoneLine(request=end.request, finish_us=at_us)
        if end.outcome is Outcome.CANCELLED:
            line = CancelledLine(request=end.request, at_us=at_us, reason=end.reason)
        elif end.outcome is Outcome.FAILED:
            line = FailedLine(request=end.request, at_us=at_us, reason=end.reason)
        elif end.outcome is Outcome.REJECTED:
            line = RejectedLine(request=end.request, at_us=at_us, reason=end.reason)
        self._outcomes[end.request] = line

    def rejected(self, request: str, at_us: int, reason: str) -> None:
        """A request was turned away (absolute time)."""
        at_us -= self.start_us
        self._outcomes[request] = RejectedLine(request=request, at_us=at_us, reason=reason)

    def degraded(self, request: str, steps: int, width: int, height: int) -> None:
        """A request runs with less than was asked for."""
        line = DegradedLine(request=request, steps=steps, width=width, height=height)
        self._degraded[request] = line

    def steps(self, node: str, request: str) -> bool:
        """A node of a request is called step by step."""
        arrived = self.arrivals.get(request)
        passes = () if arrived is None else arrived.request.passes
        return any([p.node == node for p in passes]) if passes else node == DIT

    def lines(self) -> tuple[Line, ...]:
        """Header, runs and lost steps in order of sequence, outcomes in the order they came."""
        runs: list[Line] = []
        for ran in self._settled():
            runs += ran.lines(self.start_us, self._gpus)
        header = HeaderLine(workers=tuple(self._gpus), start=self._start)
        return (header, *runs, *self._degraded.values(), *self._outcomes.values())

    def text(self) -> str:
        """The log as JSONL."""
        return "".join(msgspec.json.encode(line).decode() + "\n" for line in self.lines())

    def _steps(self, fact: StepsEnded) -> None:
        assignment, ran = self._assignments.get(fact.sequence), self._ran.get(fact.sequence)
        if assignment is None or not (fact.step_time_us or ran):
            return
        moved_us = fact.load_time_us + fact.group_time_us + fact.transfer_time_us
        begin_us = fact.at_us - sum(fact.step_time_us)
        if ran is None:
            free_us = max(self._free_us.get(w, begin_us - moved_us) for w in assignment.workers)
            start_us = min(begin_us, max(begin_us - moved_us, free_us))
            stepped = self.steps(assignment.node, assignment.batch[0].request)
            ran = self._ran[fact.sequence] = _Ran(assignment, start_us, stepped)
            for member in assignment.batch:
                self._by_request.setdefault(member.request, []).append(fact.sequence)
        at_us = begin_us
        for step_us in fact.step_time_us:
            at_us += step_us
            ran.step_end_us.append(at_us)
        if not ran.stepped:  # one call, however many reports tell of it
            ran.step_end_us = ran.step_end_us[-1:]
        firsts = {m.request: m.first_step for m in assignment.batch}
        for p in fact.jobs:  # a replay that plans otherwise meets reports of strangers
            if p.request in firsts:
                took = p.steps_done - firsts[p.request] if ran.stepped else 1
                ran.took[p.request] = max(0, min(took, len(ran.step_end_us)))
        for worker in assignment.workers:
            self._free_us[worker] = at_us

    def _settled(self) -> list[_Ran]:
        """All runs, `kept` set: a later attempt's run undoes the steps that it runs again."""
        for ran in self._ran.values():
            ran.kept = {m.request: ran.took.setdefault(m.request, 0) for m in ran.assignment.batch}
        for request, sequences in self._by_request.items():
            again: dict[str, int] = {}  # by node: where a later run begins
            for sequence in sorted(sequences, reverse=True):
                ran = self._ran[sequence]
                if not ran.took[request]:
                    continue  # it left before the first step
                node, first = ran.assignment.node, ran.first_step(request)
                if node in again:
                    survives = again[node] - first
                    ran.kept[request] = max(0, min(ran.kept[request], survives))
                again[node] = min(first, again.get(node, first))
        return [self._ran[s] for s in sorted(self._ran)]
