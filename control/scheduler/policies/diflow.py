"""DiFlow (LegoDiffusion, arXiv 2604.08123), from its public artifact: notes sections 1.4 and 1.5.

A request is a graph of nodes, and each is scheduled for itself: first come first served across
requests, the deepest node first inside one. A denoising step with guidance is two nodes, one a
branch. Here a branch is not a job of its own: two branches on two workers are degree 2 of the step,
both on one worker are degree 1.

    A = workers with at most `queue_us` in their queue
    need = sum over operators of ceil(ready nodes / the operator's latency cap)
    need <= A   latency mode: small caps, so branches and requests spread over workers
    otherwise   throughput mode: large caps, so they merge into batches on few workers
    where       the worker with the least queue + fetch + load + exec

Admission at arrival ("early abort", `diflow_admission`) turns requests away. A step is the unit:
`commit_steps` at a time (the source: 1; 0: all that are left).

What differs from the source, for lack of nodes inside a step: branches and ControlNets of a step
start and end together; with one idle worker both branches run there, where the source would let the
second find the next one; workflows that share a base batch with their own kind only (they share its
weights); a ControlNet's part of a step is what the profile says of `base+adapter`. Higher priority
goes first, which the source does not know.

The source leaves open: caps of operators that its table does not have (`latency_cap` 1 and
`throughput_cap` the workers' batch_max; given: for all operators), and models without guidance:
a step is `spread` nodes where that degree is faster than 1, else one. Wider than 2 is not the
source's; 1 is right where nothing is guided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ..settings import Settings, SettingValue, Spec
from ..starts import Decision, Start
from ..values import DIT, TEXT, VAE, Request, Shape
from ..workflow import Section
from .base import EventPolicy
from .diflow_admission import Admission

if TYPE_CHECKING:
    from ..outlook.scene import Scene, Seat, Work

Op = tuple[str, str, Shape, str, str]  # model, node, shape, workflow, company
Key = tuple[str, str]  # request, node


class Caps(NamedTuple):
    """Nodes that one call takes at most."""

    latency: int
    throughput: int


# Section 1.4's table; a text stage has the caps of its slowest encoder.
CAPS: Mapping[tuple[str, str], Caps] = {
    ("flux.1-dev", TEXT): Caps(1, 2),
    ("flux.1-dev", DIT): Caps(1, 1),
    ("flux.1-dev", VAE): Caps(1, 1),
    ("flux.1-schnell", TEXT): Caps(1, 2),
    ("flux.1-schnell", DIT): Caps(1, 1),
    ("flux.1-schnell", VAE): Caps(1, 1),
    ("sd3-medium", TEXT): Caps(1, 2),
    ("sd3-medium", DIT): Caps(1, 2),
    ("sd3-medium", VAE): Caps(1, 1),
    ("sd3.5-large", TEXT): Caps(1, 2),
    ("sd3.5-large", DIT): Caps(1, 2),
    ("sd3.5-large", VAE): Caps(1, 1),
    ("sdxl", TEXT): Caps(4, 8),
    ("sdxl", DIT): Caps(1, 4),
    ("sdxl", VAE): Caps(1, 1),
    ("sd1.5", TEXT): Caps(16, 32),
    ("sd1.5", DIT): Caps(4, 8),
    ("sd1.5", VAE): Caps(1, 1),
}


class DiFlow(EventPolicy):
    """Node by node, latency or throughput mode by load."""

    PRELOADS = True
    SPECS: ClassVar[Mapping[str, Spec]] = {
        "admission": Spec(True),
        "mode": Spec("switch", allowed=("switch", "latency", "throughput")),
        "latency_cap": Spec(0, low=0, high=1024),  # 0: the table's
        "throughput_cap": Spec(0, low=0, high=1024),
        "spread": Spec(2, low=1, high=8),  # nodes of one step
        "commit_steps": Spec(1, low=0),
        "queue_us": Spec(10_000, low=0),  # with more work than that a worker takes nothing
        "preload": Spec(True),  # workers have the weights that fit before the first request
    }

    def __init__(self, settings: Mapping[str, SettingValue]) -> None:
        self._admission = Admission() if settings["admission"] else None
        self._mode = str(settings["mode"])
        self._latency_cap = int(settings["latency_cap"])
        self._throughput_cap = int(settings["throughput_cap"])
        self._spread = int(settings["spread"])
        self._commit_steps = int(settings["commit_steps"])
        self._queue_us = int(settings["queue_us"])
        self._preload = bool(settings["preload"])
        self._incarnations: dict[str, str] = {}

    @classmethod
    def made(cls, settings: Settings, read: Mapping[str, SettingValue]) -> DiFlow:
        """From its own settings."""
        return cls(read)

    def likely_degree(self, step_us: Mapping[int, int]) -> int:
        """Both branches at once, while there is room."""
        return self._spread if self._spread in step_us else min(step_us)

    def decide(self, scene: Scene) -> Decision:
        """The coordinator's loop, until no worker or no node is left."""
        rejects = self._admission.turned_away(scene) if self._admission else {}
        works = [w for w in scene.works if w.id not in rejects]
        works.sort(key=lambda w: (-w.request.priority, w.order))
        ready = _Ready(works, self._branches(scene, works))
        queued_us = self._queued(scene)
        starts: list[Start] = []
        while queued_us and (head := ready.pop()) is not None:
            open_ = [s for s in scene.seats if s.name in queued_us and scene.can(s, head)]
            if not open_:
                continue
            start = self._start(scene, head, ready, open_, queued_us)
            starts.append(start)
            for worker in start.workers:
                del queued_us[worker]
        return Decision(starts, rejects, preloads=self._preloads(scene))

    # -------------------------------------------------------------------------- one call

    def _start(
        self,
        scene: Scene,
        head: Work,
        ready: _Ready,
        open_: Sequence[Seat],
        queued_us: Mapping[str, int],
    ) -> Start:
        branches = ready.branches[_key(head)]
        cap, mode = self._cap(scene, head, ready, len(queued_us))
        degree = 1
        if branches > cap:  # a call a branch: side by side where two workers are open
            wide = [s for s in open_ if scene.can(s, head, branches)]
            if len(wide) >= branches:
                degree, open_ = branches, wide
        most = min(max(1, cap // branches), scene.batch_max(head.request, head.node))
        group = [head, *ready.take(head, most - 1)]
        costs = [(self._cost(scene, group, s, queued_us), s.index, s) for s in open_]
        seats = sorted(costs, key=lambda c: c[:2])[:degree]
        workers = tuple(s.name for _, _, s in sorted(seats, key=lambda c: c[1]))
        steps = min(w.steps_left for w in group)
        if head.section is Section.STEPPED and self._commit_steps:
            steps = min(steps, self._commit_steps)
        return Start(tuple(w.id for w in group), head.node, workers, steps, mode)

    def _cap(self, scene: Scene, head: Work, ready: _Ready, open_: int) -> tuple[int, str]:
        """Nodes a call, and the mode: by what else is ready, the head's other branch included."""
        mode = self._mode
        if mode == "switch":
            need = sum(
                -(-nodes // self._caps(scene, request, op[1]).latency)
                for op, nodes, request in ready.others(head)
            )
            mode = "latency" if need <= open_ else "throughput"
        caps = self._caps(scene, head.request, head.node)
        return (caps.latency if mode == "latency" else caps.throughput), mode

    def _caps(self, scene: Scene, request: Request, node: str) -> Caps:
        caps = CAPS.get((request.model.split("+")[0], node))
        if caps is None:
            branches = self._spread if node == scene.workflow(request).stepped else 1
            caps = Caps(1, branches * scene.batch_max(request, node))
        return Caps(self._latency_cap or caps.latency, self._throughput_cap or caps.throughput)

    def _branches(self, scene: Scene, works: Sequence[Work]) -> dict[Key, int]:
        """Nodes of each one's next step: what runs no faster on as many workers is one."""
        known: dict[Op, int] = {}
        for work in works:
            if _op(work) not in known:
                request, spread = work.request, self._spread
                stepped = work.section is Section.STEPPED
                divided = stepped and spread > 1 and spread in scene.degrees(request)
                if divided and scene.step_us(request, spread) < scene.step_us(request):
                    known[_op(work)] = spread
                else:
                    known[_op(work)] = 1
        return {_key(w): known[_op(w)] for w in works}

    # -------------------------------------------------------------------------- workers

    def _queued(self, scene: Scene) -> dict[str, int]:
        """What is in the queues of workers that may get more; estimates never decay."""
        queued_us = {s.name: 0 for s in scene.seats if s.idle}
        for running in scene.running:
            for worker in running.workers:
                if worker not in queued_us or queued_us[worker] > 0:
                    left_us = running.step_us * max(1, running.steps_left)
                    queued_us[worker] = queued_us.get(worker, 0) + left_us
        return {w: us for w, us in queued_us.items() if us <= self._queue_us}

    def _cost(
        self, scene: Scene, group: Sequence[Work], seat: Seat, queued_us: Mapping[str, int]
    ) -> int:
        """Queue, fetches one after the other, load; exec is the same on all."""
        first = group[0]
        moves_us = sum(scene.move_us(w, (seat.name,)) for w in group if seat.name not in w.where)
        load_us = scene.load_us(first.request, first.node, (seat.name,))
        return queued_us[seat.name] + moves_us + load_us

    def _preloads(self, scene: Scene) -> dict[str, tuple[tuple[str, str], ...]]:
        """For workers that are seen for the first time."""
        preloads: dict[str, tuple[tuple[str, str], ...]] = {}
        for seat in scene.seats:
            if self._incarnations.get(seat.name) != seat.worker.incarnation:
                self._incarnations[seat.name] = seat.worker.incarnation
                if self._preload:
                    preloads[seat.name] = tuple(
                        (m, n) for m in seat.worker.models for n in seat.worker.nodes(m)
                    )
        return preloads


class _Ready:
    """Nodes that are ready, in the order of service."""

    def __init__(self, works: Sequence[Work], branches: Mapping[Key, int]) -> None:
        self.branches = branches
        self._works: dict[Key, Work] = {_key(w): w for w in works}
        self._nodes: dict[Op, int] = {}
        self._by_op: dict[Op, dict[Key, Work]] = {}
        for work in works:
            self._nodes[_op(work)] = self._nodes.get(_op(work), 0) + branches[_key(work)]
            self._by_op.setdefault(_op(work), {})[_key(work)] = work

    def pop(self) -> Work | None:
        head = next(iter(self._works.values()), None)
        if head is not None:
            self._remove(head)
        return head

    def take(self, head: Work, most: int) -> list[Work]:
        """Others of its kind, in order."""
        if most <= 0:
            return []
        mates = [w for _, w in zip(range(most), self._by_op[_op(head)].values(), strict=False)]
        for work in mates:
            self._remove(work)
        return mates

    def others(self, head: Work) -> list[tuple[Op, int, Request]]:
        """Ready nodes by operator, without the one that is being placed."""
        rest = [(op, n, next(iter(self._by_op[op].values())).request) for op, n in self._left()]
        more = self.branches[_key(head)] - 1
        if not more:
            return rest
        if not self._by_op[_op(head)]:
            return [*rest, (_op(head), more, head.request)]
        return [(op, n + more if op == _op(head) else n, request) for op, n, request in rest]

    def _left(self) -> list[tuple[Op, int]]:
        return [(op, n) for op, n in self._nodes.items() if n]

    def _remove(self, work: Work) -> None:
        key = _key(work)
        del self._works[key]
        del self._by_op[_op(work)][key]
        self._nodes[_op(work)] -= self.branches[key]


def _key(work: Work) -> Key:
    """Nodes of one request may be ready beside each other."""
    return (work.id, work.node)


def _op(work: Work) -> Op:
    request = work.request
    return (request.model, work.node, request.shape, request.workflow, work.company)
