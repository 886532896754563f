"""Newcomers as admission sees them: what they ask of the pools, and what wakes a model.

The scheduler's forecasts know nothing of workers that are not there yet. Here a newcomer whose
model no living worker serves finishes later by the time that a worker takes to start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from control.requests.verdicts import ForecastSource, Verdict
from control.scheduler.values import Forecast, Request

_KINDS_MAX = 4_096  # between two looks


class Newcomers:
    """Counts them between two looks of the scaling signal."""

    def __init__(
        self, asleep: Callable[[], Collection[str]] = tuple, start_us: int = 60_000_000
    ) -> None:
        """`asleep` are models that requests may wake, in `start_us`."""
        self._asleep = asleep
        self._start_us = start_us
        self._counts: Counter[Request] = Counter()  # of those that ask for the same
        self._late: Counter[str] = Counter()

    def forecasts(
        self, source: ForecastSource, models: Mapping[str, Collection[str]] | None = None
    ) -> ForecastSource:
        """What admission asks instead of the scheduler. `models`: those that requests need, by id,
        where they are more than those of their steps.
        """
        asleep = self._asleep()
        if not asleep:
            return source
        return WakingForecasts(source, asleep, self._start_us, models or {})

    def judged(self, verdicts: Sequence[Verdict]) -> None:
        """What admission made of newcomers. Who is refused as late asked for work, too, unless it
        would be late on an idle cluster.
        """
        for verdict in verdicts:
            if verdict.hopeless:
                continue
            kind = msgspec.structs.replace(
                verdict.request, id="", tenant="", priority=0, deadline_us=None, firm=False
            )
            if kind in self._counts or len(self._counts) < _KINDS_MAX:
                self._counts[kind] += 1
            self._late[verdict.request.model] += verdict.refused

    def take(self) -> tuple[list[tuple[Request, int]], Counter[str]]:
        """Requests, with how many like each came since the last time; by model how many of them
        were refused as late.
        """
        found, late = list(self._counts.items()), self._late
        self._counts, self._late = Counter(), Counter()
        return found, late


class WakingForecasts:
    """The scheduler's forecasts, later by `start_us` where a request needs a model that no living
    worker serves: workers of several models start beside each other.
    """

    def __init__(
        self,
        source: ForecastSource,
        asleep: Collection[str],
        start_us: int,
        models: Mapping[str, Collection[str]],
    ) -> None:
        self._source = source
        self._asleep = asleep
        self._start_us = start_us
        self._models = models

    def forecast(self, requests: Sequence[Request], now_us: int) -> Sequence[Forecast]:
        """When newcomers of one instant would finish, each behind those before it."""
        told = self._source.forecast(requests, now_us)
        return [self._later(r, each) for r, each in zip(requests, told, strict=True)]

    def forecast_alone(self, request: Request, now_us: int) -> Forecast:
        """When a newcomer would finish if nobody else wanted anything."""
        return self._later(request, self._source.forecast_alone(request, now_us))

    def job(self, request_id: str) -> object | None:
        """What the scheduler knows of a request inside."""
        return self._source.job(request_id)

    def _later(self, request: Request, told: Forecast) -> Forecast:
        stepped = [each.model for each in request.passes]
        needed = (request.model, *stepped, *self._models.get(request.id, ()))
        if not any(model in self._asleep for model in needed):
            return told
        return msgspec.structs.replace(
            told,
            finish_us=told.finish_us + self._start_us,
            finish_us_p95=told.finish_us_p95 + self._start_us,
        )
