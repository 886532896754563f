"""DisagFusion (arXiv 2605.25550), from the authors' code: notes sections 2.1 to 2.3.

Every worker has a role: encoder, transformer or decoder, and only its stage's weights. Each stage
has one queue, first come first served; an instance that is idle claims the next request by itself
(decentralised pull). One request at a time, no batches, no preemption, all steps of a request on
one transformer, at degree 1 (`degree`: an instance is that many workers).

    ratio ──▶ roles ──▶ pull                            every tick, with `scaling` not static:
                 ▲                                      weights by stage ──▶ target ──▶ one action
                 └── a drained worker starts anew in another role ◀─────────────────────────┘

A switch of roles is a new process: for `switch_us` the worker takes nothing, and its weights are
gone, so the first request pays their load. The source gives no seconds (a start times out at 90 s,
notes 5.5 advise a sweep of 10 to 90 s). `disagfusion_scaling` has targets and reconciliation.

What differs: transfers are prices of the mesh and not overlapped with the previous request
(prefetch depth 2 and the sender's thread would hide them); the rings are unbounded (128 slots);
stage times are learned per model, shape and steps, not per step count alone, from the mesh's own
latency model instead of each request's timings. Higher priority goes first, which the source does
not know. The ratio is scaled to the workers that there are, at least one a role; one or two
workers have all roles. If a role has lost its last worker, another changes at once, in any mode.
A new leader begins with the ratio.

With few requests inside, targets flip with each of them, and every flip costs a start: the authors
switched scaling off when they measured attainment. `static` is the better setting there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from ..settings import SettingError, Settings, SettingValue, Spec
from ..starts import Decision, Start
from ..values import DIT
from ..workflow import Section
from .base import EventPolicy
from .disagfusion_scaling import ROLES, Action, Scaling, StageTimes, backlog
from .shares import largest_remainder

if TYPE_CHECKING:
    from ..outlook.scene import Scene, Seat, Work

MODES = ("both", "predict", "feedback", "static")


class DisagFusion(EventPolicy):
    """Stage pools with the hybrid instance scheduler."""

    PRELOADS = True
    SPECS: ClassVar[Mapping[str, Spec]] = {
        "scaling": Spec("both", allowed=MODES),
        "ratio": Spec("1:6:1"),
        "degree": Spec(1, low=1, high=8),
        "tick_us": Spec(2_000_000, low=1),
        "cooldown_us": Spec(15_000_000, low=0),
        "switch_us": Spec(30_000_000, low=0),
    }

    def __init__(self, settings: Mapping[str, SettingValue]) -> None:
        self._mode = str(settings["scaling"])
        self._ratio = read_ratio(str(settings["ratio"]))
        self._degree = int(settings["degree"])
        self._tick_us = int(settings["tick_us"])
        self._switch_us = int(settings["switch_us"])
        self._ticked_us: int | None = None
        self._roles: dict[str, str] = {}  # worker -> node
        self._able: dict[str, tuple[str, ...]] = {}  # roles that a worker has weights for
        self._incarnations: dict[str, str] = {}
        self._starting: dict[str, int] = {}  # worker -> when its process is up
        self._times = StageTimes(learns=self._mode != "predict")
        self._scaling = Scaling(self._mode, int(settings["cooldown_us"]))

    @classmethod
    def made(cls, settings: Settings, read: Mapping[str, SettingValue]) -> DisagFusion:
        """From its own settings."""
        return cls(read)

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        return max((k for k in step_us if k <= self._degree), default=min(step_us, default=1))

    def decide(self, scene: Scene) -> Decision:
        """Roles of newcomers, at a tick one action, then pull."""
        preloads = self._join(scene)
        self._starting = {w: t for w, t in self._starting.items() if t > scene.now_us}
        self._times.follow(scene)
        action = None
        if len(scene.seats) >= len(ROLES):
            action = self._rescue(scene) or self._tick(scene)
        evicts: dict[str, frozenset[str]] = {}
        if action is not None:
            self._roles[action.worker] = action.role
            evicts[action.worker] = frozenset()
            if self._switch_us:
                self._starting[action.worker] = scene.now_us + self._switch_us
        starts = self._pull(scene)
        return Decision(starts, {}, self._wake_us(scene), evicts, preloads)

    # -------------------------------------------------------------------------- pull

    def _pull(self, scene: Scene) -> list[Start]:
        """Each stage's queue, oldest in the stage first, to its idle instances."""
        away = self._starting.keys() | self._scaling.draining
        idle = {s.name: s for s in scene.seats if s.idle and s.name not in away}
        pools = {node: [w for w in idle if self._serves(w, node)] for node in ROLES}
        starts: list[Start] = []
        for work in sorted(
            scene.works, key=lambda w: (-w.request.priority, w.waiting_since_us, w.order)
        ):
            role = ROLES[work.section]
            pool = pools[role] = [w for w in pools[role] if w in idle]
            if scene.mixed and not self._served(scene, work):
                pool = list(idle)
            if not pool:
                continue
            degree = 1
            if work.section is Section.STEPPED and self._degree > 1:
                degree = self.likely_degree(dict.fromkeys(scene.degrees(work.request), 0))
            able = [w for w in pool if scene.can(idle[w], work, degree)]
            if len(able) >= degree:
                workers = tuple(able[:degree])
                for worker in workers:
                    del idle[worker]
                starts.append(Start((work.id,), work.node, workers, work.steps_left, "pull"))
        return starts

    def _served(self, scene: Scene, work: Work) -> bool:
        """Somebody in its stage's role runs it; else whoever can does."""
        role = ROLES[work.section]
        return any(self._serves(s.name, role) and scene.can(s, work) for s in scene.seats)

    def _serves(self, worker: str, node: str) -> bool:
        return self._roles.get(worker, node) == node

    # -------------------------------------------------------------------------- roles

    def _join(self, scene: Scene) -> dict[str, tuple[tuple[str, str], ...]]:
        """Gives roles to all at first, later to who joins: the role most short of the ratio."""
        names = {s.name for s in scene.seats}
        self._scaling.draining = {w for w in self._scaling.draining if w in names}
        self._able = {s.name: _roles_of(s) for s in scene.seats}
        self._roles = {w: r for w, r in self._roles.items() if r in self._able.get(w, ())}
        new = [s for s in scene.seats if self._incarnations.get(s.name) != s.worker.incarnation]
        for seat in new:
            self._incarnations[seat.name] = seat.worker.incarnation
        if len(scene.seats) < len(ROLES):
            self._roles.clear()
        else:
            self._fill(scene)
        return {s.name: self._weights(s) for s in new}

    def _fill(self, scene: Scene) -> None:
        bare = [s.name for s in scene.seats if s.name not in self._roles]
        if not bare:
            return
        weights = {role: float(n) for role, n in zip(ROLES, self._ratio, strict=True)}
        spare = largest_remainder(weights, len(scene.seats))
        short = {role: max(1, n) for role, n in spare.items()}
        while sum(short.values()) > len(scene.seats):
            short[max(short, key=lambda r: short[r])] -= 1
        for role in self._roles.values():
            short[role] -= 1
        for name in bare:
            # in cluster order: encoders, transformers, decoders, as long as each is short
            able = self._able[name]
            role = next((r for r in able if short[r] > 0), DIT if DIT in able else able[0])
            self._roles[name] = role
            short[role] -= 1

    def _weights(self, seat: Seat) -> tuple[tuple[str, str], ...]:
        role = self._roles.get(seat.name)
        held = ((m, n) for m in seat.worker.models for n in seat.worker.nodes(m))
        return tuple((m, n) for m, n in held if role in (None, n))

    # -------------------------------------------------------------------------- scaling

    def _rescue(self, scene: Scene) -> Action | None:
        """Somebody for a role that nobody has; without, requests would wait for ever."""
        live = self._live()
        lost = [role for role in ROLES if live[role] == 0]
        if not lost:
            return None
        donors = [w for w in self._unused(scene) if live[self._roles[w]] > 1]
        for role in lost:
            able = [w for w in donors if role in self._able[w]]
            if able:
                return Action(max(able, key=lambda w: live[self._roles[w]]), role)
        return None

    def _tick(self, scene: Scene) -> Action | None:
        now_us = scene.now_us
        if self._mode == "static":
            return None
        if self._ticked_us is not None and now_us - self._ticked_us < self._tick_us:
            return None
        self._ticked_us = now_us
        weights = backlog(scene, self._times, only_next=self._mode == "feedback")
        return self._scaling.act(
            now_us,
            weights,
            self._roles,
            self._unused(scene),
            self._able,
        )

    def _unused(self, scene: Scene) -> list[str]:
        """Instances that are up and run nothing, not even something that is about to end."""
        busy = {w for r in scene.running for w in r.workers} | self._starting.keys()
        return [s.name for s in scene.seats if s.idle and s.name not in busy]

    def _live(self) -> dict[str, int]:
        roles = list(self._roles.values())
        return {role: roles.count(role) for role in ROLES}

    def _wake_us(self, scene: Scene) -> int | None:
        """The next tick, a process that is up: while there is anything to do, and anybody to."""
        if not scene.seats or not any(True for _ in scene.tracked()):
            return None
        times = list(self._starting.values())
        if self._mode != "static" and self._ticked_us is not None:
            times.append(max(self._ticked_us, scene.now_us) + self._tick_us)
        return min(times, default=None)


def _roles_of(seat: Seat) -> tuple[str, ...]:
    """Roles that a worker may have; one without any model's weights is taken for all of them."""
    held = {node for model in seat.worker.models for node in seat.worker.nodes(model)}
    return tuple(role for role in ROLES if role in held) or ROLES


def read_ratio(text: str) -> tuple[int, int, int]:
    """Encoders, transformers, decoders. Raises: SettingError."""
    try:
        encoders, transformers, decoders = (int(n) for n in text.split(":"))
    except ValueError:
        encoders = 0
    if encoders < 1 or transformers < 1 or decoders < 1:
        raise SettingError("disagfusion.ratio", text, "E:T:D, each at least 1")
    return encoders, transformers, decoders
