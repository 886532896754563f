"""What callers want, and what they were told."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hocket.v1 import generation_pb2, types_pb2

from .toy_model import MODEL

GATEWAYS = 2
TWO_PASSES = "two-pass"  # comes with the software
PASSES = ("first", "denoise")
_WORKFLOWS = 0.3  # share of callers that name it
COME_WITHIN_US = 4_000_000
ENDINGS = ("finished", "failed", "cancelled")
BEHAVIOURS = ("wait", "wait", "leave", "move", "cancel", "forget", "watch", "delete", "repeat")


@dataclass(frozen=True)
class CallerEvent:
    """Something that a caller heard."""

    at_us: int
    kind: str  # accepted, progress, degraded, finished, failed, cancelled, refused
    request: str
    detail: str = ""
    cursor: int = 0
    chain: int = 0  # calls that went on where an earlier one had broken off share a number


@dataclass
class Story:
    """One caller."""

    name: str
    behaviour: str
    wish: generation_pb2.GenerateRequest
    starts_us: int
    gateway: int
    told: list[CallerEvent] = field(default_factory=list)
    chain: int = 0
    left_us: int | None = None  # it gave up then
    cancelled_us: int | None = None  # its Cancel was acknowledged then
    over: bool = False  # it learned an end, or gave up
    lost: bool = False  # its stream broke before it knew a name, and it had no key
    odd: list[str] = field(default_factory=list)  # statuses that it cannot understand
    dropped: list[str] = field(default_factory=list)  # by a gateway that lives, once accepted
    woke_us: int | None = None  # a slow one began to read what had come meanwhile

    @property
    def key(self) -> str:
        return self.wish.idempotency_key

    @property
    def request(self) -> str:
        """Name of its request, as last told; "" while it knows none."""
        return next((t.request for t in reversed(self.told) if t.request), "")

    @property
    def cursor(self) -> int:
        return max((t.cursor for t in self.told), default=0)

    @property
    def ending(self) -> CallerEvent | None:
        return next((t for t in self.told if t.kind in ENDINGS), None)

    def draw(self) -> random.Random:
        """Its own chance: what it does depends on no other caller."""
        return random.Random(f"{self.name} {self.starts_us}")

    def number_of(self, progress: generation_pb2.Progress) -> str:
        """Of a step among all of its request, so that it rises; empty for calls without steps."""
        if progress.node == "dit":
            return str(progress.step)
        if progress.node in PASSES:
            return str(PASSES.index(progress.node) * self.wish.spec.steps + progress.step)
        return ""

    def __str__(self) -> str:
        told = " ".join(
            f"{t.kind}{'(' + t.detail + ')' if t.kind in ('failed', 'refused') else ''}"
            for t in self.told
            if t.kind != "progress"
        )
        heard = told or "nothing"
        return f"{self.name} ({self.behaviour}) of …{self.request[-6:]} heard {heard}"


def draw_burst(rng: random.Random, start_us: int) -> list[Story]:
    """Callers who come in one instant and ask once, for almost nothing."""
    starts_us, count = start_us + rng.randrange(COME_WITHIN_US), rng.randrange(10, 18)
    return [
        Story(f"b{number}", "burst", wish_of(steps=2), starts_us, number % GATEWAYS)
        for number in range(count)
    ]


def draw_slow(rng: random.Random, start_us: int) -> Story:
    """A caller that does not read for longer than its mailbox has room."""
    starts_us = start_us + rng.randrange(COME_WITHIN_US)
    return Story("s0", "slow", wish_of(steps=50, key="slow"), starts_us, rng.randrange(GATEWAYS))


def wish_of(steps: int, key: str = "") -> generation_pb2.GenerateRequest:
    """For a picture of the smallest size."""
    return generation_pb2.GenerateRequest(
        spec=types_pb2.GenerationSpec(
            model=MODEL, prompt="a fox", shape=types_pb2.Shape(width=64, height=64), steps=steps
        ),
        idempotency_key=key,
        progress_every=1,
    )


def draw_stories(rng: random.Random, count: int, start_us: int) -> list[Story]:
    """Callers and their times, as the seed says."""
    stories: list[Story] = []
    while len(stories) < count:
        number = len(stories)
        behaviour = rng.choice(BEHAVIOURS)
        starts_us = start_us + rng.randrange(COME_WITHIN_US)
        twins = 2 if behaviour == "wait" and rng.random() < 0.3 else 1
        keyed = behaviour in ("move", "delete") or twins > 1 or rng.random() < 0.7
        wish = wish_of(steps=rng.randrange(2, 7), key=f"key-{number}" if keyed else "")
        wish.slo.deadline_us = rng.choice((0, 0, 2_000_000, 500_000))
        wish.detached = behaviour == "forget"
        if behaviour != "repeat":  # which is a gateway, and would have to bring the graph
            chance = random.Random(f"workflow of {number} at {starts_us}").random()
            wish.spec.workflow = TWO_PASSES if chance < _WORKFLOWS else ""
        for twin in range(twins):
            own = generation_pb2.GenerateRequest()
            own.CopyFrom(wish)
            own.progress_every = rng.choice((1, 1, 3))
            gateway = rng.randrange(GATEWAYS)
            stories.append(Story(f"c{number}.{twin}", behaviour, own, starts_us, gateway))
            starts_us += rng.choice((0, 0, 1_000, 300_000))
    return stories
