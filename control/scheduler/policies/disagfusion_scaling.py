"""DisagFusion's hybrid instance scheduler (notes section 2.3.2): how many instances a stage gets.

    weight of a stage = its time x requests that still need it + its time x requests queued for it
    target            = one each, the rest by largest remainder, and two rules for the ends
    reconcile         = at most one action a tick, fifteen seconds apart, never a busy victim

Who is queued counts twice, as published: that is what makes a backlog of long requests pull workers
into the transformer stage. `feedback` counts a request for its next stage only; `predict` keeps the
profile's times. Of shapes and step counts in flight, the most frequent prices the queues.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..books.lifecycle import JobState
from ..values import DIT, TEXT, VAE, Request, Shape
from .shares import largest_remainder

if TYPE_CHECKING:
    from ..outlook.scene import Scene

ROLES = (TEXT, DIT, VAE)  # encoder, transformer, decoder: by section of the workflow
KEEP = 0.8  # of the old value, when a stage time is updated
Kind = tuple[str, Shape, int, str]  # model, shape, steps, workflow


class Action(NamedTuple):
    """A worker starts anew in another role."""

    worker: str
    role: str


class StageTimes:
    """Time of each stage by kind of request: the profile's, then a moving average."""

    def __init__(self, learns: bool) -> None:
        self._learns = learns
        self._us: dict[Kind, dict[str, float]] = {}
        self._inside: dict[str, Request] = {}

    def follow(self, scene: Scene) -> None:
        """Seeds kinds that are new; updates those of requests that are gone."""
        inside = {t.id: t.request for t in scene.tracked()}
        for name, request in self._inside.items():
            if name not in inside and self._learns:
                times = self._us[_kind(request)]
                for role, new_us in _stages(scene, request).items():
                    times[role] = KEEP * times[role] + (1 - KEEP) * new_us
        for request in inside.values():
            if _kind(request) not in self._us:
                self._us[_kind(request)] = _stages(scene, request)
        self._inside = inside

    def of(self, request: Request) -> Mapping[str, float]:
        return self._us[_kind(request)]


def backlog(scene: Scene, times: StageTimes, only_next: bool) -> dict[str, float]:
    """Weight of each stage."""
    weights = dict.fromkeys(ROLES, 0.0)
    votes: dict[Kind, int] = {}
    example: dict[Kind, Request] = {}
    for tracked in scene.tracked():
        kind = _kind(tracked.request)
        votes[kind] = votes.get(kind, 0) + 1
        example[kind] = tracked.request
        stages = (tracked.before, (tracked.stepped,), tracked.after)
        left = [
            role
            for role, jobs in zip(ROLES, stages, strict=True)
            if any(job.state is not JobState.DONE for job in jobs)
        ]
        for role in left[:1] if only_next else left:
            weights[role] += times.of(tracked.request)[role]
    if not votes:
        return weights
    # as published, a tie goes to fewer steps
    kind = min(votes, key=lambda k: (-votes[k], k[2], sum(times.of(example[k]).values())))
    for work in scene.works:
        role = ROLES[work.section]
        weights[role] += times.of(example[kind])[role]
    return weights


def target(weights: Mapping[str, float], budget: int, feedback: bool) -> dict[str, int]:
    """Instances of each role, of `budget` >= 3 in all."""
    raw = {role: max(weights[role], 0.001) for role in ROLES}
    total = sum(raw.values())
    rest = largest_remainder(raw, budget - len(ROLES))
    counts = {role: 1 + rest[role] for role in ROLES}
    encoding = raw[TEXT] / total >= 0.4 and weights[DIT] + weights[VAE] > 0
    if counts[TEXT] > 1 and (feedback or not encoding):
        counts[DIT if raw[DIT] >= raw[VAE] else VAE] += counts[TEXT] - 1
        counts[TEXT] = 1
    scarce = weights[VAE] > 0 and counts[VAE] < 2 and counts[DIT] > 4
    if scarce and raw[DIT] < 4 * raw[VAE]:
        counts[DIT] -= 1
        counts[VAE] += 1
    return counts


class Scaling:
    """From targets to actions."""

    def __init__(self, mode: str, cooldown_us: int) -> None:
        self._mode = mode
        self._cooldown_us = cooldown_us
        self._scaled_us: int | None = None
        self.draining: set[str] = set()  # claim nothing more

    def act(
        self,
        now_us: int,
        weights: Mapping[str, float],
        roles: Mapping[str, str],
        idle: Sequence[str],
        able: Mapping[str, Collection[str]] | None = None,
    ) -> Action | None:
        """One tick: at most one worker changes its role or begins to drain.

        `roles` and `idle` in cluster order; who is starting is not idle. `able`: roles that each
        may have; all, without it.
        """
        if sum(weights.values()) == 0:
            return None
        counts = target(weights, len(roles), self._mode == "feedback")
        live = {role: sum(r == role for r in roles.values()) for role in ROLES}
        short = sorted(ROLES, key=lambda r: live[r] - counts[r])
        needed = [role for role in short if live[role] < counts[role]]
        if not needed:
            self.draining.clear()
            return None
        cooling = self._scaled_us is not None and now_us - self._scaled_us < self._cooldown_us
        surplus = [r for r in reversed(short) if live[r] > max(1, counts[r])]
        for role in surplus:
            ranks = [
                w for w in roles if roles[w] == role and (able is None or needed[0] in able[w])
            ]
            drained = [w for w in ranks if w in self.draining and w in idle]
            free = drained or ([] if cooling else [w for w in ranks if w in idle])
            if free:
                self.draining.discard(free[0])
                self._scaled_us = now_us
                return Action(free[0], needed[0])
            if ranks and not cooling and not self.draining.intersection(ranks):
                self.draining.add(ranks[-1])
                return None
        return None


def _stages(scene: Scene, request: Request) -> dict[str, float]:
    return {
        TEXT: float(scene.before_us(request)),
        DIT: float(request.steps * scene.step_us(request)),
        VAE: float(scene.after_us(request)),
    }


def _kind(request: Request) -> Kind:
    return (request.model, request.shape, request.steps, request.workflow)
