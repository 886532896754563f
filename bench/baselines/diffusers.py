"""Whole pipelines on single workers: what a server without stages or steps does, and `diffusers`.

A pipeline holds one worker from encode to decode, at batch 1 and degree 1 (LegoDiffusion artifact,
notes section 1.8). One dispatch rule for all: pop the head; if it waited beyond its timeout, drop
it; give it the lowest-ranked idle worker that may run its pipeline; if there is none, put it at the
tail and poll again. A worker keeps whole pipelines, least recently used first out.

Nothing has to reserve a worker: what goes on goes on at the very event that ended the node before,
ahead of everybody who waits.

`diffusers` (Diffusers, `basic`): each worker serves one pipeline, which it has from the start.

The sources leave open:
    timeout    here the deadline; `drop` false: served however late
    tail       the head goes to the tail every 10 us, so whose turn it is when a worker gets idle
               hangs on the time waited: `requeue` tail (default, and better under load, where the
               order of arrival serves everybody too late) emulates that, fifo leaves the order of
               arrival; higher priority first in either
    partition  the artifact's lists are fixed by hand: `partition` takes such a list,
               "model=0,1,4;other=2,5" by rank of worker; empty: each worker the model that has
               fewest, which gives the artifact's sizes (3, 3, 2)
    budget     part of a worker's memory for pipelines (the artifact takes 0.9 of 0.9 of the card)
Without weights (no table, or workers without a memory figure) every pipeline is everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from control.scheduler.policies.base import EventPolicy
from control.scheduler.settings import SettingError, Settings, SettingValue, Spec
from control.scheduler.starts import Decision, Start
from control.scheduler.values import DIT, TEXT, VAE

if TYPE_CHECKING:
    from control.scheduler.outlook.scene import Scene, Seat, Work
    from control.scheduler.values import Request

Parts = frozenset[str]
NODES = (TEXT, DIT, VAE)
POLL_US = 10  # the artifact's coordinator polls every 10 us


class Pipelines(EventPolicy):
    """Dispatches whole pipelines. Who may serve what, and what that evicts, is for subclasses."""

    PRELOADS = True

    SPECS: ClassVar[Mapping[str, Spec]] = {
        "drop": Spec(True),
        "requeue": Spec("tail", allowed=("tail", "fifo")),
        "budget": Spec(1.0, low=0.1, high=1.0),
    }

    def __init__(self, settings: Mapping[str, SettingValue]) -> None:
        self._drop = bool(settings["drop"])
        self._rotates = settings["requeue"] == "tail"
        self._budget = float(settings["budget"])
        self._queue: list[str] = []  # ids, the next to be popped first
        self._polled_us = 0
        self._incarnations: dict[str, str] = {}
        self._loaded: dict[str, list[str]] = {}  # worker -> models, least recently used first
        self._held: dict[str, tuple[str, int]] = {}  # request -> worker being readied, until when

    @classmethod
    def made(cls, settings: Settings, read: Mapping[str, SettingValue]) -> Self:
        """From the scheduler's settings and its own."""
        return cls(read)

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        return min(step_us)

    # -------------------------------------------------------------------------- for subclasses

    def allowed(self, scene: Scene, seat: Seat, model: str) -> bool:
        """The worker may run the pipeline."""
        return seat.worker.can(model)

    def join(self, scene: Scene, seat: Seat) -> list[str]:
        """Models that a new worker has before its first request."""
        self._loaded[seat.name] = []
        return []

    def choose(self, scene: Scene, request: Request, idle: Iterable[Seat]) -> Seat | None:
        """One of the idle workers that may; the lowest-ranked."""
        return next(iter(idle), None)

    def enter(self, scene: Scene, seat: Seat, model: str) -> tuple[Parts | None, int]:
        """A pipeline begins: the weights that stay on the worker (None: all), time to be ready."""
        return self.swap(scene, seat, model), 0

    def proceed(self, scene: Scene, seat: Seat, work: Work) -> Parts | None:
        """A pipeline's next node begins: the weights that stay on the worker (None: all)."""
        return None

    # -------------------------------------------------------------------------- the rule

    def decide(self, scene: Scene) -> Decision:
        """Pipelines under way first, then the queue."""
        decision = _Draft({s.name: s for s in scene.seats if s.idle})
        preloads = self._joined(scene)
        waiting = {w.id: w for w in scene.works if w.node == TEXT}
        for work in scene.works:
            if work.node != TEXT and work.where[0] in decision.idle:
                self._go(scene, decision, work, decision.idle[work.where[0]])
            elif work.node != TEXT:
                decision.astray.append(work)
        self._ready(scene, decision, waiting)
        for work in decision.astray:  # their worker is gone, or leaving
            able = (s for s in decision.idle.values() if self.allowed(scene, s, work.request.model))
            seat = self.choose(scene, work.request, able)
            if seat is not None:
                self._go(scene, decision, work, seat)
        for work in self._in_turn(scene, waiting):
            deadline_us = work.request.deadline_us
            if self._drop and deadline_us is not None and scene.now_us > deadline_us:
                decision.rejects[work.id] = "TIMEOUT"
                continue
            self._dispatch(scene, decision, work)
        ready_us = [until_us for _, until_us in self._held.values()]
        return Decision(
            decision.starts,
            decision.rejects,
            min(ready_us, default=None),
            decision.evicts,
            preloads,
        )

    def _dispatch(self, scene: Scene, decision: _Draft, work: Work) -> None:
        model = work.request.model
        able = (s for s in decision.idle.values() if self.allowed(scene, s, model))
        seat = self.choose(scene, work.request, able)
        if seat is None:
            return
        stay, ready_us = self.enter(scene, seat, model)
        if stay is not None:
            decision.evicts[seat.name] = stay
        if ready_us:
            self._held[work.id] = (seat.name, scene.now_us + ready_us)
            del decision.idle[seat.name]
        else:
            self._go(scene, decision, work, seat)

    def _go(self, scene: Scene, decision: _Draft, work: Work, seat: Seat) -> None:
        stay = self.proceed(scene, seat, work)
        if stay is not None:
            decision.evicts[seat.name] = stay & decision.evicts.get(seat.name, stay)
        start = Start((work.id,), work.node, (seat.name,), work.steps_left, "pipeline")
        decision.starts.append(start)
        del decision.idle[seat.name]

    def _ready(self, scene: Scene, decision: _Draft, waiting: dict[str, Work]) -> None:
        """Workers that were being readied: begin, or go on being readied."""
        for request, (worker, until_us) in list(self._held.items()):
            seat = decision.idle.get(worker)
            if request not in waiting or seat is None:
                del self._held[request]  # it ended, or the worker is gone: back to the queue
                continue
            work = waiting.pop(request)
            if scene.now_us >= until_us:
                del self._held[request]
                self._go(scene, decision, work, seat)
            else:
                del decision.idle[worker]

    def _in_turn(self, scene: Scene, waiting: Mapping[str, Work]) -> list[Work]:
        """One pass over the queue."""
        if not self._rotates:
            return sorted(waiting.values(), key=lambda w: (-w.request.priority, w.order))
        self._queue = [r for r in self._queue if r in waiting]
        if self._queue:
            turns = (scene.now_us - self._polled_us) // POLL_US % len(self._queue)
            self._queue = self._queue[turns:] + self._queue[:turns]
        self._polled_us = scene.now_us
        known = set(self._queue)
        self._queue += [r for r in waiting if r not in known]
        return sorted((waiting[r] for r in self._queue), key=lambda w: -w.request.priority)

    # -------------------------------------------------------------------------- weights

    def swap(self, scene: Scene, seat: Seat, model: str) -> Parts | None:
        """Makes room for a whole pipeline, least recently used pipelines out first."""
        need_mib = scene.footprint_mib(seat.name, model)
        if need_mib == 0:
            return None
        loaded = self._loaded.setdefault(seat.name, [])
        if model in loaded:
            loaded.remove(model)
            loaded.append(model)
            return None
        left_mib = seat.worker.memory_mib * self._budget - need_mib
        left_mib -= sum(scene.footprint_mib(seat.name, m) for m in loaded)
        while loaded and left_mib < 0:
            left_mib += scene.footprint_mib(seat.name, loaded.pop(0))
        # A pipeline brings all its weights, also those that others of the same base have there.
        base = model.split("+")[0]
        stay = [m for m in loaded if m.split("+")[0] != base]
        loaded.append(model)
        return frozenset(p for m in stay for node in NODES for p in scene.parts(seat.name, m, node))

    def _joined(self, scene: Scene) -> dict[str, tuple[tuple[str, str], ...]]:
        """What workers have that this policy sees for the first time."""
        preloads: dict[str, tuple[tuple[str, str], ...]] = {}
        for seat in scene.seats:
            if self._incarnations.get(seat.name) != seat.worker.incarnation:
                self._incarnations[seat.name] = seat.worker.incarnation
                preloads[seat.name] = tuple(
                    (m, node) for m in self.join(scene, seat) for node in NODES
                )
        return preloads


