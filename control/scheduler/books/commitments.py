"""What newcomers were told, and what came of it: the calibration of the next answers.

    told(finish, on time)  ──▶  ended  ──▶  ratio of real to predicted latency, by class
                                       ──▶  firm: kept or broken ──▶ margin

The *ratios* of a class (firm, soft, best effort) give the p95 of a forecast; the newest of them are
kept, so that a quantile follows what changes. The *margin* is what a firm promise needs beyond its
predicted latency: each broken one raises it by much, each kept one lowers it by little, in the
proportion that settles where `FIRM_BROKEN` of them are broken (adaptive conformal inference, Gibbs
and Candes 2021). Both are learned from facts alone, so that a replay learns the same; and a new
leader learns them once more from what was told and what came of it before its time (`restore`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from ..values import Arrived, Ended, Outcome, Request

OPEN_MAX = 65_536  # answers whose requests have not ended; the oldest are forgotten
RATIOS_MAX = 256  # newest ones of a class
RATIOS_MIN = 20  # fewer say nothing about a tail
RATIO_UNKNOWN = 1.1  # p95 of a class of which little is known
FIRM_BROKEN = 0.002  # part of firm promises that may be broken
MARGIN_GAIN = 0.02
MARGIN_MAX = 0.5
QUANTILE = 0.95

FIRM, SOFT, BEST_EFFORT = "firm", "soft", "best_effort"


class PromiseFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of requests that were told something and have ended, cancelled ones left out."""

    promised: int  # told "on time"
    kept: int  # and were
    firm_promised: int  # of the promised, firmly
    firm_kept: int
    with_deadline: int
    on_time: int  # of those with a deadline
    margin: float  # part of its predicted latency that a firm promise needs on top
    latency_ratio_p95: dict[str, float]  # real over predicted, by class


@dataclass(frozen=True, slots=True)
class _Told:
    """One answer."""

    at_us: int
    latency_us: int
    kind: str
    deadline: bool
    on_time: bool


@dataclass(slots=True)
class _Ratios:
    """The newest ratios of a class, by age and by size."""

    newest: deque[float] = field(default_factory=deque)
    ordered: list[float] = field(default_factory=list)

    def add(self, ratio: float) -> None:
        if len(self.newest) == RATIOS_MAX:
            del self.ordered[bisect_left(self.ordered, self.newest.popleft())]
        self.newest.append(ratio)
        insort(self.ordered, ratio)

    def quantile(self) -> float:
        """At least 1: nobody is promised more than was predicted."""
        if len(self.ordered) < RATIOS_MIN:
            return RATIO_UNKNOWN
        return max(1.0, self.ordered[int(QUANTILE * (len(self.ordered) - 1))])


@dataclass(slots=True)
class Commitments:
    """Bounded memory of what was told; all times on the control plane's clock."""

    margin: float = 0.0
    _open: dict[str, _Told] = field(default_factory=dict)
    _ratios: dict[str, _Ratios] = field(
        default_factory=lambda: {kind: _Ratios() for kind in (FIRM, SOFT, BEST_EFFORT)}
    )
    _promised: int = 0
    _kept: int = 0
    _firm_promised: int = 0
    _firm_kept: int = 0
    _with_deadline: int = 0
    _on_time: int = 0

    def told(self, fact: Arrived) -> None:
        """A newcomer came in with what it was told; of a repeat the first counts."""
        if fact.promised_us is None or fact.request.id in self._open:
            return
        latency_us = max(1, fact.promised_us - fact.at_us)
        deadline = fact.request.deadline_us is not None
        kind = kind_of(fact.request)
        told = _Told(fact.at_us, latency_us, kind, deadline, deadline and fact.on_time)
        self._open[fact.request.id] = told
        if len(self._open) > OPEN_MAX:
            del self._open[next(iter(self._open))]

    def ended(self, end: Ended) -> None:
        """A request ended: how good was the answer?"""
        told = self._open.pop(end.request, None)
        if told is None or end.outcome is Outcome.CANCELLED:
            return
        if end.outcome is Outcome.DONE and (told.on_time or not told.deadline):
            self._ratios[told.kind].add((end.at_us - told.at_us) / told.latency_us)
        self._with_deadline += told.deadline
        self._on_time += told.deadline and end.on_time
        self._promised += told.on_time
        self._kept += told.on_time and end.on_time
        if told.on_time and told.kind == FIRM:
            self._firm_promised += 1
            self._firm_kept += end.on_time
            change = -FIRM_BROKEN if end.on_time else 1.0 - FIRM_BROKEN
            self.margin = min(MARGIN_MAX, max(0.0, self.margin + MARGIN_GAIN * change))

    def restore(self, past: Iterable[tuple[Arrived, Ended | None]]) -> None:
        """Learns from answers of an earlier scheduler and what came of them, in the order of their
        ends; None: not ended yet. Before the first fact. They are learned from, and not counted.
        """
        for arrived, end in past:
            self.told(arrived)
            if end is not None:
                self.ended(end)
        self._promised = self._kept = self._firm_promised = self._firm_kept = 0
        self._with_deadline = self._on_time = 0

    def finish_us_p95(self, request: Request, now_us: int, finish_us: int) -> int:
        """p95 of a forecast. A firm one is not after its deadline exactly if it may be promised:
        then the promise itself bounds it.
        """
        latency_us = finish_us - now_us
        wide_us = now_us + round(latency_us * self._ratios[kind_of(request)].quantile())
        if not request.firm or request.deadline_us is None:
            return wide_us
        if now_us + round(latency_us * (1.0 + self.margin)) <= request.deadline_us:
            return min(wide_us, request.deadline_us)
        return max(wide_us, request.deadline_us + 1)

    def figures(self) -> PromiseFigures:
        """Counts since the start."""
        return PromiseFigures(
            promised=self._promised,
            kept=self._kept,
            firm_promised=self._firm_promised,
            firm_kept=self._firm_kept,
            with_deadline=self._with_deadline,
            on_time=self._on_time,
            margin=self.margin,
            latency_ratio_p95={kind: r.quantile() for kind, r in self._ratios.items()},
        )


def kind_of(request: Request) -> str:
    """Class of an answer."""
    if request.deadline_us is None:
        return BEST_EFFORT
    return FIRM if request.firm else SOFT
