"""Earliest deadline first, elastic: GF-DiT's `edf_greedy` and `edf_best_fit` (arXiv 2606.13501,
`runtime_v2/policies`).

    ready tasks in EDF order ── 1 a width each, within what idle workers are left
                             ── 2 best fit: what is left over widens the placed, most urgent first
                             ── 3 bound to workers: the group before, if it is whole and free

Greedy gives each the width of its shortest step among those that fit. Best fit gives the narrowest
width at which the *rest* of the request (steps, decode) ends by its deadline, else the one that
ends soonest among those that fit; a step of stage 2 goes to the next width that is really faster.
Encodes and decodes take one worker, in the same order. A request that cannot make it any more keeps
its place in the order, as published: that is what costs EDF its attainment under overload.

Left to whoever deploys it: the steps in a task (`commit_steps`: one is best, 90.0 / 86.3 / 84.0
percent at 1 / 2 / 4), whether the decode counts in the test (`reserve_decode`: in the published
code it does), and the width without a deadline (`no_deadline`: published is the widest that fits).
Deadline comes before priority, as published (`priority_first`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..settings import Settings, SettingValue, Spec
from ..starts import Decision, Start
from ..workflow import Section
from .base import EventPolicy
from .remaining import fastest, remaining_us, steps_us

if TYPE_CHECKING:
    from ..outlook.scene import Scene, Seat, Work


@dataclass(slots=True)
class _Entry:
    """A ready task with the width it is to get."""

    work: Work
    step_us: Mapping[int, int]  # by degree that the cluster offers; empty for encode and decode
    degree: int


class _Idle:
    """Idle workers that nobody was counted on, in a cluster where not all can do the same."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self.count = len(scene.idle())
        # Those with the fewest operations are counted on first.
        self._seats: list[Seat] | None = None
        if scene.partial:
            self._seats = sorted(scene.idle(), key=lambda s: (len(s.worker.serves()), s.index))

    def able(self, work: Work | None = None) -> int:
        """How many could take part in it; without a work, in some denoising."""
        if self._seats is None:
            return self.count
        if work is None:
            return sum(any(s.worker.can(model) for model in s.worker.models) for s in self._seats)
        return sum(self._scene.can(s, work) for s in self._seats)

    def take(self, work: Work, degree: int) -> None:
        """So many of them are counted on."""
        self.count -= degree
        if self._seats is not None:
            taken = [s for s in self._seats if self._scene.can(s, work)][:degree]
            self._seats = [s for s in self._seats if s not in taken]


class EdfGreedy(EventPolicy):
    """Each request, by deadline, as fast as what is left allows."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        "commit_steps": Spec(1, low=1, high=100_000),
        "priority_first": Spec(False),
    }
    REASON = "edf-greedy"

    def __init__(self, read: Mapping[str, SettingValue]) -> None:
        self._commit_steps = int(read["commit_steps"])
        self._priority_first = bool(read["priority_first"])

    @classmethod
    def made(cls, settings: Settings, read: Mapping[str, SettingValue]) -> EdfGreedy:
        """From its own settings."""
        return cls(read)

    def decide(self, scene: Scene) -> Decision:
        """Widths in EDF order, leftovers, binding."""
        idle = _Idle(scene)
        entries: list[_Entry] = []
        for work in sorted(scene.works, key=self._rank):
            if idle.count == 0:
                break
            left = idle.able(work)
            if left == 0:
                continue
            step_us: dict[int, int] = {}
            degree = 1
            if work.section is Section.STEPPED:
                step_us = steps_us(scene, work.request, scene.degrees(work.request))
                fitting = [k for k in step_us if k <= left]
                if not fitting:
                    continue
                degree = self._width(scene, work, {k: step_us[k] for k in fitting})
            entries.append(_Entry(work, step_us, degree))
            idle.take(work, degree)
        self._widen(entries, idle.able())
        return Decision(self._bind(scene, entries))

    def _width(self, scene: Scene, work: Work, step_us: Mapping[int, int]) -> int:
        return fastest(step_us)

    def _widen(self, entries: Sequence[_Entry], left: int) -> None:
        """Greedy leaves nothing that anybody placed could use."""

    def _bind(self, scene: Scene, entries: Sequence[_Entry]) -> list[Start]:
        """In the same order; narrower where other models hold some of the workers."""
        placement = scene.placement()
        starts: list[Start] = []
        for entry in entries:
            work = entry.work
            narrower = [k for k in sorted(entry.step_us, reverse=True) if k < entry.degree]
            for degree in (entry.degree, *narrower):
                members = scene.place(placement, work, degree)
                if members is not None:
                    steps = min(self._commit_steps, work.steps_left)
                    starts.append(Start((work.id,), work.node, members, steps, self.REASON))
                    break
        return starts

    def _rank(self, work: Work) -> tuple[int, bool, int, int, int]:
        request = work.request
        first = -request.priority if self._priority_first else 0
        none = request.deadline_us is None
        return (first, none, request.deadline_us or 0, -request.priority, work.order)


class EdfBestFit(EdfGreedy):
    """Each request, by deadline, as narrow as its deadline allows; then leftovers."""

    SPECS: ClassVar[Mapping[str, Spec]] = {
        **EdfGreedy.SPECS,
        "reserve_decode": Spec(True),
        "no_deadline": Spec("widest", allowed=("widest", "fastest", "narrowest")),
    }
    REASON = "edf-best-fit"

    def __init__(self, read: Mapping[str, SettingValue]) -> None:
        super().__init__(read)
        self._reserve_decode = bool(read["reserve_decode"])
        self._no_deadline = str(read["no_deadline"])

    def _width(self, scene: Scene, work: Work, step_us: Mapping[int, int]) -> int:
        deadline_us = work.request.deadline_us
        if deadline_us is None:
            no_deadline = {"widest": max(step_us), "narrowest": min(step_us)}
            return no_deadline.get(self._no_deadline, fastest(step_us))
        begin_us = max(scene.now_us, work.available_us)
        for degree in sorted(step_us):
            left_us = remaining_us(scene, work, degree, decode=self._reserve_decode)
            if begin_us + left_us <= deadline_us:
                return degree
        return fastest(step_us)

    def _widen(self, entries: Sequence[_Entry], left: int) -> None:
        """From the most urgent on, each time from the top: the next width that is faster."""
        for entry in entries:
            for degree in sorted(entry.step_us):
                more = degree - entry.degree
                if more > left:
                    break
                if more > 0 and entry.step_us[degree] < entry.step_us[entry.degree]:
                    entry.degree, left = degree, left - more