class _Draft:
    """A decision in the making."""

    def __init__(self, idle: dict[str, Seat]) -> None:
        self.idle = idle  # in cluster order
        self.starts: list[Start] = []
        self.rejects: dict[str, str] = {}
        self.evicts: dict[str, Parts] = {}
        self.astray: list[Work] = []


class Diffusers(Pipelines):
    """Every worker one pipeline, for good."""

    SPECS: ClassVar[Mapping[str, Spec]] = {**Pipelines.SPECS, "partition": Spec("")}

    def __init__(self, settings: Mapping[str, SettingValue]) -> None:
        super().__init__(settings)
        self._partition = read_partition(str(settings["partition"]))
        self._seats: tuple[str, ...] = ()
        self._serves: dict[str, frozenset[str]] = {}  # worker -> models

    def allowed(self, scene: Scene, seat: Seat, model: str) -> bool:
        return seat.worker.can(model) and model in self._serves.get(seat.name, ())

    def decide(self, scene: Scene) -> Decision:
        seats = tuple(s.name for s in scene.seats)
        if seats != self._seats:
            self._seats = seats
            self._serves = self.deal(scene)
        return super().decide(scene)

    def join(self, scene: Scene, seat: Seat) -> list[str]:
        """Those of its pipelines that fit."""
        loaded = self._loaded[seat.name] = []
        left_mib = seat.worker.memory_mib * self._budget
        for model in sorted(self._serves.get(seat.name, ())):
            need_mib = scene.footprint_mib(seat.name, model)
            if 0 < need_mib <= left_mib:
                loaded.append(model)
                left_mib -= need_mib
        return list(loaded)

    def deal(self, scene: Scene) -> dict[str, frozenset[str]]:
        """The models of each worker."""
        if self._partition:
            return {
                s.name: frozenset(m for m, ranks in self._partition.items() if s.index in ranks)
                for s in scene.seats
            }
        return evenly(scene, self._serves)


