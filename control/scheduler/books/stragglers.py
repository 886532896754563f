"""Which workers are slow, not dead: found, reckoned with, avoided if need be, tried again.

Each measured step is compared with what other workers took in the same cell (`cells.reference`), so
that a whole family's drift accuses nobody. The excess, a log, adds to a worker's *suspicion*: the
likelihood ratio of "slower by SLOWDOWN times the limit" against "as the others", which cannot fall
below 0 or rise above CERTAIN.

    suspicion ▲ CERTAIN ─────────╭───────╮            no step adds or takes more than STEP_MAX:
              │            ╭─────╯       ╰────╮       three in a row accuse or clear, one never
              │      ╭─────╯                  ╰────╮
              0 ─────╯                             ╰── fine again
                     └ slow ┘ flagged … └ normal ┘ cleared

A group's step takes what its slowest member takes. A normal one speaks for every member. Of a slow
one, and where there is nothing to compare with, the members' own times tell: each without its
waiting for the others. Who stands out most is blamed, who does not is let off. While own times are
not known a slow step is blamed on the most suspicious member, and shared out while none stands out.
Who was never blamed alone is never flagged; encodes and decodes, which run on one worker, go to
suspects first.

A flagged worker's groups are predicted to be that much slower, and teach nothing about their cells.
From `straggler_avoid` on it costs the groups that wait for it more than it gives (measured:
docs/adr/0009): it gets nothing new, as if drained, but never more than half of those that can serve
a model. After a while it is tried again; three normal steps clear it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from ..settings import Settings
from ..times.drift import Sample
from .cluster import Cluster, Worker
from .lifecycle import WorkerState

CERTAIN = 7.0  # of the log likelihood ratio
SLOWDOWN = 1.4  # in logs of the limit: what a straggler is assumed to be like
REFERENCE_NOISE = 1.1  # the others' median is uncertain, too
EXCESSES = 5  # last ones, whose median is the worker's factor
SUSPECTED = 2.0  # suspicion that is worth a look
STEP_MAX = 3.0  # what one step adds or takes at most
OWN_MAX = 2.4  # what it adds by own times alone; three in a row accuse all the same
ALONE_MIN = 3  # accusations of this worker alone that flag it
TRIAL_STEPS = 3
PACES_MAX = 4096
RETRY_GROWTH_MAX = 16
_EPS = 1e-9


class Slow(NamedTuple):
    """A worker turned out to be slow, or, with factor 1, to be fine again."""

    worker: str
    factor: float


class Slowness(NamedTuple):
    """What is known of a slow worker."""

    factor: float  # its steps take that much longer than its peers'
    avoided: bool  # gets nothing new; if not: not slow enough, too few others, or being tried


@dataclass(slots=True)
class Pace:
    """One worker's record."""

    suspicion: float = 0.0
    alone: int = 0  # accusations of it alone since the suspicion was 0
    flagged: bool = False
    heavy: bool = False  # slow enough to be avoided, when it was last judged
    excesses: deque[float] = field(default_factory=lambda: deque(maxlen=EXCESSES))
    retry_us: int = 0  # when it is tried again
    wait_us: int = 0  # from one trial to the next
    trial: int = 0  # steps left of a trial

    @property
    def excess(self) -> float:
        """The usual one of late, not counting the time before it was suspected."""
        ordered = sorted(self.excesses)
        return ordered[len(ordered) // 2] if ordered else 0.0


def own_excesses(own_us: Sequence[int], spread: float) -> tuple[Sample, ...]:
    """How each member's own time of a step compares with the median of the others'.

    Empty where one is not known (0), or nobody else is there. The fewer the others, the less their
    median says; `spread` is that of their family's calls.
    """
    others = len(own_us) - 1
    if others < 1 or min(own_us) <= 0:
        return ()
    spread *= math.sqrt(1.0 + 1.0 / others)
    return tuple(
        Sample(math.log(us / median((*own_us[:i], *own_us[i + 1 :]))), spread)
        for i, us in enumerate(own_us)
    )


class Stragglers:
    """The paces of all workers. A limit of 0 looks for nobody."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._limit = math.log(settings.straggler_factor) if settings.straggler_factor else 0.0
        self._heavy = math.log(settings.straggler_avoid)
        self._paces: dict[str, Pace] = {}
        self._flagged: dict[str, Pace] = {}
        self._due = False  # whom to avoid is to be decided anew
        self._version = -1  # of the cluster, when that was decided
        self._retry_us: int | None = None  # the next trial

    def factor(self, group: tuple[str, ...]) -> float:
        """How much slower than its cell a group is, by its slowest known member; at least 1."""
        if not self._flagged:
            return 1.0
        paces = [self._flagged[w] for w in group if w in self._flagged]
        return max((math.exp(p.excess) for p in paces), default=1.0)

    def suspects(self, worker: str) -> bool:
        """It may be slow, or another of its groups: a call of its own would tell."""
        pace = self._paces.get(worker)
        return pace is not None and not pace.flagged and pace.suspicion >= SUSPECTED

    def factors(self) -> dict[str, float]:
        """The flagged workers."""
        return {w: math.exp(p.excess) for w, p in sorted(self._flagged.items())}

    def observe(
        self,
        group: tuple[str, ...],
        sample: Sample | None,
        at_us: int,
        own: Sequence[Sample] = (),
    ) -> list[Slow]:
        """Enters a step of a group; returns who is slow or fine by it.

        `sample` compares it with other workers' steps, where there were any; `own` each member's
        own time with the other members', where those are known.
        """
        if not self._limit or (sample is None and not own):
            return []
        if len(self._paces) > PACES_MAX:
            self._paces = dict(self._flagged)
        evidence = 0.0 if sample is None else self._evidence(sample)
        if own and (sample is None or evidence > 0.0):
            return self._by_own(group, own, evidence, at_us)
        assert sample is not None
        paces = {w: self._paces.setdefault(w, Pace()) for w in group}
        if evidence > 0.0:
            top = max(p.suspicion for p in paces.values())
            paces = {w: p for w, p in paces.items() if p.suspicion >= top - _EPS}
            evidence /= len(paces)
        alone = len(paces) == 1
        news: list[Slow] = []
        for worker in paces:
            told = sample.excess if alone or evidence <= 0.0 else None
            news += self._enter(worker, evidence, told, alone, at_us)
        return news

    def _by_own(
        self, group: tuple[str, ...], own: Sequence[Sample], shared: float, at_us: int
    ) -> list[Slow]:
        """Blames who stands out most, and lets off who does not stand out; but not who is
        known to be slow by others half of which are, too.

        Among many somebody stands out at every step: hence one at a time, and by less.
        """
        evidence = [min(OWN_MAX, self._evidence(sample)) for sample in own]
        most, slow = max(evidence), {w for w in group if w in self._flagged}
        news: list[Slow] = []
        for worker, sample, each in zip(group, own, evidence, strict=True):
            if each <= 0.0:
                if worker in slow and 2 * (len(slow) - 1) >= len(group) - 1:
                    continue
                news += self._enter(worker, each, sample.excess, False, at_us)
            elif each >= most - _EPS:
                each = min(STEP_MAX, each + shared)
                news += self._enter(worker, each, sample.excess, True, at_us)
        return news

    def _evidence(self, sample: Sample) -> float:
        """What a measurement adds to a suspicion."""
        spread = sample.spread * REFERENCE_NOISE
        assumed = SLOWDOWN * self._limit
        evidence = assumed / spread**2 * (sample.excess - assumed / 2)
        return min(STEP_MAX, max(-STEP_MAX, evidence))

    def _enter(
        self, worker: str, evidence: float, excess: float | None, alone: bool, at_us: int
    ) -> list[Slow]:
        pace = self._paces.setdefault(worker, Pace())
        pace.suspicion = min(CERTAIN, max(0.0, pace.suspicion + evidence))
        if excess is not None:
            pace.excesses.append(excess)
        pace.alone += alone
        if pace.suspicion <= 0.0 and not pace.flagged:
            pace.alone = 0
            pace.excesses.clear()
        return self._judged(worker, pace, at_us)

    def forgive(self) -> None:
        """All of them moved together: what was held against one of them was that."""
        for pace in self._paces.values():
            if not pace.flagged:
                pace.suspicion, pace.alone = 0.0, 0
                pace.excesses.clear()

    def forget(self, worker: str) -> None:
        """It is another process now, with a clean record."""
        self._paces.pop(worker, None)
        self._due = self._flagged.pop(worker, None) is not None or self._due

    def settle(self, cluster: Cluster, at_us: int) -> bool:
        """Avoids the flagged as far as the others can serve; whether anything changed."""
        due = self._due or (self._retry_us is not None and at_us >= self._retry_us)
        if not due and (not self._flagged or cluster.version == self._version):
            return False
        for name in [n for n in self._flagged if not _inside(cluster, n)]:
            self.forget(name)
        self._try_again(at_us)
        avoided: dict[str, None] = {}
        for name in sorted(self._flagged, key=lambda w: (-self._flagged[w].excess, w)):
            worker = cluster.workers[name]
            pace = self._flagged[name]
            if pace.heavy and not pace.trial and _others_serve(cluster, worker, avoided):
                avoided[name] = None
        changed = False
        for worker in cluster.workers.values():
            if worker.avoided != (worker.name in avoided):
                worker.avoid(worker.name in avoided)
                changed = True
        waiting = [self._flagged[w].retry_us for w in avoided]
        self._retry_us = min(waiting, default=None)
        self._version, self._due = cluster.version, False
        return changed

    def _judged(self, worker: str, pace: Pace, at_us: int) -> list[Slow]:
        if pace.flagged:
            if pace.suspicion <= 0.0:
                del self._flagged[worker]
                self._paces[worker] = Pace()
                self._due = True
                return [Slow(worker, 1.0)]
            if not pace.heavy and pace.excess >= self._heavy:
                pace.heavy, self._due = True, True
            if pace.trial:
                pace.trial -= 1
                if not pace.trial:
                    pace.heavy = pace.excess >= self._heavy
                    longest_us = self._settings.straggler_retry_us * RETRY_GROWTH_MAX
                    pace.wait_us = min(2 * pace.wait_us, longest_us)
                    pace.retry_us = at_us + pace.wait_us
                    self._due = True
            return []
        certain = pace.suspicion >= CERTAIN and pace.alone >= ALONE_MIN
        if not certain or pace.excess < self._limit:
            return []
        pace.flagged, pace.trial = True, 0
        pace.heavy = pace.excess >= self._heavy
        pace.wait_us = self._settings.straggler_retry_us
        pace.retry_us = at_us + pace.wait_us
        self._flagged[worker] = pace
        self._due = True
        return [Slow(worker, math.exp(pace.excess))]

    def _try_again(self, at_us: int) -> None:
        for pace in self._flagged.values():
            if not pace.trial and at_us >= pace.retry_us:
                pace.trial = TRIAL_STEPS


def _inside(cluster: Cluster, name: str) -> bool:
    worker = cluster.workers.get(name)
    return worker is not None and worker.state is not WorkerState.LOST


def _others_serve(cluster: Cluster, worker: Worker, avoided: dict[str, None]) -> bool:
    """At least half of those that run each thing that it runs stay."""
    for model, op in worker.serves():
        able = [
            w.name
            for w in cluster.workers.values()
            if w.state is WorkerState.UP
            and w.can(model, 1, op)
            and not (w.draining or w.stopping or w.quarantined)
        ]
        gone = sum(name in avoided for name in able) + (worker.name in able)
        if 2 * gone > len(able):
            return False
    return True
