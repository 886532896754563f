"""Which weights lie on which worker, and what getting others there costs.

A worker that names its memory keeps the weights it used last; what does not fit is evicted, least
recently used first, before a load. A worker without a memory figure has everything it can run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .cluster import Worker
from .loads import LoadTable
from .values import Load

Part = tuple[str, str]  # model, node


@dataclass(slots=True)
class Residency:
    """The weights on all workers; `bring` is told in the order in which assignments go out."""

    table: LoadTable
    _held: dict[str, dict[Part, int]] = field(default_factory=dict)  # worker -> part -> MiB, LRU
    _incarnation: dict[str, str] = field(default_factory=dict)

    def bounded(self, worker: Worker) -> bool:
        """Its memory counts."""
        return worker.memory_mib > 0 and bool(self.table)

    def parts(self, worker: Worker) -> tuple[Part, ...]:
        """What is loaded, least recently used first."""
        return tuple(self._of(worker))

    def load_us(self, worker: Worker, model: str, node: str) -> int:
        """Time to get the weights there now; 0 when they are there."""
        if not self.bounded(worker) or (model, node) in self._of(worker):
            return 0
        return self.table.weights(model, worker.gpu, node).load_us

    def bring(self, worker: Worker, model: str, node: str, sequence: int) -> Load | None:
        """Enters a use; the load that it takes, or None."""
        if not self.bounded(worker):
            return None
        held = self._of(worker)
        weights = self.table.weights(model, worker.gpu, node)
        part = (model, node)
        known = held.pop(part, None)
        evicted: list[Part] = []
        total = sum(held.values()) + max(weights.mib, weights.peak_mib)
        for other in list(held):
            if total <= worker.memory_mib:
                break
            total -= held.pop(other)
            evicted.append(other)
        held[part] = weights.mib
        if known is not None and not evicted:
            return None
        return Load(
            sequence=sequence,
            worker=worker.name,
            model=model,
            node=node,
            load_us=0 if known is not None else weights.load_us,
            evict=tuple(evicted),
        )

    def evict(self, worker: Worker, keep: frozenset[Part] = frozenset()) -> None:
        """Forgets all weights but some: a process that starts anew."""
        held = self._of(worker)
        for part in [p for p in held if p not in keep]:
            del held[part]

    def _of(self, worker: Worker) -> dict[Part, int]:
        if self._incarnation.get(worker.name) != worker.incarnation:
            self._incarnation[worker.name] = worker.incarnation
            self._held[worker.name] = {}
        return self._held[worker.name]
