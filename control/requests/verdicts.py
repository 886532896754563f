"""On time, late, or refused: what the scheduler's forecast makes of newcomers of one instant.

Runs where the scheduler runs. Newcomers queue behind each other, in order, and behind those that
were accepted a moment ago and have not reached the scheduler yet. Who is refused is in nobody's
way: those behind are forecast again without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from control.requests.degrade import Ladder
from control.scheduler.values import Forecast, OnMiss, Request, Shape

_ROUNDS_MAX = 8  # of forecasts over a batch; what is late in the last one is refused as it stands


class ForecastSource(Protocol):
    """The scheduler, as far as this asks it."""

    def forecast(self, requests: Sequence[Request], now_us: int) -> Sequence[Forecast]: ...

    def forecast_alone(self, request: Request, now_us: int) -> Forecast: ...

    def job(self, request_id: str) -> object | None: ...


@dataclass(frozen=True, slots=True)
class AdmissionCandidate:
    """A request at the door, and its cheaper variants (see degrade.py)."""

    request: Request
    ladders: tuple[Ladder, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is answered to one newcomer."""

    request: Request  # the variant that was chosen, where one was
    forecast: Forecast
    late: bool
    refused: bool
    degraded: bool = False  # it is a variant
    hopeless: bool = False  # refused, and would be if nobody else wanted anything

    @property
    def finish_us(self) -> int:
        return self.forecast.finish_us


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What is answered to all of them, in their order."""

    of: tuple[Verdict, ...]
    arrived: frozenset[str]  # of those accepted before, the ones that the scheduler knows now


def judge(
    scheduler: ForecastSource,
    ahead: Sequence[Request],
    newcomers: Sequence[AdmissionCandidate],
    now_us: int,
) -> Verdicts:
    """Verdicts over newcomers, behind `ahead`: accepted, and perhaps not yet at the scheduler."""
    arrived = frozenset(r.id for r in ahead if scheduler.job(r.id) is not None)
    before = [r for r in ahead if r.id not in arrived]
    verdicts: list[Verdict] = []
    rounds = 0
    while len(verdicts) < len(newcomers):
        rounds += 1
        waiting = newcomers[len(verdicts) :]
        queue = [*before, *(n.request for n in waiting)]
        forecasts = scheduler.forecast(queue, now_us)[len(before) :]
        for newcomer, forecast in zip(waiting, forecasts, strict=True):
            verdict = _verdict(scheduler, before, newcomer, forecast, now_us)
            verdicts.append(verdict)
            if not verdict.refused:
                before.append(verdict.request)
            if (verdict.refused or verdict.degraded) and rounds < _ROUNDS_MAX:
                break  # those behind it have another future now
    return Verdicts(tuple(verdicts), arrived)


def is_late(request: Request, forecast: Forecast) -> bool:
    """Whether it would miss its deadline; a firm promise holds for most of its futures."""
    return request.deadline_us is not None and told_us(request, forecast) > request.deadline_us


def told_us(request: Request, forecast: Forecast) -> int:
    """The finish that is compared with its deadline."""
    return forecast.finish_us_p95 if request.firm else forecast.finish_us


def _verdict(
    scheduler: ForecastSource,
    before: Sequence[Request],
    newcomer: AdmissionCandidate,
    forecast: Forecast,
    now_us: int,
) -> Verdict:
    request = newcomer.request
    if not is_late(request, forecast):
        return Verdict(request, forecast, late=False, refused=False)
    found = _cheapest(scheduler, before, newcomer, now_us)
    if found is not None:
        return found
    if request.on_miss is not OnMiss.REJECT:
        return Verdict(request, forecast, late=True, refused=False)
    hopeless = is_late(request, scheduler.forecast_alone(request, now_us))
    return Verdict(request, forecast, late=True, refused=True, hopeless=hopeless)


def _cheapest(
    scheduler: ForecastSource, before: Sequence[Request], newcomer: AdmissionCandidate, now_us: int
) -> Verdict | None:
    """The first variant, in ladder order, that is on time; fewer steps never take longer."""
    for ladder in newcomer.ladders:
        best: Verdict | None = None
        low, high = ladder.fewest, ladder.most
        steps = low  # the fewest first: where that is late, the whole ladder is
        while low <= high:
            request = _variant(newcomer.request, ladder, steps)
            forecast = scheduler.forecast((*before, request), now_us)[-1]
            if is_late(request, forecast):
                high = steps - 1
            else:
                best = Verdict(request, forecast, False, False, degraded=True)
                low = steps + 1
            steps = (low + high + 1) // 2
        if best is not None:
            return best
    return None


def _variant(request: Request, ladder: Ladder, steps: int) -> Request:
    shape = Shape(width=ladder.width, height=ladder.height, frames=request.shape.frames)
    return msgspec.structs.replace(request, steps=steps, shape=shape)
