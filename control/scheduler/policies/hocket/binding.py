"""Binding: which of a pod's free workers run what was decided.

Whoever goes on at its width keeps its group; then wide before narrow, on a group that is known and
shares most workers with those who hold the latent, else on an aligned block, else near the holders.
Encode and decode take a worker that leaves wide blocks whole; a decode one that has the latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...books.ledger import Ledger
from ...books.tracker import Tracked
from ...outlook.standing import workers_before
from ...resilience import elsewhere
from .pods import Pod


@dataclass(slots=True)
class Wish:
    """One start without workers."""

    members: list[Tracked]  # of the batch, first one first
    node: str
    width: int
    steps: int
    reason: str
    took_us: float = 0.0  # one step of it, or the whole of an encode or decode

    @property
    def first(self) -> Tracked:
        return self.members[0]


class Binder:
    """Binds wishes to the free workers of one pod."""

    def __init__(self, ledger: Ledger, pod: Pod, free: Sequence[str]) -> None:
        self._ledger = ledger
        self._pod = pod
        self._order = [w.name for w in pod.workers]
        self._free = dict.fromkeys(free)

    def bind(self, wishes: list[Wish]) -> list[tuple[Wish, tuple[str, ...]]]:
        """Workers for each wish; the free ones suffice for all together."""
        bound: list[tuple[Wish, tuple[str, ...]]] = []
        rest: list[Wish] = []
        failed = [wish for wish in wishes if self._barred(wish)]
        for wish in failed:  # before the others take what it may have
            if (workers := self._elsewhere(wish)) is not None:
                bound.append((wish, self._take(workers)))
        for wish in wishes:
            if wish in failed:
                continue
            where = workers_before(self._ledger, wish.first)
            if len(where) == wish.width and all(w in self._free for w in where):
                bound.append((wish, self._take(where)))
            else:
                rest.append(wish)
        for wish in sorted(rest, key=lambda w: -w.width):
            bound.append((wish, self._take(self._choose(wish))))
        return bound

    def _barred(self, wish: Wish) -> frozenset[str]:
        """Workers on which one of its jobs failed, where the pod has others."""
        out = elsewhere.barred_of(self._ledger, [t.id for t in wish.members])
        return elsewhere.NOBODY if out.issuperset(self._order) else out

    def _elsewhere(self, wish: Wish) -> tuple[str, ...] | None:
        """As wide as it can; None: it waits for one of the other workers."""
        out, free = self._barred(wish), self._free
        self._free = {w: None for w in free if w not in out}
        request = wish.first.request
        room = min(wish.width, len(self._free))
        widths = (1, *self._ledger.degrees(request)) if wish.width > 1 else (1,)
        wish.width = max((k for k in widths if k <= room), default=0)
        chosen = self._choose(wish) if wish.width else None
        self._free = free
        return chosen

    def _take(self, workers: tuple[str, ...]) -> tuple[str, ...]:
        for worker in workers:
            del self._free[worker]
        return workers

    def _choose(self, wish: Wish) -> tuple[str, ...]:
        before = set(workers_before(self._ledger, wish.first))
        loads = self._loads(wish)
        if wish.width == 1:
            known = self._ledger.cluster.workers

            def place(w: str) -> tuple[int, bool, bool, tuple[int, int]]:
                return loads[w], w not in before, not known[w].suspected, self._block(w)

            return (min(self._free, key=place),)
        found = [g for g in self._groups(wish.width) if all(w in self._free for w in g)]
        if found:
            cluster = self._ledger.cluster
            return min(
                found,
                key=lambda g: (
                    max(loads[w] for w in g),
                    not cluster.warm(g),
                    -len(before.intersection(g)),
                ),
            )
        near = sorted(self._free, key=lambda w: (loads[w], w not in before, self._block(w)))
        return self._ledger.cluster.canonical(near[: wish.width])

    def _groups(self, width: int) -> list[tuple[str, ...]]:
        """Aligned blocks, then groups that formed before (among the free, newest last)."""
        order = self._order
        blocks = [tuple(order[i : i + width]) for i in range(0, len(order) - width + 1, width)]
        canonical = self._ledger.cluster.canonical
        return [*(canonical(b) for b in blocks), *self._pod.groups.get(width, ())]

    def _block(self, worker: str) -> tuple[int, int]:
        """Free workers in its aligned pair and four: taking one from a broken block is cheaper."""
        at = self._order.index(worker)
        sizes = 0
        for width in (8, 4, 2):
            start = at // width * width
            block = self._order[start : start + width]
            sizes = sizes * 16 + sum(w in self._free for w in block)
        return sizes, at

    def _loads(self, wish: Wish) -> dict[str, int]:
        """Time to load the weights, by worker."""
        ledger, request = self._ledger, wish.first.request
        workers = ledger.cluster.workers
        return {w: ledger.load_us(workers[w], request, wish.node) for w in self._free}
