"""The one owner of a worker's memory: weights, activations, parked latents.

An assignment's work runs inside `at_work`, which has its weights there before the group is joined
(a member that loads inside it would make the others wait in a collective), and in which a failed
allocation becomes an `OutOfMemory`: everything that can leave leaves, the estimate is raised, and
the worker goes on with the next assignment.
"""

from __future__ import annotations

import re
import resource
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from gpuworker.executor import SideNote
from gpuworker.memory.activations import Activations
from gpuworker.memory.latents import LatentPlace, LatentShelf
from gpuworker.memory.parts import PartId
from gpuworker.memory.weights import MemoryDemand, WeightStore
from gpuworker.models.card import ModelCard
from gpuworker.models.footprint import ModelCall
from gpuworker.operations.names import model_of, operation_of, shape_of
from gpuworker.prompts import PromptCache
from hocket.v1 import mesh_pb2, types_pb2

_LOADS_MAX = 1024  # told ahead of their assignments
_UNITS = {"bytes": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
_ASKED = re.compile(r"allocate (\d+(?:\.\d+)?) ?(bytes|KiB|MiB|GiB|TiB)")
# How torch, its C++ and the libraries below it say it, where they raise no type of their own.
_SAID = ("can't allocate memory", "not enough memory", "std::bad_alloc", "Cannot allocate memory")


class OutOfMemory(Exception):
    """A call needed more memory than there was; `metadata` says which and how much."""

    def __init__(self, model: str, call: ModelCall, needed_bytes: int, free_bytes: int) -> None:
        self.metadata = {
            "model": model,
            "node": call.node,
            "shape": f"{call.width}x{call.height}x{call.frames}",
            "batch": str(call.batch),
            "degree": str(call.degree),
            "needed_bytes": str(needed_bytes),
            "free_bytes": str(free_bytes),
        }
        super().__init__(
            f"{model}'s {call.node} at {self.metadata['shape']}, batch {call.batch}, takes about "
            f"{needed_bytes / 2**20:.0f} MiB beside its weights; {free_bytes / 2**20:.0f} MiB free"
        )


class Memory:
    """Thread-safe: the agent's thread expects and asks, the compute thread works."""

    def __init__(
        self,
        cards: Mapping[str, ModelCard],
        device: torch.device,
        weights: WeightStore,
        shelf: LatentShelf,
        latents_budget_bytes: int = 0,
        media_bytes: Callable[[], int] = lambda: 0,
        prompts: PromptCache | None = None,
    ) -> None:
        """`media_bytes`: what waits to be encoded."""
        self._prompts = prompts or PromptCache(0)
        self._device = device
        self._media_bytes = media_bytes
        self._weights = weights
        self._shelf = shelf
        self._latents_budget_bytes = latents_budget_bytes
        self._activations = Activations(cards, device)
        self._cards = cards
        self._term = 0
        self._evict: dict[int, tuple[PartId, ...]] = {}  # by assignment of the term
        weights.start(lambda node: self._activations.largest(*node))

    def plan_loads(self, loads: Sequence[mesh_pb2.WeightsLoad]) -> None:
        """What the plan makes room with, for assignments that are about to come."""
        for load in loads:
            if load.evict:
                self._evict[load.sequence] = tuple(name.part for name in load.evict)
        while len(self._evict) > _LOADS_MAX:
            del self._evict[next(iter(self._evict))]

    def expect(self, assignment: mesh_pb2.Assignment) -> None:
        """An assignment waits: its weights come as soon as there is room."""
        if operation_of(assignment).part and model_of(assignment.batch[0]) in self._cards:
            self._weights.expect(self._demand(assignment))

    def forget_before(self, term: int) -> None:
        """A newer leader counts its assignments anew."""
        if term == self._term:
            return
        self._term = term
        self._evict.clear()
        self._weights.forget_before(term)

    @contextmanager
    def at_work(self, assignment: mesh_pb2.Assignment, sides: list[SideNote]) -> Iterator[None]:
        """Has the weights there, the latents in hand; what the weights took goes into `sides`.

        Raises `OutOfMemory` where a call inside needed too much, and whatever made a load fail.
        """
        requests = [member.request_id for member in assignment.batch]
        if not operation_of(assignment).part:
            with self._shelf.in_hand(requests):
                yield
            return
        demand, (model, call) = self._demand(assignment), _call(assignment)
        try:
            with self._weights.use(demand) as told, self._shelf.in_hand(requests):
                sides += told
                with self._activations.measured(model, call):
                    yield
            return
        except Exception as error:
            asked_bytes = _asked_bytes(error)
            if asked_bytes is None:
                raise
            traceback.clear_frames(error.__traceback__)  # what the call had made lives there
        needed_bytes = self._activations.fell_short(model, call, asked_bytes)
        free_bytes = self._free_bytes()
        self._weights.evict_others(keep=demand.node)
        self._shelf.spill_parked()
        self._prompts.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(model, call, needed_bytes, free_bytes)

    def facts(self) -> types_pb2.Memory:
        """What heartbeats tell."""
        facts = self._weights.facts()
        parts = [
            types_pb2.PartWeights(
                model=model,
                node=node,
                size_bytes=fact.size_bytes,
                peak_bytes=fact.size_bytes + self._activations.largest(model, node),
                load_time_us=fact.load_us,
                resident=fact.resident,
                part=fact.part,
            )
            for fact in facts
            for model, node in fact.nodes
        ]
        return types_pb2.Memory(
            budget_bytes=self._weights.budget_bytes,
            weights_bytes=sum(fact.size_bytes for fact in facts if fact.resident),
            activations_bytes=max((p.peak_bytes - p.size_bytes for p in parts), default=0),
            latents_budget_bytes=self._latents_budget_bytes,
            latents_bytes=self._shelf.bytes_in(LatentPlace.DEVICE),
            latents_host_bytes=self._shelf.bytes_in(LatentPlace.HOST) + self._shelf.offered_bytes,
            latents_file_bytes=self._shelf.bytes_in(LatentPlace.FILE),
            parts=parts,
            loads=self._weights.loads,
            evictions=self._weights.evictions,
            media_bytes=self._media_bytes(),
            prompts_bytes=self._prompts.size_bytes,
            prompts_recalled=self._prompts.recalled,
            prompts_encoded=self._prompts.encoded,
        )

    def close(self) -> None:
        self._weights.close()
        self._shelf.close()

    def _demand(self, assignment: mesh_pb2.Assignment) -> MemoryDemand:
        model, call = _call(assignment)
        return MemoryDemand(
            (assignment.term, assignment.sequence),
            (model, operation_of(assignment).part),
            self._activations.bytes_of(model, call),
            self._evict.get(assignment.sequence, ()),
        )

    def _free_bytes(self) -> int:
        if self._device.type == "cuda":
            free: int = torch.cuda.mem_get_info(self._device)[0]
            return free
        return host_free_bytes()


def host_free_bytes() -> int:
    """What this process may still have of the host's memory."""
    free = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return free
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return min(free, max(0, limit - used))


def ran_out(error: BaseException) -> bool:
    """Whether it says that an allocation failed."""
    return _asked_bytes(error) is not None


def _call(assignment: mesh_pb2.Assignment) -> tuple[str, ModelCall]:
    """The model, and what is asked of it."""
    first = assignment.batch[0]
    shape = shape_of(first)
    return model_of(first), ModelCall(
        operation_of(assignment).name,
        shape.width,
        shape.height,
        max(1, shape.frames),
        len(assignment.batch),
        max(1, len(assignment.group.members)),
    )


def _asked_bytes(error: BaseException | None) -> int | None:
    """What a failed allocation had asked for, 0 where it does not say; None: it is something else.

    Some libraries put an error of their own around it.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
            isinstance(error, RuntimeError | OSError) and any(said in text for said in _SAID)
        ):
            found = _ASKED.search(text)
            return int(float(found[1]) * 2 ** _UNITS[found[2]]) if found else 0
        error = error.__cause__
    return None
