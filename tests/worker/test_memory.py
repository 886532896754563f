"""A failed allocation is an event: what it asked for is told, the estimate is raised, all that can
leave has left. The errors are torch's and numpy's own, of allocations that no machine can grant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest
import torch

from gpuworker.config import EMBEDDED_MODEL
from gpuworker.executor import SideNote
from gpuworker.loading import load_card
from gpuworker.memory.budget import Memory, OutOfMemory
from gpuworker.memory.latents import LatentShelf
from gpuworker.memory.weights import WeightStore
from gpuworker.state import StateCorrupt
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker.worker_pool import CPU

HUGE = 1 << 46  # bytes: more than the address space has room for
MODEL = "hocket-emoji"
_sequences = count(1)


@pytest.fixture
def memory() -> Iterator[Memory]:
    store = WeightStore(CPU, 64 << 20)
    card = load_card(str(EMBEDDED_MODEL), CPU, torch.float32, store)
    made = Memory({MODEL: card}, CPU, store, LatentShelf(lambda *_: None, lambda _: None))
    yield made
    made.close()


def assignment(node: str, side: int = 64) -> mesh_pb2.Assignment:
    shape = types_pb2.Shape(width=side, height=side)
    member = mesh_pb2.BatchMember(
        request_id="r", spec=types_pb2.GenerationSpec(model=MODEL, shape=shape)
    )
    return mesh_pb2.Assignment(
        term=1,
        sequence=next(_sequences),
        node=node,
        batch=[member],
        group=types_pb2.Group(members=["w0"]),
    )


def torch_asks() -> None:
    torch.empty(HUGE, dtype=torch.uint8)


def numpy_asks() -> None:
    np.empty(HUGE, dtype=np.uint8)


def wrapped() -> None:
    try:
        torch_asks()
    except RuntimeError as error:
        raise StateCorrupt("so it seems") from error


@pytest.mark.parametrize("asks", [torch_asks, numpy_asks, wrapped])
def test_a_failed_allocation_is_recognised_and_told(
    memory: Memory, asks: Callable[[], None]
) -> None:
    peak = {(p.model, p.node): p.peak_bytes for p in memory.facts().parts}
    assert sum(p.resident for p in memory.facts().parts) == 3
    with pytest.raises(OutOfMemory) as told, memory.at_work(assignment("vae"), []):
        asks()
    facts = told.value.metadata
    assert (facts["model"], facts["node"], facts["shape"]) == (MODEL, "vae", "64x64x1")
    assert (facts["batch"], facts["degree"]) == ("1", "1")
    assert int(facts["needed_bytes"]) > HUGE > int(facts["free_bytes"]) > 0
    after = memory.facts()
    assert [p.node for p in after.parts if p.resident] == ["vae"], "the others have made room"
    raised = {(p.model, p.node): p.peak_bytes for p in after.parts}
    assert raised.pop((MODEL, "vae")) > peak.pop((MODEL, "vae")) + HUGE // 2
    assert raised == peak
    assert after.activations_bytes > HUGE


def test_without_a_budget_nothing_can_leave() -> None:
    store = WeightStore(CPU)
    card = load_card(str(EMBEDDED_MODEL), CPU, torch.float32, store)
    memory = Memory({MODEL: card}, CPU, store, LatentShelf(lambda *_: None, lambda _: None))
    with pytest.raises(OutOfMemory), memory.at_work(assignment("vae"), []):
        torch_asks()
    with memory.at_work(assignment("dit"), []) as _:
        assert all(part.resident for part in memory.facts().parts)
    memory.close()


def test_what_the_failed_call_held_is_freed(memory: Memory) -> None:
    """Its frames would keep it alive for as long as the error is looked at."""
    freed: list[bool] = []

    class Large:
        def __del__(self) -> None:
            freed.append(True)

    def call() -> None:
        large = Large()
        torch_asks()
        del large

    try:
        with memory.at_work(assignment("vae"), []):
            call()
    except OutOfMemory:
        assert freed == [True]


def test_other_errors_pass(memory: Memory) -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory.at_work(assignment("dit"), []):
        raise RuntimeError("shapes do not fit")
    assert memory.facts().evictions == 0


def test_work_goes_on_and_tells_of_its_loads(memory: Memory) -> None:
    with pytest.raises(OutOfMemory), memory.at_work(assignment("vae"), []):
        torch_asks()
    sides: list[SideNote] = []
    with memory.at_work(assignment("dit"), sides):
        pass
    (load,) = sides
    assert load.name == "load" and load.attributes["hocket.part"] == f"{MODEL}/dit"
    assert int(load.attributes["hocket.bytes"]) > 1 << 20
    assert int(load.attributes["hocket.waited_us"]) > 0
