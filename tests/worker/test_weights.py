"""Weights on demand: what comes and goes, in which order, and that every bit comes back.

Real modules, real safetensors files, the real loader thread; where a test waits, it waits for that
thread, never for time.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gpuworker.loading import load_card
from gpuworker.memory.parts import NodeName
from gpuworker.memory.weights import (
    BudgetTooSmall,
    MemoryDemand,
    Order,
    StoreClosed,
    WeightStore,
)
from gpuworker.models.card import ENCODE_IMAGE
from tests.waiting import WAIT_S, until
from tests.worker.families import FAMILIES
from tests.worker.worker_pool import CPU

SIDE = 32
PART_BYTES = SIDE * SIDE * 4
PARTS: tuple[NodeName, ...] = tuple((model, node) for model in "ab" for node in ("text", "dit"))
IN_SLICE = ("flux", "wan", "ltx")


class Shelfful:
    """A store of four equal parts, and the modules in it."""

    def __init__(self, folder: Path, budget_parts: float) -> None:
        torch.manual_seed(5)
        self.store = WeightStore(CPU, int(budget_parts * PART_BYTES))
        self.modules: dict[NodeName, nn.Module] = {}
        self.bits: dict[NodeName, torch.Tensor] = {}
        self.folder = folder
        for number, part in enumerate(PARTS):
            module = nn.Linear(SIDE, SIDE, bias=False)
            file = folder / f"{number}.safetensors"
            save_file(dict(module.state_dict()), file)
            self.modules[part], self.bits[part] = module, module.weight.detach().clone()
            self.store.add(part, "/".join(part), module, (file,))

    def started(self) -> Shelfful:
        self.store.start(lambda _: 0)
        return self

    @property
    def resident(self) -> list[NodeName]:
        return [fact.nodes[0] for fact in self.store.facts() if fact.resident]

    def right(self, part: NodeName) -> bool:
        weight = self.modules[part].weight
        return isinstance(weight, torch.Tensor) and torch.equal(weight, self.bits[part])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def two(folder: Path) -> Iterator[Shelfful]:
    """Room for two of the four."""
    made = Shelfful(folder, 2).started()
    yield made
    made.store.close()


def demand(
    sequence: int, part: NodeName, activations: int = 0, evict: tuple[NodeName, ...] = ()
) -> MemoryDemand:
    return MemoryDemand((1, sequence), part, activations, tuple(map("/".join, evict)))


A_TEXT, A_DIT, B_TEXT, B_DIT = PARTS


def test_what_fits_is_there_from_the_start_and_what_leaves_comes_back(two: Shelfful) -> None:
    assert two.resident == [A_TEXT, A_DIT]
    assert two.modules[B_DIT].weight.numel() == 0, "away is away"
    for sequence, part in enumerate((B_DIT, A_TEXT, B_TEXT, A_DIT), 1):
        with two.store.use(demand(sequence, part)):
            assert two.right(part)
            assert len(two.resident) <= 2
    assert (two.store.loads, two.store.evictions) == (2 + 4, 4)


async def test_the_next_part_loads_while_this_one_is_in_use(two: Shelfful) -> None:
    """And what is in use, or wanted before it, is not what makes room."""
    for sequence, part in enumerate((A_DIT, B_TEXT, A_DIT), 1):
        two.store.expect(demand(sequence, part))
    with two.store.use(demand(1, A_DIT)) as told:
        assert told == (), "it came at the start, for nobody"
        await until(lambda: two.resident == [A_DIT, B_TEXT])
        assert two.right(A_DIT)
    with two.store.use(demand(2, B_TEXT)) as told:
        (note,) = told
        assert note.attributes["hocket.evicted"] == "a/text"
    with two.store.use(demand(3, A_DIT)) as told:
        assert told == ()


async def test_a_part_waits_until_what_is_in_use_can_leave(two: Shelfful) -> None:
    """Two parts in use and wanted before: nothing can leave for a third until the first is over."""
    for sequence, part in enumerate((A_TEXT, A_DIT, B_DIT), 1):
        two.store.expect(demand(sequence, part))
    with two.store.use(demand(1, A_TEXT)):
        assert two.resident == [A_DIT, A_TEXT]
    with two.store.use(demand(2, A_DIT)):
        await until(lambda: B_DIT in two.resident)
        assert A_TEXT not in two.resident


@pytest.mark.parametrize(("named", "stays"), [((), A_DIT), ((A_DIT,), A_TEXT)])
def test_what_the_plan_names_leaves_first(
    two: Shelfful, named: tuple[NodeName, ...], stays: NodeName
) -> None:
    with two.store.use(demand(1, B_DIT, evict=named)):
        assert stays in two.resident


def test_of_what_is_wanted_the_latest_leaves_first(two: Shelfful) -> None:
    two.store.expect(demand(2, A_TEXT))
    two.store.expect(demand(3, A_DIT))
    with two.store.use(demand(1, B_DIT)):
        assert two.resident == [A_TEXT, B_DIT]


def test_activations_need_room_too(two: Shelfful) -> None:
    with two.store.use(demand(1, A_DIT, activations=PART_BYTES)):
        assert two.resident == [A_DIT]
    with two.store.use(demand(2, B_DIT, activations=100 * PART_BYTES)):  # it is but an estimate
        assert two.resident == [B_DIT] and two.right(B_DIT)


def test_a_newer_leader_forgets_what_the_older_one_wanted(folder: Path) -> None:
    one = Shelfful(folder, 1).started()
    with one.store.use(demand(1, A_TEXT)):
        one.store.expect(demand(2, A_DIT))
        one.store.expect(demand(3, B_DIT))
        one.store.forget_before(2)
    with one.store.use(MemoryDemand((2, 1), B_TEXT, 0)):
        assert one.resident == [B_TEXT]
    assert one.store.loads == 2, "the older one's were never loaded"
    one.store.close()


def test_assignments_that_were_passed_over_protect_nothing(two: Shelfful) -> None:
    two.store.expect(demand(1, A_TEXT))
    two.store.expect(demand(2, A_DIT))
    with two.store.use(demand(3, B_DIT)):
        assert len(two.resident) == 2 and two.right(B_DIT)


def test_a_failed_load_is_told_to_who_needs_it_and_tried_again(two: Shelfful) -> None:
    file = two.folder / "3.safetensors"
    file.rename(file.with_suffix(".away"))
    with pytest.raises(FileNotFoundError), two.store.use(demand(1, B_DIT)):
        pass
    file.with_suffix(".away").rename(file)
    with two.store.use(demand(2, B_DIT)):
        assert two.right(B_DIT)


def test_a_store_that_closes_lets_nobody_wait(folder: Path) -> None:
    one = Shelfful(folder, 1).started()
    one.store.close()
    with pytest.raises(StoreClosed), one.store.use(demand(1, B_DIT)):
        pass


def test_a_part_larger_than_the_budget_is_refused_at_start(folder: Path) -> None:
    with pytest.raises(BudgetTooSmall) as refused:
        Shelfful(folder, 0.5)
    found = refused.value
    assert (found.node, found.size_bytes, found.budget_bytes) == (
        A_TEXT,
        PART_BYTES,
        PART_BYTES // 2,
    )


def test_after_a_failed_allocation_all_others_leave(two: Shelfful) -> None:
    two.store.evict_others(keep=A_DIT)
    assert two.resident == [A_DIT]


def test_a_new_leader_takes_no_part_from_who_waits_for_it(
    two: Shelfful, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demand was forgotten while the compute thread waited for its load; then the part made
    room for its own activations, and the worker took its store for closed.
    """
    loading, go = threading.Event(), threading.Event()
    load = two.store._load

    def slowly(*args: object) -> None:
        loading.set()
        go.wait(WAIT_S)
        load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(two.store, "_load", slowly)
    leader = threading.Thread(
        target=lambda: (loading.wait(WAIT_S), two.store.forget_before(2), go.set())
    )
    leader.start()
    with two.store.use(demand(1, B_DIT, activations=PART_BYTES + 1)):
        assert two.right(B_DIT)
    leader.join()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_order_every_use_finds_its_weights(folder: Path, seed: int) -> None:
    """Demands come from one thread, uses from another, loads from a third."""
    chance = random.Random(seed)
    full = Shelfful(folder, chance.choice((1, 1.5, 2, 3))).started()
    demands: list[MemoryDemand] = []
    order: Order = (1, 0)
    for _ in range(300):
        order = (order[0] + 1, 1) if chance.random() < 0.02 else (order[0], order[1] + 1)
        activations = chance.choice((0, 0, PART_BYTES // 2))
        demands.append(
            MemoryDemand(
                order, chance.choice(PARTS), activations, ("/".join(chance.choice(PARTS)),)
            )
        )
    told = threading.Semaphore(0)

    def agent() -> None:
        for each in demands:
            full.store.forget_before(each.order[0])
            full.store.expect(each)
            told.release()

    expecting = threading.Thread(target=agent)
    expecting.start()
    for each in demands:
        told.acquire()
        with full.store.use(each):
            assert full.right(each.node)
            resident = full.resident
            assert len(resident) * PART_BYTES <= full.store.budget_bytes
    expecting.join()
    full.store.close()
    assert full.store.loads - full.store.evictions == len(full.resident)


@pytest.mark.parametrize(
    "family",
    [name if name in IN_SLICE else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES],
)
def test_every_family_makes_the_same_with_room_for_one_part(family: str, tmp_path: Path) -> None:
    """Encode, steps and decode, each with the other parts away; and nothing stays that is not in
    the folder's files.
    """
    reference = FAMILIES[family].make(tmp_path / family)
    plain = load_card(reference.folder, CPU, torch.float32)
    unbounded = WeightStore(CPU)
    load_card(reference.folder, CPU, torch.float32, unbounded)
    facts = unbounded.facts()
    nodes = {node for fact in facts for node in fact.nodes}
    largest = max(sum(fact.size_bytes for fact in facts if node in fact.nodes) for node in nodes)
    store = WeightStore(CPU, largest)
    card = load_card(reference.folder, CPU, torch.float32, store)
    assert store._used_bytes() == 0, "all of it can leave"
    store.start(lambda _: 0)
    model = card.facts.name
    with store.use(demand(1, (model, "text"))):
        state = card.encode(**reference.settings)
    mine, theirs = [state], [plain.encode(**reference.settings)]
    for step in range(2):
        with store.use(demand(2 + step, (model, "dit"))):
            mine = card.step(mine, None)
        theirs = plain.step(theirs, None)
    with store.use(demand(9, (model, "vae"))):
        frames = card.decode(mine[0])
    assert mine[0].to_bytes() == theirs[0].to_bytes()
    assert (frames == plain.decode(theirs[0])).all()
    if ENCODE_IMAGE in card.operations:
        with store.use(demand(10, (model, "vae"))):
            latents = card.encode_image(frames, seed=1)
        assert latents.to_bytes() == plain.encode_image(frames, seed=1).to_bytes()
    assert store.evictions >= 2
    store.close()
