"""Weights as workers tell of them: sizes and times without a table, what lies where, and what is
right again when a worker did otherwise than the plan thought.
"""

from __future__ import annotations

import msgspec
import pytest

from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.profile import Profile
from control.scheduler.values import (
    DIT,
    TEXT,
    VAE,
    Arrived,
    Event,
    Load,
    ModelFacts,
    NodeParts,
    PartFacts,
    Request,
    WorkerUp,
)
from tests.scheduler.desk import BASE, MS, OTHER, ROWS, SHAPE, Desk

NODES = (TEXT, DIT, VAE)
MIB = {TEXT: 20, DIT: 60, VAE: 10}
LOAD_US = {TEXT: 2 * MS, DIT: 7 * MS, VAE: 1 * MS}
ROOM = 100  # for one of two models


def up(
    *resident: tuple[str, str], incarnation: str = "1", at_us: int = 0, peak: int = 5
) -> WorkerUp:
    parts = [
        PartFacts(
            model=model,
            node=node,
            mib=MIB[node],
            peak_mib=MIB[node] + peak,
            load_us=LOAD_US[node],
            resident=(model, node) in resident,
        )
        for model in (BASE, OTHER)
        for node in NODES
    ]
    return WorkerUp(
        at_us=at_us,
        worker="w0",
        incarnation=incarnation,
        gpu="g",
        models=tuple(ModelFacts(name=model, degrees=(1,)) for model in (BASE, OTHER)),
        memory_mib=ROOM,
        weights=tuple(sorted(parts, key=lambda part: part.resident)),
    )


class Told(Desk):
    """One worker, of which nothing is known but what it says."""

    def __init__(self, policy: str, first: WorkerUp) -> None:
        super().__init__(policy, workers=0)
        self.scheduler = Scheduler(Settings(policy=policy), Profile.from_csv(ROWS))
        self.observe(first)

    def observe(self, fact: Event) -> None:
        self.scheduler.observe(fact)

    @property
    def there(self) -> frozenset[str]:
        return self.scheduler.weights_on("w0")


ALL_BASE = tuple((BASE, node) for node in NODES)


def parts(*named: tuple[str, str]) -> set[str]:
    return {f"{model}/{node}" for model, node in named}


def brief(loads: list[Load]) -> list[tuple[str, str, int]]:
    return [(load.model, load.node, load.load_us) for load in loads]


@pytest.mark.parametrize("policy", ["hocket", "edf", "fixed-1"])
def test_plans_load_what_is_missing_and_evict_what_is_in_the_way(policy: str) -> None:
    desk = Told(policy, up(*ALL_BASE))
    assert desk.there == parts(*ALL_BASE)
    desk.arrive("a", BASE)
    desk.run()
    assert desk.loads == [], "all of it is there"
    desk.arrive("b", OTHER)
    desk.run()
    assert brief(desk.loads) == [(OTHER, node, LOAD_US[node]) for node in NODES]
    evicted = {part for load in desk.loads for part in load.evict}
    assert "base/dit" in evicted and len(desk.ended) == 2
    assert sum(MIB[part.partition("/")[2]] for part in desk.there) <= ROOM


def test_an_idle_worker_is_believed() -> None:
    desk = Told("hocket", up(*ALL_BASE))
    desk.observe(up((OTHER, DIT), at_us=5))
    assert desk.there == parts((OTHER, DIT))
    desk.arrive("b", OTHER)
    desk.run()
    assert (OTHER, DIT) not in {(load.model, load.node) for load in desk.loads}


def test_a_busy_worker_is_not() -> None:
    """What it holds now is behind what was sent to it."""
    desk = Told("hocket", up(*ALL_BASE))
    desk.arrive("b", OTHER)
    assert desk.flights
    before = desk.there
    desk.observe(up(*ALL_BASE, at_us=desk.now_us))
    assert desk.there == before != parts(*ALL_BASE)


def test_a_worker_that_started_anew_is_believed_at_once() -> None:
    desk = Told("hocket", up(*ALL_BASE))
    desk.arrive("b", OTHER)
    desk.observe(up((BASE, VAE), incarnation="2", at_us=desk.now_us))
    assert desk.there == parts((BASE, VAE))


