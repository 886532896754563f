"""Workers that hold what they made, for workflows of several passes; losses at any event.

What a call takes has to be where its assignment says, and nothing is made twice that a living
worker has: whoever breaks either stops the test.
"""

from __future__ import annotations

import random
from typing import Any

from msgspec.structs import replace

from control.scheduler.values import (
    Arrived,
    Assignment,
    Ended,
    Held,
    JobProgress,
    Pass,
    Plan,
    Request,
    Shape,
    StepsEnded,
    WorkerLost,
)
from control.scheduler.workflow import (
    CHAIN,
    Artifact,
    ArtifactType,
    Degrees,
    Node,
    NodeKind,
    Workflow,
)

from .desk import BASE, MS, OTHER, ROWS, SHAPE, Desk

SMALL = Shape(width=256, height=256)
EMBEDDINGS, LATENTS = ArtifactType.EMBEDDINGS, ArtifactType.LATENTS
PIXELS, MEDIA = ArtifactType.PIXELS, ArtifactType.MEDIA


def once(
    id_: str, op: str, part: str, inputs: tuple[str, ...], type_: ArtifactType, **more: Any
) -> Node:
    return Node(id_, part, NodeKind.ONCE, inputs, (Artifact(f"{id_}.out", type_),), op=op, **more)


def stepped(id_: str, inputs: tuple[str, ...], **more: Any) -> Node:
    outputs = (Artifact(f"{id_}.latents", LATENTS),)
    return Node(id_, "dit", NodeKind.STEPPED, inputs, outputs, Degrees.OFFERED, op="dit", **more)


# text ─▶ base ─▶ vae ─▶ resize ─▶ encode ─▶ refine ─▶ vae2 ─▶ media
#    ╰──────────────────────────────────────▶╯
TWO_PASS = Workflow(
    "two-pass",
    (
        once("text", "text", "text", (), EMBEDDINGS),
        stepped("base", ("text.out",), scale=0.5),
        once("vae", "vae", "vae", ("base.latents",), PIXELS, scale=0.5),
        once("resize", "resize", "", ("vae.out",), PIXELS),
        once("encode", "encode_image", "vae", ("resize.out",), LATENTS),
        stepped("refine", ("text.out", "encode.out")),
        once("vae2", "vae", "vae", ("refine.latents",), PIXELS),
        once("media", "make_media", "", ("vae2.out",), MEDIA),
    ),
)

# a ─▶ base ──────────▶ refine ─▶ vae ─▶ blend ─▶ media       two encoders; the second pass is of
# b ─▶╯  ╰─▶ look ─────────────────────▶╯                     another model, on the first's latents
# load ─▶ encode ───▶╯
BRANCHES = Workflow(
    "branches",
    (
        once("a", "text", "text", (), EMBEDDINGS),
        once("b", "text", "text", (), EMBEDDINGS, model=OTHER),
        once("load", "load_image", "", (), PIXELS),
        once("encode", "encode_image", "vae", ("load.out",), LATENTS, model=OTHER),
        stepped("base", ("a.out", "b.out")),
        once("look", "vae", "vae", ("base.latents",), PIXELS),
        stepped("refine", ("b.out", "base.latents", "encode.out"), model=OTHER),
        once("vae", "vae", "vae", ("refine.latents",), PIXELS, model=OTHER),
        once("blend", "blend", "", ("vae.out", "look.out"), PIXELS),
        once("media", "make_media", "", ("blend.out",), MEDIA),
    ),
)
PASSES = {
    TWO_PASS.name: (
        Pass(node="base", model=BASE, shape=SMALL, steps=4),
        Pass(node="refine", model=BASE, shape=SHAPE, steps=3),
    ),
    BRANCHES.name: (
        Pass(node="base", model=BASE, shape=SHAPE, steps=3),
        Pass(node="refine", model=OTHER, shape=SHAPE, steps=2, branches=2),
    ),
}
WORKFLOWS = {w.name: w for w in (TWO_PASS, BRANCHES)}
FLEET_ROWS = ROWS + "".join(
    f"{BASE},g,{node},256,256,1,{degree},1,{ms * MS}\n"
    for node, degree, ms in (("text", 1, 20), ("dit", 1, 40), ("dit", 2, 30), ("vae", 1, 10))
)


def asked(name: str, workflow: Workflow, slo_us: int | None, now_us: int = 0) -> Request:
    passes = PASSES[workflow.name]
    return Request(
        id=name,
        model=BASE,
        shape=SHAPE,
        steps=passes[-1].steps,
        deadline_us=None if slo_us is None else now_us + slo_us,
        workflow=workflow.name,
        passes=passes,
    )


