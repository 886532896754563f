"""What callers saw, in order, and how soon things went on after a fault."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.chaos.faults import BROKER, GATEWAY, LEADER, WORKER, ChaosFault

NOISE_S = 0.05  # what was on its way when a fault happened still arrives
FINISHED, CANCELLED, FAILED, GIVEN_UP, QUIT = "finished", "cancelled", "failed", "given up", "quit"


@dataclass
class ObservedCall:
    """One call as its caller saw it; times in seconds since the load began."""

    key: str
    behaviour: str
    asked_s: float
    ids: list[str] = field(default_factory=list)  # request ids it was told, each once
    uploaded: str = ""  # name of the picture that it brought, in the store of inputs
    accepted_s: float | None = None
    gateway: str = ""  # that it now listens to
    workers: tuple[str, ...] = ()  # that ran its last step
    breaks: int = 0  # streams that broke
    refusals: list[str] = field(default_factory=list)  # before it was accepted
    finishes: int = 0  # `finished` messages in one stream
    ended: str = ""  # FINISHED …; empty: not yet
    ended_s: float = 0.0
    picture: str = ""  # how its file compares
    problem: str = ""


@dataclass(frozen=True)
class Struck:
    """A fault that was done."""

    fault: ChaosFault
    at_s: float
    victim: str  # name of the process
    affected: frozenset[str]  # keys of the calls that it concerned
    probe: str  # key of the call that asked just then


@dataclass
class History:
    """Everything that was seen."""

    calls: dict[str, ObservedCall] = field(default_factory=dict)
    progress_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    struck: list[Struck] = field(default_factory=list)

    def affected(self, fault: ChaosFault, victim: str) -> frozenset[str]:
        """Calls that are under way and lean on the victim."""
        running = [s for s in self.calls.values() if s.accepted_s is not None and not s.ended]
        if fault.target == WORKER:
            pool = victim.startswith("workers")  # all of them may be concerned
            running = [s for s in running if pool or victim in s.workers]
        elif fault.target == GATEWAY:
            running = [s for s in running if s.gateway == victim]
        elif fault.target not in (LEADER, BROKER):
            running = []
        return frozenset(s.key for s in running if self.progress_s[s.key])

    def to_progress_s(self, struck: Struck) -> float | None:
        """Seconds from a fault to the next progress (or end) of a call that it concerned."""
        times = [at for key in struck.affected for at in self._signs(key)]
        later = [at for at in times if at > struck.at_s + NOISE_S]
        return min(later) - struck.at_s if later else None

    def to_accepted_s(self, struck: Struck) -> float | None:
        """Seconds from a fault to the acceptance of the call that asked just then."""
        observed = self.calls.get(struck.probe)
        if observed is None or observed.accepted_s is None:
            return None
        return observed.accepted_s - struck.at_s

    def _signs(self, key: str) -> list[float]:
        observed = self.calls[key]
        return [*self.progress_s[key], *([observed.ended_s] if observed.ended else [])]


def by_kind(history: History) -> list[dict[str, object]]:
    """One row a kind of fault: how often, and recovery times in seconds."""
    kinds: dict[str, list[Struck]] = defaultdict(list)
    for one in history.struck:
        kinds[one.fault.kind].append(one)
    rows: list[dict[str, object]] = []
    for kind in sorted(kinds, key=lambda k: (kinds[k][0].fault.target, k)):
        progress = [history.to_progress_s(one) for one in kinds[kind]]
        accepted = [history.to_accepted_s(one) for one in kinds[kind]]
        rows.append(
            {
                "kind": kind,
                "faults": len(kinds[kind]),
                "progress_s": spread(t for t in progress if t is not None),
                "accepted_s": spread(t for t in accepted if t is not None),
            }
        )
    return rows


def spread(values: Iterable[float]) -> dict[str, float]:
    """Number, p50, p99 and largest of some times; empty where there are none."""
    ordered = sorted(values)
    if not ordered:
        return {}
    last = len(ordered) - 1
    middle, high = ordered[round(0.5 * last)], ordered[round(0.99 * last)]
    told = {"n": len(ordered), "p50": middle, "p99": high, "max": ordered[-1]}
    return {name: round(value, 3) for name, value in told.items()}