def test_a_raised_peak_takes_room() -> None:
    """After a failed allocation the plan does not put the same beside each other again."""
    desk = Told("hocket", up((BASE, DIT), (BASE, TEXT)))
    desk.arrive("a", BASE)
    desk.run()
    assert desk.there == parts(*ALL_BASE)
    desk.observe(up(*ALL_BASE, at_us=desk.now_us, peak=40))
    desk.arrive("b", BASE)
    while not any(a.node == DIT and a.batch[0].request == "b" for a in desk.log):
        desk.next()
    assert "base/text" not in desk.there and "base/dit" in desk.there


def test_facts_and_plans_survive_the_journal() -> None:
    """A leader's journal has all that a replay needs: the same facts give the same digests."""
    digests = []
    for _ in range(2):
        scheduler = Scheduler(Settings(policy="hocket"), Profile.from_csv(ROWS))
        decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
        request = Request(id="r", model=OTHER, shape=SHAPE, steps=2, deadline_us=10**9)
        for fact in (up(*ALL_BASE), Arrived(at_us=1, request=request)):
            scheduler.observe(decoder.decode(msgspec.json.encode(fact)))
        plan = scheduler.plan(1)
        assert plan.loads and plan.assignments
        digests.append(plan.digest)
    assert digests[0] == digests[1]


CLIP_A, CLIP_B, T5 = "clip-a", "clip-b", "t5"
SIZES = {CLIP_A: 5, CLIP_B: 5, T5: 40, "dit-a": 30, "dit-b": 30, "vae": 5}
NEEDS = {
    BASE: {TEXT: (CLIP_A, T5), DIT: ("dit-a",), VAE: ("vae",)},
    OTHER: {TEXT: (CLIP_B, T5), DIT: ("dit-b",), VAE: ("vae",)},
}


def sharing(*resident: str, at_us: int = 0, memory_mib: int = 100) -> WorkerUp:
    """Two models with a T5 and a VAE in common; a part is told once for each node that needs it."""
    needed = [
        (model, node, part)
        for model, nodes in NEEDS.items()
        for node, several in nodes.items()
        for part in several
    ]
    told = tuple(
        PartFacts(
            model=model,
            node=node,
            part=part,
            mib=SIZES[part],
            peak_mib=SIZES[part] + (10 if model == OTHER else 5),
            load_us=SIZES[part] * MS,
            resident=part in resident,
        )
        for model, node, part in needed
    )
    models = tuple(
        ModelFacts(
            name=model,
            parts=tuple(NodeParts(node=node, parts=several) for node, several in nodes.items()),
        )
        for model, nodes in NEEDS.items()
    )
    return WorkerUp(
        at_us=at_us,
        worker="w0",
        incarnation="1",
        gpu="g",
        models=models,
        memory_mib=memory_mib,
        weights=told,
    )


@pytest.mark.parametrize("policy", ["hocket", "edf", "diflow"])
def test_a_load_of_one_models_encoder_counts_for_the_other(policy: str) -> None:
    """The second model costs its CLIP and its denoiser, and evicts none of what both need."""
    desk = Told(policy, sharing(CLIP_A, T5, "dit-a", "vae"))
    desk.arrive("a", BASE)
    desk.run()
    assert desk.loads == []
    desk.arrive("b", OTHER)
    desk.run()
    assert [(load.part, load.load_us) for load in desk.loads if load.load_us] == [
        (CLIP_B, 5 * MS),
        ("dit-b", 30 * MS),
    ]
    assert not {part for load in desk.loads for part in load.evict} & {T5, "vae"}
    assert desk.there >= {CLIP_B, T5, "dit-b", "vae"} and len(desk.ended) == 2


def test_a_shared_part_takes_its_room_once_and_its_largest_call_counts() -> None:
    desk = Told("hocket", sharing(CLIP_A, T5))
    residency = desk.scheduler._ledger.residency
    worker = desk.scheduler._ledger.cluster.workers["w0"]
    assert residency.footprint_mib(worker, BASE) == 80 + 10, "the VAE's call is the other's"
    assert residency.load_us(worker, OTHER, TEXT) == 5 * MS
    assert residency.needs(worker, OTHER, TEXT) == (CLIP_B, T5)
