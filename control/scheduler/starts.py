"""What planners and policies hand over: runs to begin, requests to turn away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .values import Assignment


@dataclass(frozen=True, slots=True)
class Start:
    """Several jobs of one model and shape (or one) for some steps on an ordered list of workers."""

    requests: tuple[str, ...]
    node: str
    workers: tuple[str, ...]
    steps: int
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy wants; starts in the order in which they go out."""

    starts: Sequence[Start] = ()
    rejects: Mapping[str, str] = field(default_factory=dict)  # request -> reason
    wake_us: int | None = None  # ask again then, whatever happens
    evicts: Mapping[str, frozenset[str]] = field(default_factory=dict)  # worker -> parts that stay
    # worker -> (model, node) that lie there already: put there before the first request
    preloads: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)


# Numbers a start that can begin at that time, enters it on the board, moves its jobs.
Issue = Callable[[Start, int], Assignment]


@dataclass(slots=True)
class Planned:
    """What a plan holds beside the assignments that were issued."""

    round: int
    start_us: int
    rejects: Mapping[str, str] = field(default_factory=dict)  # request -> reason
