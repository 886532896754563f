"""What ran out of memory once is not tried again: learned from failures, by what it depends on.

A batch that did not fit is halved for its model, node, GPU kind and shape; a single job that did
not fit needs a wider group, or workers of another kind, where there are any. Nothing is forgotten
while the leader lives: trying again costs every job of the batch its steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ..values import Shape
from .catalogue import CallSpec

PLACES_MAX = 65_536  # the oldest are forgotten first


class Place(NamedTuple):
    """What the memory of a call depends on, beside its batch and degree."""

    model: str
    node: str
    gpu: str
    shape: Shape


@dataclass(slots=True)
class MemoryLimits:
    """Batches and degrees that do not fit."""

    _batch_max: dict[Place, int] = field(default_factory=dict)
    _too_narrow: dict[Place, int] = field(default_factory=dict)  # one job alone does not fit there
    version: int = 0  # counts what was learned

    def overrun(self, call: CallSpec, gpus: Iterable[str], degree: int, batch: int) -> bool:
        """A call of so many jobs on that many workers of these kinds ran out of memory. Whether
        that was news.
        """
        news = False
        for place in _places(call, gpus):
            if batch > 1 and batch // 2 < self._batch_max.get(place, batch):
                _note(self._batch_max, place, batch // 2)
                news = True
            elif batch == 1 and degree > self._too_narrow.get(place, 0):
                _note(self._too_narrow, place, degree)
                news = True
        self.version += news
        return news

    def batch_max(self, call: CallSpec, gpus: Iterable[str], wanted: int) -> int:
        """Of so many jobs, those that fit together, as far as is known."""
        if not self._batch_max:
            return wanted
        places = _places(call, gpus)
        return min([wanted, *(self._batch_max.get(place, wanted) for place in places)])

    def wide_enough(
        self, call: CallSpec, gpus: Iterable[str], degrees: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Of these degrees of a node, those at which one job may fit; all where none would."""
        if not self._too_narrow:
            return degrees
        return self._wider(call, gpus, degrees) or degrees

    def hopeless(self, call: CallSpec, gpus: Iterable[str], degrees: tuple[int, ...]) -> bool:
        """One job of its shape is known not to fit these kinds at any of these degrees."""
        return bool(self._too_narrow) and not self._wider(call, gpus, degrees)

    def _wider(
        self, call: CallSpec, gpus: Iterable[str], degrees: tuple[int, ...]
    ) -> tuple[int, ...]:
        narrow = max(self._too_narrow.get(place, 0) for place in _places(call, gpus))
        return tuple(d for d in degrees if d > narrow)


def _places(call: CallSpec, gpus: Iterable[str]) -> list[Place]:
    return [Place(call.model, call.op, gpu, call.shape) for gpu in gpus]


def _note(known: dict[Place, int], place: Place, value: int) -> None:
    known[place] = value
    if len(known) > PLACES_MAX:
        del known[next(iter(known))]
