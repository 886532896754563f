"""The workers and the groups they form, in cluster order: by host, then by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .lifecycle import WORKER_MOVES, WorkerState, moved
from .values import ModelFacts, WorkerUp


@dataclass(slots=True)
class Worker:
    """One worker as its lease and its peers describe it."""

    name: str
    host: str
    gpu: str
    incarnation: str
    models: dict[str, ModelFacts]
    state: WorkerState = WorkerState.UP
    draining: bool = False
    freed_us: int = 0  # not before this can it start what it gets next

    @property
    def usable(self) -> bool:
        """Gets new assignments."""
        return self.state is WorkerState.UP and not self.draining

    def can(self, model: str, degree: int = 1) -> bool:
        """Has the model and, for more than one worker, can split its denoiser that way."""
        facts = self.models.get(model)
        return facts is not None and (degree == 1 or degree in facts.degrees)

    def move(self, target: WorkerState) -> None:
        self.state = moved(f"worker {self.name}", self.state, target, WORKER_MOVES)


@dataclass(slots=True)
class Cluster:
    """All workers ever seen, and the epoch of each group that was ever asked for."""

    epoch_base: int
    workers: dict[str, Worker] = field(default_factory=dict)
    _epochs: dict[tuple[str, ...], int] = field(default_factory=dict)

    def ordered(self) -> list[Worker]:
        """All workers in cluster order: the order that blocks are aligned in."""
        return sorted(self.workers.values(), key=lambda w: (w.host, w.name))

    def usable(self) -> list[Worker]:
        """Those that may get new work, in cluster order."""
        return [w for w in self.ordered() if w.usable]

    def canonical(self, names: Iterable[str]) -> tuple[str, ...]:
        """The one order in which these workers form a group: one set, one group."""
        return tuple(sorted(names, key=lambda n: (self.workers[n].host, n)))

    def living(self, name: str) -> bool:
        """Its lease lives (a suspect's does: what it holds may still be fetched, so not here)."""
        worker = self.workers.get(name)
        return worker is not None and worker.state is WorkerState.UP

    def lease(self, fact: WorkerUp) -> Worker:
        """Enters a worker, or the newest facts of a known one."""
        models = {m.name: m for m in fact.models}
        worker = self.workers.get(fact.worker)
        if worker is None:
            worker = Worker(fact.worker, fact.host, fact.gpu, fact.incarnation, models)
            self.workers[fact.worker] = worker
        worker.host, worker.gpu, worker.models = fact.host, fact.gpu, models
        worker.incarnation = fact.incarnation
        worker.move(WorkerState.UP)
        return worker

    def epoch(self, members: tuple[str, ...]) -> int:
        """The group's epoch; asking makes the group known."""
        return self._epochs.setdefault(members, self.epoch_base)

    def warm(self, members: tuple[str, ...]) -> bool:
        """Was asked for before: its members probably still have the communicator."""
        return members in self._epochs

    def warm_groups(self, degree: int) -> list[tuple[str, ...]]:
        """Known groups of one size, in the order in which they came up."""
        return [g for g in self._epochs if len(g) == degree]

    def raise_epochs(self, names: Iterable[str], group: tuple[str, ...] = ()) -> None:
        """Makes every known group with one of these members, and that one group, be formed anew."""
        gone = set(names)
        for members in self._epochs:
            if members == group or not gone.isdisjoint(members):
                self._epochs[members] += 1