def read_partition(text: str) -> dict[str, frozenset[int]]:
    """Ranks by model. Raises: SettingError."""
    found: dict[str, frozenset[int]] = {}
    for item in filter(None, text.split(";")):
        model, _, ranks = item.partition("=")
        try:
            found[model.strip()] = frozenset(int(r) for r in ranks.split(","))
        except ValueError:
            raise SettingError("partition", text, "model=0,1;other=2 by rank of worker") from None
    return found


def evenly(scene: Scene, before: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Each worker the model that has fewest; then models that nobody has, to whoever has fewest.

    Who had something before keeps it.
    """
    models = sorted({m for s in scene.seats for m in s.worker.models})
    serves = {s.name: set(before.get(s.name, ())) for s in scene.seats}
    count = {m: sum(m in own for own in serves.values()) for m in models}
    for seat in scene.seats:
        able = [m for m in models if seat.worker.can(m)]
        if able and not serves[seat.name]:
            model = min(able, key=lambda m: count[m])
            serves[seat.name].add(model)
            count[model] += 1
    for model in (m for m in models if not count[m]):
        able_seats = [s for s in scene.seats if s.worker.can(model)]
        serves[min(able_seats, key=lambda s: len(serves[s.name])).name].add(model)
    return {name: frozenset(own) for name, own in serves.items()}
