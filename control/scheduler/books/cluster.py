"""The workers and the groups they form, in cluster order: by host, then by name."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from ..values import DIT, TEXT, VAE, GroupHeld, Held, ModelFacts, WorkerUp
from .lifecycle import WORKER_MOVES, WorkerState, moved

EPOCHS_MAX = 65_536  # groups whose epoch is remembered
ANSWERS_MAX = 16_384  # about the workers as they are, by model or group
CHAIN_OPS = (TEXT, DIT, VAE)  # of a model that does not say which


def _nothing() -> None:
    """Nobody minds that a worker changes."""


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
    avoided: bool = False  # slow, and others can serve
    quarantined: bool = False  # failed too often, and others can serve
    stopping: bool = False  # it was told to stop
    hung: set[int] = field(default_factory=set)  # overdue sequences that it still has in hand
    lost_us: int = 0  # when its lease ended
    suspected: bool = False  # of being slow, with others; a call of its own would tell
    shares_cores: bool = False  # with its peers: is not compared with them
    memory_mib: int = 0  # for weights; 0: everything it can run is there
    island: str = ""  # of close links, inside its host
    freed_us: int = 0  # not before this can it start what it gets next
    unclaimed: dict[str, list[Held]] = field(default_factory=dict)  # of requests not inside yet
    operations: tuple[str, ...] = ()  # without weights
    changed: Callable[[], None] = field(default=_nothing, repr=False, compare=False)

    @property
    def usable(self) -> bool:
        """Gets new assignments."""
        return self.state is WorkerState.UP and not (
            self.draining or self.stopping or self.quarantined or self.avoided
        )

    @property
    def leaving(self) -> bool:
        """Lives, and gets nothing new: what it holds should have copies elsewhere."""
        return self.state is WorkerState.UP and (self.draining or self.stopping)

    def can(self, model: str, degree: int = 1, op: str = DIT) -> bool:
        """Runs an operation of the model and, for more than one worker, splits its denoiser that
        way. Without a model: an operation that needs no weights.
        """
        if not model:
            return op in self.operations
        facts = self.models.get(model)
        return (
            facts is not None
            and (degree == 1 or degree in facts.degrees)
            and op in (facts.operations or CHAIN_OPS)
        )

    def nodes(self, model: str) -> tuple[str, ...]:
        """The nodes of the model's chain that it has weights for."""
        facts = self.models.get(model)
        offered = CHAIN_OPS if facts is None else facts.operations or CHAIN_OPS
        return tuple([node for node in CHAIN_OPS if node in offered])

    def serves(self) -> list[tuple[str, str]]:
        """(model, operation) of all that it runs."""
        found = [(m.name, op) for m in self.models.values() for op in m.operations or CHAIN_OPS]
        return found + [("", op) for op in self.operations]

    def move(self, target: WorkerState) -> None:
        before = self.state
        self.state = moved(f"worker {self.name}", before, target, WORKER_MOVES)
        if target is not before:
            self.changed()

    def drain(self, draining: bool) -> None:
        """Gets nothing new from now on, or gets work again."""
        if draining is not self.draining:
            self.draining = draining
            self.changed()

    def avoid(self, avoided: bool) -> None:
        """As `drain`, by the scheduler's own judgement."""
        if avoided is not self.avoided:
            self.avoided = avoided
            self.changed()

    def quarantine(self, quarantined: bool) -> None:
        """As `avoid`, for failures."""
        if quarantined is not self.quarantined:
            self.quarantined = quarantined
            self.changed()

    def stop(self, stopping: bool) -> None:
        """As `drain`, by the worker's own word."""
        if stopping is not self.stopping:
            self.stopping = stopping
            self.changed()

    def hang(self, sequence: int) -> None:
        """An assignment is overdue here: nothing more goes out to it while it is in hand."""
        if self.state is WorkerState.UP:
            self.move(WorkerState.SUSPECT)
        if self.state is WorkerState.SUSPECT:
            self.hung.add(sequence)

    def revive(self, sequence: int) -> None:
        """It said something of an overdue assignment: it does not hang there any more."""
        if sequence in self.hung:
            self.hung.discard(sequence)
            if not self.hung and self.state is WorkerState.SUSPECT:
                self.move(WorkerState.UP)


