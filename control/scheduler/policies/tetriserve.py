"""TetriServe (arXiv 2510.01565), complete: allocation, packing, fill, scale-up.

    every job ── A minimal allocation (4.2.1) ──▶ options ── B knapsack (4.2.2, Alg. 1) ──▶ selected
    not selected, on time ── fill, earliest deadline first ──▶ leftover workers
    all running ── C elastic scale-up (4.2.3) ──▶ leftover workers
    late or without deadline ── best effort, narrow ──▶ what is then left

The paper leaves open: tie-break and fill (without which it procrastinates), the order of fill, the
gain of a scale-up, what late means before the deadline has passed. Those are settings or said
below. Decode is reserved for in each candidate's deadline, which the paper forgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from ..outlook.rounds import Window
from ..settings import Settings, SettingValue, Spec
from .allocation import minimal_allocation
from .base import Candidate, Choice
from .knapsack import Item, pack

_URGENT_FIRST = 1 << 20  # weight of running at all over running narrow, in the tie-break


class TetriServe:
    """Deadline-aware packing in rounds."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        "progress": Spec(True),  # tie-break of the knapsack towards running
        "fill": Spec(True),  # leftover workers to unselected requests, earliest deadline first
        "scale_up": Spec(True),
        "scale_up_gain": Spec("total", allowed=("total", "step")),  # time saved in all, or a step
        "scale_up_steps_min": Spec(1, low=1),  # "enough remaining steps"
        "best_effort_step_max_us": Spec(0, low=0),  # longer steps wait for an empty cluster; 0: off
        "patience_us": Spec(
            30_000_000, low=0
        ),  # best effort moves on at least that often; 0: never
    }

    def __init__(self, settings: Mapping[str, SettingValue], straddle: float) -> None:
        self._straddle = straddle
        self._progress = bool(settings["progress"])
        self._fill = bool(settings["fill"])
        self._scale_up = bool(settings["scale_up"])
        self._gain_in_all = settings["scale_up_gain"] == "total"
        self._scale_up_steps_min = int(settings["scale_up_steps_min"])
        self._best_effort_step_max_us = int(settings["best_effort_step_max_us"])
        self._patience_us = int(settings["patience_us"])

    @classmethod
    def made(cls, settings: Settings, read: Mapping[str, SettingValue]) -> TetriServe:
        """From the scheduler's settings and its own."""
        return cls(read, settings.straddle)

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """Scale-up tends towards the fastest."""
        return min(step_us, key=lambda k: (step_us[k], k))

    def choose(
        self, window: Window, candidates: tuple[Candidate, ...], workers: int
    ) -> tuple[Choice, ...]:
        """Stages A to C. Choices come in the order: overdue, selected, filled, best effort."""
        by_deadline = sorted(candidates, key=_urgency)
        on_time = [c for c in by_deadline if not is_late(c, window)]
        late = [c for c in by_deadline if is_late(c, window)]
        left = workers
        overdue = self._overdue(window, late, left)
        left -= sum(c.degree for c in overdue)
        late = [c for c in late if all(c.request != o.request for o in overdue)]
        chosen = self._select(window, on_time, left)
        left -= sum(c.degree for c in chosen)
        if self._fill:
            filled = self._fill_up(window, on_time, chosen, left)
            chosen += filled
            left -= sum(c.degree for c in filled)
        known = {c.request: c for c in candidates}
        if self._scale_up:
            chosen, left = self._widen(window, chosen, known, left)
        best_effort = self._best_effort(window, late, left, empty=not chosen and not overdue)
        left -= sum(c.degree for c in best_effort)
        if self._scale_up:
            best_effort, left = self._widen(window, best_effort, known, left)
        return (*overdue, *chosen, *best_effort)

    def _select(self, window: Window, on_time: Sequence[Candidate], workers: int) -> list[Choice]:
        """Stages A and B: options by minimal allocation, chosen by the knapsack."""
        options = [self._options(window, c, workers) for c in on_time]
        groups = [
            [Item(0, (survives(c, window, 0), 0))]
            + [Item(o.degree, self._value(window, c, o)) for o in some]
            for c, some in zip(on_time, options, strict=True)
        ]
        picks = pack(groups, workers)
        return [some[i - 1] for some, i in zip(options, picks, strict=True) if i > 0]

    def _options(self, window: Window, c: Candidate, workers: int) -> list[Choice]:
        """q = min(s, steps that fit the round), by part of the minimal allocation."""
        assert c.deadline_us is not None, "on time means there is a time"
        budget_us = c.deadline_us - max(window.start_us, c.available_us)
        parts = minimal_allocation(c.steps_left, budget_us, {k: c.safe_us[k] for k in c.degrees})
        if parts is None:  # only by the safe quantile is it late: as fast as can be
            steps = c.fits(window, c.fastest, self._straddle)
            found = [Choice(c.request, c.fastest, steps, "fastest")]
        else:
            found = [
                Choice(
                    c.request,
                    p.degree,
                    min(p.steps, c.fits(window, p.degree, self._straddle)),
                    "minimal",
                )
                for p in parts
            ]
        return [o for o in found if o.steps > 0 and o.degree <= workers]

    def _value(self, window: Window, c: Candidate, option: Choice) -> tuple[int, int]:
        progress = 0
        if self._progress:
            progress = _URGENT_FIRST * (1 + max(0, c.priority)) - option.degree
        return survives(c, window, option.steps), progress

    def _fill_up(
        self,
        window: Window,
        on_time: Sequence[Candidate],
        chosen: Sequence[Choice],
        workers: int,
    ) -> list[Choice]:
        """Unselected requests by deadline: an option of theirs that fits, else narrower."""
        selected = {c.request for c in chosen}
        filled: list[Choice] = []
        left = workers
        for c in on_time:
            if c.request in selected or left == 0:
                continue
            options = self._options(window, c, left)
            if not options:
                options = [
                    Choice(c.request, k, steps, "fill")
                    for k in c.degrees
                    if k <= left and (steps := c.fits(window, k, self._straddle)) > 0
                ]
                options = options[:1]
            if options:
                filled.append(replace(options[0], reason="fill"))
                left -= options[0].degree
        return filled

    def _best_effort(
        self, window: Window, late: Sequence[Candidate], workers: int, empty: bool
    ) -> list[Choice]:
        """Late requests and those without a deadline: narrow, and never in anybody's way."""
        chosen: list[Choice] = []
        left = workers
        for c in late:
            for degree in c.degrees:
                steps = c.fits(window, degree, self._straddle)
                if degree > left or steps == 0:
                    continue
                limit_us = self._best_effort_step_max_us
                if limit_us and c.mean_us[degree] > limit_us and not empty:
                    continue
                chosen.append(Choice(c.request, degree, steps, "best-effort"))
                left -= degree
                break
        return chosen

    def _overdue(self, window: Window, late: Sequence[Candidate], workers: int) -> list[Choice]:
        """The best-effort request that has waited longest beyond patience, narrow, one a window."""
        if not self._patience_us:
            return []
        waited = [c for c in late if window.start_us - c.waiting_since_us > self._patience_us]
        for c in sorted(waited, key=lambda c: (-c.priority, c.waiting_since_us, c.order)):
            degree = c.degrees[0]
            if degree <= workers:
                steps = max(1, c.fits(window, degree, self._straddle))
                return [Choice(c.request, degree, steps, "overdue", steps_min=1)]
        return []

    def _widen(
        self,
        window: Window,
        chosen: Sequence[Choice],
        known: Mapping[str, Candidate],
        workers: int,
    ) -> tuple[list[Choice], int]:
        """Stage C: leftover workers to whoever gains most, one widening at a time."""
        choices = list(chosen)
        left = workers
        while left > 0:
            best: tuple[int, int, Choice] | None = None
            for i, choice in enumerate(choices):
                wider = self._wider(window, choice, known[choice.request], left)
                if wider is not None and (best is None or wider[0] > best[0]):
                    best = (wider[0], i, wider[1])
            if best is None:
                break
            left -= best[2].degree - choices[best[1]].degree
            choices[best[1]] = best[2]
        return choices, left

    def _wider(
        self, window: Window, choice: Choice, c: Candidate, workers: int
    ) -> tuple[int, Choice] | None:
        if c.steps_left < self._scale_up_steps_min:
            return None
        now_us = c.mean_us[choice.degree]
        for degree in c.degrees:
            wider = degree > choice.degree and degree - choice.degree <= workers
            if wider and c.mean_us[degree] < now_us:
                steps = c.fits(window, degree, self._straddle)
                if steps == 0:
                    continue
                gain_us = (now_us - c.mean_us[degree]) * (c.steps_left if self._gain_in_all else 1)
                return gain_us, Choice(c.request, degree, steps, "scale-up")
        return None


def is_late(c: Candidate, window: Window) -> bool:
    """No deadline, or it cannot be kept even alone at the fastest degree from now on."""
    start_us = max(window.start_us, c.available_us)
    return c.deadline_us is None or start_us + c.steps_left * c.mean_us[c.fastest] > c.deadline_us


def survives(c: Candidate, window: Window, steps: int) -> int:
    """sv of Algorithm 1: what is left at the next boundary can still be done at full speed."""
    assert c.deadline_us is not None
    left_us = (c.steps_left - steps) * c.mean_us[c.fastest]
    return int(window.end_us + left_us <= c.deadline_us or steps >= c.steps_left)


def _urgency(c: Candidate) -> tuple[int, bool, int, int]:
    """Higher priority, then earlier deadline (none: last), then earlier arrival."""
    return (-c.priority, c.deadline_us is None, c.deadline_us or 0, c.order)
