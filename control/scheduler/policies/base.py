"""What a policy is. Three kinds: those that choose widths for a window (a round), those that decide
at events what starts, and planners, which turn the ledger into starts by themselves.

A window policy decides widths, not places and not times: `placement.py` binds widths to workers,
and an assignment's steps follow from the start that the binding gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from ..books.ledger import Ledger
from ..outlook.rounds import Window
from ..outlook.scene import Scene
from ..settings import Settings, SettingValue, Spec
from ..starts import Decision, Issue, Planned
from ..values import Request


@dataclass(frozen=True, slots=True)
class Candidate:
    """One denoise job that could run in a window."""

    request: str
    order: int  # rank of arrival
    priority: int
    deadline_us: int | None  # of its last denoising step; None: best effort
    available_us: int  # its latent is there, and no earlier assignment of it runs
    waiting_since_us: int  # last time it made progress
    steps_left: int
    degrees: tuple[int, ...]  # ascending
    mean_us: Mapping[int, int]  # of one step, by degree
    safe_us: Mapping[int, int]
    group: tuple[str, ...]  # ran its last step, or will have
    holders: tuple[str, ...]  # will hold its latent

    @property
    def fastest(self) -> int:
        """Degree of the shortest step; the narrowest of equals."""
        return min(self.degrees, key=lambda k: (self.mean_us[k], k))

    def fits(self, window: Window, degree: int, straddle: float) -> int:
        """Steps that can start in the window at this degree; the last may straddle its end."""
        start_us = max(window.start_us, self.available_us)
        return steps_in(window.end_us - start_us, self.mean_us[degree], straddle, self.steps_left)


def steps_in(span_us: int, step_us: int, straddle: float, steps_left: int) -> int:
    """Whole steps in a span, and one more if at least the part `straddle` of it still fits.

    1.0 is the published rule (`floor`), 0.5 rounds to nearest: a step that straddles a boundary
    keeps its progress, so the question is only which idles less.
    """
    whole, rest_us = divmod(max(0, span_us), step_us)
    more = rest_us > 0 and rest_us >= straddle * step_us
    return min(steps_left, whole + more)


@dataclass(frozen=True, slots=True)
class Choice:
    """A width for one job in this window."""

    request: str
    degree: int
    steps: int  # at most that many
    reason: str
    steps_min: int = 0  # that many start even if the window is shorter than one of them


class Policy(Protocol):
    """Chooses at most one width a candidate; the sum of widths is at most `workers`."""

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """The degree at which most steps of a request will run, for estimates; times by degree."""
        ...

    def choose(
        self, window: Window, candidates: tuple[Candidate, ...], workers: int
    ) -> tuple[Choice, ...]:
        """Widths in the order in which they are to be bound."""
        ...


class EventPolicy(ABC):
    """Decides at events what starts now; asked at every arrival and end of an assignment.

    A policy may keep notes of its own, but a new leader starts without them and must do.
    """

    SPECS: ClassVar[Mapping[str, Spec]] = {}
    PRELOADS: ClassVar[bool] = False  # says itself which weights workers start with

    @abstractmethod
    def decide(self, scene: Scene) -> Decision:
        """What starts now: only idle workers, each once; only works of the scene, each once."""

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """The degree at which most steps of a request will run, for estimates."""
        return min(step_us, key=lambda k: (step_us[k], k))


class Newcomer(NamedTuple):
    """What a forecast says of one newcomer."""

    finish_us: int | None  # None: late, or nobody can run it
    late: bool


NOBODY = Newcomer(None, late=False)


class Planner(ABC):
    """Turns the ledger into starts; never changes it otherwise."""

    operations: int = 0  # of the last plan, where the planner counts them
    foresees: ClassVar[bool] = False  # newcomers are judged by its own forecast, at safe times

    @abstractmethod
    def plan(self, ledger: Ledger, now_us: int, issue: Issue) -> Planned:
        """Decides what goes out now, and issues it."""

    @abstractmethod
    def wake_us(self, ledger: Ledger, planned_us: int | None) -> int | None:
        """When to plan if no fact comes before."""

    @abstractmethod
    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """The degree at which most steps of a request will run, for estimates."""

    def newcomers(self, ledger: Ledger, requests: Sequence[Request], now_us: int) -> list[Newcomer]:
        """When requests that arrived now would be done, as far as it makes such a forecast."""
        return [NOBODY] * len(requests)


@dataclass(frozen=True, slots=True)
class Registered:
    """How a policy is made: its settings, and a maker that gets all of them, checked."""

    specs: Mapping[str, Spec]
    make: Callable[[Settings, Mapping[str, SettingValue]], Policy | EventPolicy | Planner]