@dataclass(slots=True)
class _Answers:
    """What follows from the workers as they are now; made anew whenever one of them changes."""

    ordered: list[Worker]
    usable: list[Worker]
    leaving: list[Worker]
    denoisers: list[Worker]  # usable ones that have some model's denoiser
    rank: dict[str, int]  # in cluster order
    partial: bool  # some lack an operation of the chain of a model that they have
    able: dict[tuple[str, int, str], tuple[Worker, ...]] = field(default_factory=dict)
    names: dict[tuple[str, int, str], tuple[str, ...]] = field(default_factory=dict)
    degrees: dict[str, tuple[int, ...]] = field(default_factory=dict)
    gpus: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)

    def bound(self) -> None:
        """Models and groups are asked about by whoever sends requests: not without end."""
        if len(self.able) + len(self.names) + len(self.degrees) + len(self.gpus) >= ANSWERS_MAX:
            for answers in (self.able, self.names, self.degrees, self.gpus):
                answers.clear()


@dataclass(slots=True)
class Cluster:
    """The workers seen, and the epoch of each group asked for; both bounded.

    A group that is forgotten starts over at an epoch above all that were ever forgotten. `version`
    counts changes of leases, drains, losses, suspicions and avoidances: answers are kept from one
    to the next.
    """

    epoch_base: int
    workers: dict[str, Worker] = field(default_factory=dict)
    _epochs: dict[tuple[str, ...], int] = field(default_factory=dict)
    _asked: dict[tuple[str, ...], int] = field(default_factory=dict)  # epoch last asked for
    _formed: dict[tuple[str, ...], int] = field(default_factory=dict)  # epoch that ran a step
    _sized: dict[int, list[tuple[str, ...]]] = field(default_factory=dict)  # groups by size
    version: int = 0
    _answers: _Answers | None = None

    def changed(self) -> None:
        """A worker is not what it was: nothing said about the workers holds any more."""
        self.version += 1
        self._answers = None

    def ordered(self) -> list[Worker]:
        """All workers in cluster order: the order that blocks are aligned in. To be read only."""
        return self._now().ordered

    def usable(self) -> list[Worker]:
        """Those that may get new work, in cluster order. To be read only."""
        return self._now().usable

    def leaving(self) -> list[Worker]:
        """Those that live and get nothing new any more, in cluster order. To be read only."""
        return self._now().leaving

    def denoisers(self) -> list[Worker]:
        """The usable workers that have some model's denoiser, in cluster order. To be read only."""
        return self._now().denoisers

    def able(self, model: str, degree: int = 1, op: str = DIT) -> tuple[Worker, ...]:
        """The usable workers that can run the model's operation that wide, in cluster order."""
        now = self._now()
        key = (model, degree, op)
        found = now.able.get(key)
        if found is None:
            now.bound()
            found = tuple(w for w in now.usable if w.can(model, degree, op))
            now.able[key] = found
        return found

    def able_names(self, model: str, degree: int = 1, op: str = DIT) -> tuple[str, ...]:
        """As `able`, the names."""
        now = self._now()
        key = (model, degree, op)
        found = now.names.get(key)
        if found is None:
            found = now.names[key] = tuple(w.name for w in self.able(model, degree, op))
        return found

    @property
    def partial(self) -> bool:
        """Some usable workers lack an operation of the chain of a model that they have."""
        return self._now().partial

    def degrees(self, model: str) -> tuple[int, ...]:
        """Widths in which the model's denoiser can run on the usable workers, ascending."""
        now = self._now()
        found = now.degrees.get(model)
        if found is None:
            offered = {d for w in self.able(model) for d in (*w.models[model].degrees, 1)}
            found = tuple(d for d in sorted(offered) if len(self.able(model, d)) >= d)
            now.degrees[model] = found
        return found

    def gpus(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """GPU kinds of some workers, sorted; of all when there are none."""
        now = self._now()
        found = now.gpus.get(names)
        if found is None:
            now.bound()
            known = self.workers
            some = [w for w in names if w in known] or list(known)
            found = now.gpus[names] = tuple(sorted({known[w].gpu for w in some})) or ("",)
        return found

    def canonical(self, names: Iterable[str]) -> tuple[str, ...]:
        """The one order in which these workers form a group: one set, one group."""
        return tuple(sorted(names, key=self._now().rank.__getitem__))

    def _now(self) -> _Answers:
        now = self._answers
        if now is None:
            ordered = sorted(self.workers.values(), key=lambda w: (w.host, w.island, w.name))
            rank = {w.name: i for i, w in enumerate(ordered)}
            usable = [w for w in ordered if w.usable]
            leaving = [w for w in ordered if w.leaving]
            partial = any(
                m.operations and not set(CHAIN_OPS).issubset(m.operations)
                for w in usable
                for m in w.models.values()
            )
            denoisers = usable
            if partial:
                denoisers = [w for w in usable if any(w.can(model) for model in w.models)]
            now = self._answers = _Answers(ordered, usable, leaving, denoisers, rank, partial)
        return now

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
            worker.changed = self.changed
            self.workers[fact.worker] = worker
            self.changed()
        before = (worker.host, worker.gpu, worker.island, worker.models, worker.operations)
        worker.operations = fact.operations
        worker.host, worker.gpu, worker.models = fact.host, fact.gpu, models
        worker.memory_mib, worker.island = fact.memory_mib, fact.island
        worker.shares_cores = fact.shares_cores
        if worker.incarnation != fact.incarnation:
            worker.hung.clear()
        worker.hung.intersection_update(fact.pending)
        worker.incarnation = fact.incarnation
        if before != (fact.host, fact.gpu, fact.island, models, fact.operations):
            self.changed()
        worker.stop(fact.stopping)
        if not worker.hung:
            worker.move(WorkerState.UP)
        elif worker.state is WorkerState.LOST:
            worker.move(WorkerState.UP)
            worker.move(WorkerState.SUSPECT)
        return worker

    def forget_lost(self, needed: Container[str], before_us: int | None = None) -> list[str]:
        """Drops workers that are lost (since before then), but those needed, and the groups that
        they were in; their names.
        """
        gone = {
            w.name: None
            for w in self.workers.values()
            if w.state is WorkerState.LOST and w.name not in needed
            if before_us is None or w.lost_us < before_us
        }
        if not gone:
            return []
        for name in gone:
            del self.workers[name]
        self.changed()
        self._forget_groups([g for g in self._epochs if not gone.keys().isdisjoint(g)])
        return list(gone)

    def epoch(self, members: tuple[str, ...]) -> int:
        """The group's epoch; asking makes the group known."""
        epoch = self._epochs.get(members)
        if epoch is None:
            if len(self._epochs) >= EPOCHS_MAX:
                self._thin_groups()
            epoch = self._epochs[members] = self.epoch_base
            self._sized.setdefault(len(members), []).append(members)
        self._asked[members] = epoch
        return epoch

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
        """Its members have the communicator, or are about to: it was asked for at its epoch, which
        goes up as soon as a member tells, or a failure says, that it is gone.
        """
        epoch = self._epochs.get(members)
        return epoch is not None and self._asked.get(members) == epoch

    def give_up(self, groups: Iterable[GroupHeld], busy: Container[tuple[str, ...]]) -> None:
        """A member has thrown these away: they are formed anew when they are next asked for.

        In a group that has something outstanding its failure will tell.
        """
        for group in groups:
            members = group.members
            if members not in busy and self._epochs.get(members) == group.epoch:
                self._epochs[members] += 1

    def warm_groups(self, degree: int) -> list[tuple[str, ...]]:
        """Known groups of one size, in the order in which they came up. To be read only."""
        return self._sized.get(degree, [])

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
            self._asked.pop(group, None)
        self._sized = {}
        for group in self._epochs:
            self._sized.setdefault(len(group), []).append(group)
