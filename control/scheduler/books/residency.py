"""Which weights lie on which worker, and what getting others there costs.

A worker that names its memory keeps the weights it used last; what does not fit is evicted, least
recently used first, before a load. A worker without a memory figure has everything it can run.
Sizes and times come from a table, or from the workers themselves.

What comes and goes is a part. Workers say which parts a node of a model needs (`ModelFacts.parts`);
of two models that need the same one, the load of either counts for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..values import Load, PartFacts
from .cluster import Worker
from .loads import NOTHING, LoadTable, Weights, own_part

Part = str


@dataclass(slots=True)
class Residency:
    """The weights on all workers; `bring` is told in the order in which assignments go out."""

    table: LoadTable
    _held: dict[str, dict[Part, int]] = field(default_factory=dict)  # worker -> part -> MiB, LRU
    _untold: dict[str, set[Part]] = field(default_factory=dict)  # preloaded, in no plan's loads yet
    _dropped: dict[str, list[Part]] = field(default_factory=dict)  # in no plan's evictions yet
    _incarnation: dict[str, str] = field(default_factory=dict)
    _tells: set[str] = field(default_factory=set)  # workers that say what they hold

    def bounded(self, worker: Worker) -> bool:
        """Its memory counts."""
        return worker.memory_mib > 0 and bool(self.table)

    def parts(self, worker: Worker) -> tuple[Part, ...]:
        """What is loaded, least recently used first."""
        return tuple(self._of(worker))

    def needs(self, worker: Worker, model: str, node: str) -> tuple[Part, ...]:
        """The parts that a node's run uses."""
        facts = worker.models.get(model)
        for named in facts.parts if facts is not None else ():
            if named.node == node:
                return named.parts
        return (own_part(model, node),)

    def footprint_mib(self, worker: Worker, model: str) -> int:
        """All of a model's weights and its largest activations; 0 where memory does not count."""
        if not self.bounded(worker):
            return 0
        parts = [p for node in worker.nodes(model) for p in self.needs(worker, model, node)]
        return self._room_mib([self._weights(worker, p) for p in dict.fromkeys(parts)])

    def load_us(self, worker: Worker, model: str, node: str) -> int:
        """Time to get the weights there now; 0 when they are there."""
        if not self.bounded(worker):
            return 0
        held = self._of(worker)
        missing = [p for p in self.needs(worker, model, node) if p not in held]
        return sum(self._weights(worker, p).load_us for p in missing)

    def bring(self, worker: Worker, model: str, node: str, sequence: int) -> tuple[Load, ...]:
        """Enters a use; the loads that it takes, one after the other, evictions before the first.

        Weights that lie there and that no plan has told of come as a load that takes no time.
        """
        if not self.bounded(worker):
            return ()
        held = self._of(worker)
        wanted = {p: self._weights(worker, p) for p in self.needs(worker, model, node)}
        untold = self._untold[worker.name]
        missing = [p for p in wanted if held.pop(p, None) is None]
        evicted, self._dropped[worker.name] = self._dropped[worker.name], []
        total = sum(held.values()) + self._room_mib(list(wanted.values()))
        for other in list(held):
            if total <= worker.memory_mib:
                break
            total -= held.pop(other)
            evicted.append(other)
        held.update({p: w.mib for p, w in wanted.items()})
        told = [p for p in wanted if p in missing or p in untold]
        untold.difference_update(wanted, evicted)
        return tuple(
            Load(
                sequence=sequence,
                worker=worker.name,
                model=model,
                node=node,
                part=part,
                load_us=wanted[part].load_us if part in missing else 0,
                evict=tuple(evicted) if i == 0 else (),
            )
            for i, part in enumerate(told or (list(wanted)[:1] if evicted else []))
        )

    def preload(self, worker: Worker, model: str, node: str) -> None:
        """Weights that were put there before the first request, if they fit beside the others.

        The first plan that uses them says so, in a load that takes no time. A worker that tells
        what it holds has put there what it has.
        """
        if not self.bounded(worker) or worker.name in self._tells:
            return
        held = self._of(worker)
        new = {
            p: self._weights(worker, p) for p in self.needs(worker, model, node) if p not in held
        }
        if sum(held.values()) + self._room_mib(list(new.values())) <= worker.memory_mib:
            held.update({p: w.mib for p, w in new.items()})
            self._untold[worker.name].update(new)

    def evict(self, worker: Worker, keep: frozenset[Part] = frozenset()) -> None:
        """Forgets all weights but some: a process that starts anew. The next load says so."""
        held = self._of(worker)
        for part in [p for p in held if p not in keep]:
            del held[part]
            self._untold[worker.name].discard(part)
            self._dropped[worker.name].append(part)

    def told(self, worker: Worker, facts: Sequence[PartFacts], *, idle: bool) -> None:
        """What a worker says of its weights. What it holds counts where nothing is on its way to
        it: it may do otherwise than the plan thought.
        """
        fresh = self._incarnation.get(worker.name) != worker.incarnation
        told: dict[Part, Weights] = {}
        resident: dict[Part, int] = {}
        for fact in facts:
            part = fact.part or own_part(fact.model, fact.node)
            others = told.get(part, NOTHING)  # of the part's other nodes: the largest call counts
            told[part] = Weights(fact.load_us, fact.mib, max(fact.peak_mib, others.peak_mib))
            if fact.resident:
                resident[part] = fact.mib
        for part, weights in told.items():
            self.table.learn(part, worker.gpu, weights)
        if facts:
            self._tells.add(worker.name)
        if facts and (idle or fresh):
            self._of(worker)
            self._held[worker.name] = resident
            self._untold[worker.name].clear()
            self._dropped[worker.name].clear()

    def forget(self, workers: Iterable[str]) -> None:
        """They are gone for good."""
        for name in workers:
            for known in (self._held, self._untold, self._dropped, self._incarnation):
                known.pop(name, None)
            self._tells.discard(name)

    def _weights(self, worker: Worker, part: Part) -> Weights:
        return self.table.weights(part, worker.gpu)

    def _room_mib(self, weights: list[Weights]) -> int:
        """What these weights take while one of them runs."""
        activations = max((w.peak_mib - w.mib for w in weights), default=0)
        return sum(w.mib for w in weights) + max(0, activations)

    def _of(self, worker: Worker) -> dict[Part, int]:
        if self._incarnation.get(worker.name) != worker.incarnation:
            self._incarnation[worker.name] = worker.incarnation
            self._held[worker.name] = {}
            self._untold[worker.name] = set()
            self._dropped[worker.name] = []
        return self._held[worker.name]
