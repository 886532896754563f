"""Which faults happen when: drawn by a seed, before anything runs.

A target that is being disturbed is left alone until it has had time to come back, so that faults of
different targets overlap and those of one do not: of three brokers two are always there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

KILL, TERM, STOP, SHAKE = "kill -9", "SIGTERM", "SIGSTOP", "shake"
WORKER, LEADER, STANDBY, GATEWAY, BROKER = "worker", "leader", "standby", "gateway", "broker"
TARGETS = (WORKER, LEADER, STANDBY, GATEWAY, BROKER)
_CONTROL = (LEADER, STANDBY)  # one leads, the other has to be able to: they are one target

# Act and how long it lasts in seconds; as often as it stands here.
_ACTS: tuple[tuple[str, float], ...] = (
    (KILL, 0.0),
    (KILL, 0.0),
    (TERM, 0.0),
    (STOP, 3.0),
    (STOP, 5.0),
    (STOP, 30.0),
    (SHAKE, 3.0),
)
_RECOVERY_S = 8.0  # after a fault of a target before its next one
_WARM_S = 3.0  # of undisturbed load before the first one


@dataclass(frozen=True)
class ChaosFault:
    """One disturbance."""

    at_s: float  # after the load began
    target: str
    act: str
    span_s: float  # 0: it is done at once
    pick: float  # [0, 1): which of several equal processes

    @property
    def kind(self) -> str:
        """By which it is reported."""
        span = f" {self.span_s:g} s" if self.span_s else ""
        target = "workers' pool" if (self.target, self.act) == (WORKER, TERM) else self.target
        return f"{self.act}{span}, {target}"


def draw(
    seed: int, seconds: float, targets: Sequence[str], gap_s: tuple[float, float]
) -> tuple[ChaosFault, ...]:
    """Faults in the order of their times; those of one target never overlap. Same seed, same
    faults. Each is over by `seconds`.
    """
    dice = random.Random(f"faults-{seed}")
    free_s = dict.fromkeys(targets, 0.0)
    found: list[ChaosFault] = []
    at_s = _WARM_S
    while at_s < seconds:
        target = dice.choice(list(targets))
        act, span_s = dice.choice(_ACTS)
        pick = dice.random()
        fits = at_s >= free_s[target] and at_s + span_s <= seconds
        if fits:
            found.append(ChaosFault(round(at_s, 2), target, act, span_s, pick))
            for one in _CONTROL if target in _CONTROL else (target,):
                free_s[one] = at_s + span_s + _RECOVERY_S
        at_s += dice.uniform(*gap_s) if fits else 0.25
    return tuple(found)