class Fleet(Desk):
    """A desk whose workers hold what they made."""

    def __init__(self, policy: str, *, workers: int = 3, **more: Any) -> None:
        super().__init__(
            policy, workers=workers, rows=FLEET_ROWS, workflows=tuple(WORKFLOWS.values()), **more
        )
        self.holds: dict[str, dict[tuple[str, str], int]] = {w: {} for w in self.ups}
        self.known: dict[str, Workflow] = {}
        self.ends: list[Ended] = []
        self.plans: list[Plan] = []
        self.events = 0
        self.calls: dict[tuple[str, str], int] = {}  # calls, or steps, that ended
        self.begun: set[int] = set()  # told of, so that their inputs are with them
        self.called_off: list[Assignment] = []  # whose workers may come to an end with them

    def observe(self, fact: Any) -> None:
        ended = self.scheduler.observe(fact)
        self.ends += ended
        self.ended.update({e.request: e for e in ended})
        outstanding = {a.sequence for a in self.scheduler.outstanding()}
        self.called_off += [a for a in self.flights if a.sequence not in outstanding]
        self.flights = [a for a in self.flights if a.sequence in outstanding]

    def plan(self) -> list[Assignment]:
        issued = super().plan()
        for a in issued:
            for member in a.batch:
                if member.request in self.known:
                    self._not_in_vain(a, member.request, member.first_step)
        return issued

    def over(self, a: Assignment, steps: int | None = None) -> None:
        """All of it, or the first of its steps, ended."""
        self.events += 1
        steps = steps or a.steps
        progress = []
        for member in a.batch:
            request = member.request
            for one in () if a.sequence in self.begun else member.inputs:
                there = [self.holds[w].get((request, one.artifact), -1) for w in one.holders]
                assert max(there, default=-1) >= one.version, f"{a.node} lacks {one}: {there}"
            node = self.known.get(request, CHAIN).node[a.node]
            done = member.first_step + steps if a.node in self.stepped else 0
            for worker in a.workers:
                for artifact in node.outputs:
                    self.holds[worker][request, artifact.name] = done
            self.calls[request, a.node] = self.calls.get((request, a.node), 0) + steps
            told = done or member.first_step
            self.begun.add(a.sequence)
            progress.append(JobProgress(request=request, attempt=member.attempt, steps_done=told))
        self.observe(
            StepsEnded(
                at_us=self.now_us,
                sequence=a.sequence,
                jobs=tuple(progress),
                step_time_us=(a.step_time_us,) * steps,
                last=steps == a.steps,
            )
        )

    def late(self) -> None:
        """What was called off comes to its end all the same, where its workers live."""
        living = {w.name for w in self.scheduler.workers() if w.state == "up"}
        gone, self.called_off = self.called_off, []
        for a in gone:
            there = all(
                any(self.holds[w].get((m.request, i.artifact), -1) >= i.version for w in i.holders)
                for m in a.batch
                for i in m.inputs
            )
            if living.issuperset(a.workers) and there and a.batch[0].request not in self.ended:
                self.over(a)
        self.plan()

    def lose(self, worker: str) -> None:
        """Its lease ends; what it holds is there until it comes back as another process. What it
        was at got half-way, as far as it has steps.
        """
        for a in [a for a in self.flights if a.steps > 1 and a.start_us < self.now_us]:
            self.over(a, a.steps // 2)
        self.observe(WorkerLost(at_us=self.now_us, worker=worker))
        self.called_off = [a for a in self.called_off if worker not in a.workers]
        self.plan()

    def back(self, worker: str, *, same: bool, plan: bool = True) -> None:
        """It comes back, as the same process with all that it held, or as another one."""
        up = self.ups[worker]
        if not same:
            self.holds[worker] = {}
            up = replace(up, incarnation=f"{up.incarnation}+")
        held = tuple(
            Held(request=request, steps_done=done, artifact=artifact)
            for (request, artifact), done in self.holds[worker].items()
        )
        self.ups[worker] = replace(up, at_us=self.now_us, latents=held)
        self.observe(self.ups[worker])
        if plan:
            self.plan()

    def _not_in_vain(self, a: Assignment, request: str, first_step: int) -> None:
        """Nobody alive has what a call is to make."""
        living = {w.name for w in self.scheduler.workers() if w.state == "up"}
        for artifact in self.known[request].node[a.node].outputs:
            made = [self.holds[w].get((request, artifact.name), -1) for w in living]
            if a.node in self.stepped:
                assert max(made) <= first_step, f"{a.node} of {request} goes back: {made}"
            else:
                assert max(made) < 0, f"{a.node} of {request} is made again"


def led_anew(before: Fleet, policy: str, *, arrive_first: bool, lead_us: int) -> Fleet:
    """A new leader, who learns of open requests and of what workers hold, one after the other."""
    fleet = Fleet(policy, offers=(), workers=0, lead_us=lead_us)
    fleet.now_us, fleet.known, fleet.calls = before.now_us, before.known, before.calls
    fleet.ups, fleet.holds = before.ups, before.holds
    entered = [
        Arrived(at_us=fleet.now_us, request=asked(r, before.known[r], None))
        for r in before.known
        if r not in before.ended
    ]
    if arrive_first:
        for fact in entered:
            fleet.observe(fact)
    for worker in before.ups:
        fleet.back(worker, same=True, plan=False)
    if not arrive_first:
        for fact in entered:
            fleet.observe(fact)
    fleet.plan()
    return fleet


def disturbed(policy: str, workflow: Workflow, at_event: int, seed: int, lead_us: int) -> Fleet:
    """Two requests; at an event a worker is lost, and comes back a few events later."""
    draw = random.Random(seed * 1_000 + at_event)
    fleet = Fleet(policy, lead_us=lead_us)
    for i, slo_us in enumerate((900 * MS, None)):
        fleet.known[f"r{i}"] = workflow
        fleet.enter(asked(f"r{i}", workflow, slo_us))
    lost = back_at = None
    for _ in range(500):
        if fleet.events >= at_event and back_at is None:
            lost = draw.choice(sorted(fleet.ups))
            back_at = fleet.events + draw.randrange(4)
            fleet.lose(lost)
        elif lost is not None and back_at is not None and fleet.events >= back_at:
            fleet.back(lost, same=draw.random() < 0.5)
            lost = None
            if draw.random() < 0.5:
                fleet.late()
        elif fleet.flights or fleet.scheduler.wake_us() is not None:
            fleet.next()
        else:
            break
    return fleet
