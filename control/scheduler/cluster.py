"""The workers and the groups they form, in cluster order: by host, then by name."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from .lifecycle import WORKER_MOVES, WorkerState, moved
from .values import ModelFacts, WorkerUp

EPOCHS_MAX = 65_536  # groups whose epoch is remembered


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
    memory_mib: int = 0  # for weights; 0: everything it can run is there
    island: str = ""  # of close links, inside its host
    freed_us: int = 0  # not before this can it start what it gets next
    unclaimed: dict[str, int] = field(default_factory=dict)  # latents of requests not inside yet

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
    """The workers seen, and the epoch of each group asked for; both bounded.

    A group that is forgotten starts over at an epoch above all that were ever forgotten.
    """

    epoch_base: int
    workers: dict[str, Worker] = field(default_factory=dict)
    _epochs: dict[tuple[str, ...], int] = field(default_factory=dict)
    _formed: dict[tuple[str, ...], int] = field(default_factory=dict)  # epoch that ran a step
    _ordered: list[Worker] = field(default_factory=list)  # empty: to be sorted again

    def ordered(self) -> list[Worker]:
        """All workers in cluster order: the order that blocks are aligned in."""
        if not self._ordered:
            self._ordered = sorted(self.workers.values(), key=lambda w: (w.host, w.island, w.name))
        return self._ordered

    def usable(self) -> list[Worker]:
        """Those that may get new work, in cluster order."""
        return [w for w in self.ordered() if w.usable]

    def canonical(self, names: Iterable[str]) -> tuple[str, ...]:
        """The one order in which these workers form a group: one set, one group."""
        known = self.workers
        return tuple(sorted(names, key=lambda n: (known[n].host, known[n].island, n)))

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
        worker.memory_mib, worker.island = fact.memory_mib, fact.island
        worker.incarnation = fact.incarnation
        worker.move(WorkerState.UP)
        self._ordered = []
        return worker

    def forget_lost(self, needed: Container[str]) -> None:
        """Drops lost workers, but those needed, and the groups that they were in."""
        gone = {
            w.name
            for w in self.workers.values()
            if w.state is WorkerState.LOST and w.name not in needed
        }
        for name in gone:
            del self.workers[name]
        self._ordered = []
        self._forget_groups([g for g in self._epochs if not gone.isdisjoint(g)])

    def epoch(self, members: tuple[str, ...]) -> int:
        """The group's epoch; asking makes the group known."""
        if members not in self._epochs:
            if len(self._epochs) >= EPOCHS_MAX:
                self._thin_groups()
            self._epochs[members] = self.epoch_base
        return self._epochs[members]

    def formed(self, members: tuple[str, ...], epoch: int) -> None:
        """The group ran a step together: its communicator stands."""
        if len(members) > 1 and self._epochs.get(members) == epoch:
            self._formed[members] = epoch

    def abandon(self, members: tuple[str, ...], epoch: int) -> None:
        """An assignment was called off: an epoch in which nobody saw the group run is spent."""
        unsure = self._formed.get(members) != epoch
        if len(members) > 1 and unsure and self._epochs.get(members) == epoch:
            self._epochs[members] += 1

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

    def _thin_groups(self) -> None:
        """Makes room: groups with a member that is gone first, then the oldest quarter."""
        lost = [
            g
            for g in self._epochs
            if any(m not in self.workers or self.workers[m].state is WorkerState.LOST for m in g)
        ]
        self._forget_groups(lost)
        if len(self._epochs) >= EPOCHS_MAX:
            self._forget_groups(list(self._epochs)[: max(1, EPOCHS_MAX // 4)])

    def _forget_groups(self, groups: list[tuple[str, ...]]) -> None:
        for group in groups:
            self.epoch_base = max(self.epoch_base, self._epochs.pop(group) + 1)
            self._formed.pop(group, None)
