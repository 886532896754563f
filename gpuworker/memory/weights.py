"""The weights a worker serves with: which are on the device, which come next, which have to leave.

The weights of one node of one model are a *part*. With a budget, parts come when an assignment
needs them and leave when others need the room; without one, all are there from the start and stay.

    agent ── expect(assignment) ──▶ demands, in the plan's order
                                       │  loader thread: the first part that is missing, once there
                                       ▼  is room; what is in use, or wanted before it, stays
    compute ── use(assignment) ──▶ waits only if the part is not there yet

This object alone knows what is resident; control keeps a forecast of it, and hears of it in
heartbeats. What the plan wants evicted leaves first, what nobody waits for next (least recently
used first), what is wanted latest last.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpuworker.executor import SideNote, Stopwatch
from gpuworker.memory.host_copies import FileCopy, HostCopy, PinnedCopy
from hocket.tracing import spans

log = logging.getLogger(__name__)

PartName = tuple[str, str]  # model, node
Order = tuple[int, int]  # term and sequence of an assignment


class MemoryDemand(NamedTuple):
    """What an assignment needs."""

    order: Order
    part: PartName
    activations_bytes: int  # beside the weights, while it runs
    evict: tuple[PartName, ...] = ()  # what the plan makes room with


class PartFact(NamedTuple):
    """A part as others see it."""

    name: PartName
    size_bytes: int
    load_us: int
    resident: bool


class BudgetTooSmall(Exception):
    """A part alone is larger than the budget. Fields: `part`, `size_bytes`, `budget_bytes`."""

    def __init__(self, part: PartName, size_bytes: int, budget_bytes: int) -> None:
        super().__init__(
            f"memory_mib: {budget_bytes / 2**20:.1f} MiB for weights; allowed: no less than the "
            f"{size_bytes / 2**20:.1f} MiB of {part[0]}'s {part[1]}"
        )
        self.part, self.size_bytes, self.budget_bytes = part, size_bytes, budget_bytes


class StoreClosed(Exception):
    """The worker stops: no more weights come."""


@dataclass
class _Part:
    """One node's modules and where their weights are while they are away."""

    name: PartName
    modules: list[nn.Module] = field(default_factory=list)
    copies: list[HostCopy] = field(default_factory=list)
    size_bytes: int = 0
    load_us: int = 0
    arrival: SideNote | None = None  # of its last load, until somebody used it

    def fill(self) -> list[Tensor]:
        return [tensor for copy in self.copies for tensor in copy.fill()]

    def install(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self._parameters(), tensors, strict=True):
            parameter.data = tensor

    def drop(self, device: torch.device) -> None:
        for parameter in self._parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=device)

    def _parameters(self) -> Iterator[nn.Parameter]:
        for module in self.modules:
            yield from module.parameters()


class WeightStore:
    """Thread-safe: the agent expects, the compute thread uses, a thread of its own loads."""

    def __init__(self, device: torch.device, budget_bytes: int = 0) -> None:
        """`budget_bytes` is for weights and activations; 0: everything stays."""
        self._device = device
        self.budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._parts: dict[PartName, _Part] = {}
        self._resident: dict[PartName, None] = {}  # least recently used first
        self._demands: dict[Order, MemoryDemand] = {}  # of assignments not over, in plan order
        self._newest: Order = (0, 0)
        self._waiting: MemoryDemand | None = None  # the compute thread cannot go on without it
        self._in_use: MemoryDemand | None = None
        self._loading: PartName | None = None
        self._failed: dict[PartName, BaseException] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        self.loads = 0
        self.evictions = 0

    # ------------------------------------------------------------------------------------------
    # at start

    def add(self, part: PartName, module: nn.Module, folder: Path) -> None:
        """Takes a module, whose weights are on the host, into a part.

        Without a budget it goes to the device for good; with one, its weights leave memory.
        """
        entry = self._parts.setdefault(part, _Part(part))
        entry.modules.append(module)
        entry.size_bytes += sum(parameter.nbytes for parameter in module.parameters())
        if not self.budget_bytes:
            began = Stopwatch()
            module.to(self._device)
            entry.load_us += began.elapsed_ns() // 1000
            self._resident[part] = None
            return
        if entry.size_bytes > self.budget_bytes:
            raise BudgetTooSmall(part, entry.size_bytes, self.budget_bytes)
        began = Stopwatch()
        on_cuda = self._device.type == "cuda"
        entry.copies.append(
            PinnedCopy(module, self._device) if on_cuda else FileCopy(module, folder)
        )
        entry.load_us += began.elapsed_ns() // 1000  # it read everything once: a first estimate
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self._device)
        entry.drop(self._device)

    def start(self, activations_bytes: Callable[[PartName], int]) -> None:
        """Loads what fits beside each other, in the order of `add`, and begins to take demands."""
        if not self.budget_bytes:
            return
        for name, part in self._parts.items():
            room = self.budget_bytes - self._used_bytes() - part.size_bytes
            if room >= max(activations_bytes(other) for other in (*self._resident, name)):
                self._load(part, ())
                part.arrival = None  # it is no request's
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------
    # the agent's side

    def expect(self, demand: MemoryDemand) -> None:
        """An assignment will need a part; loading begins when there is room. Never blocks."""
        with self._changed:
            if demand.order > self._newest and demand.part in self._parts:
                self._newest = demand.order
                self._demands[demand.order] = demand
                self._changed.notify_all()

    def forget_before(self, term: int) -> None:
        """A newer leader has forgotten what the older one had planned."""
        with self._changed:
            for order in [order for order in self._demands if order[0] < term]:
                del self._demands[order]
            self._changed.notify_all()

    def facts(self) -> tuple[PartFact, ...]:
        """All parts, those used last at the end."""
        with self._changed:
            away = [name for name in self._parts if name not in self._resident]
            return tuple(
                PartFact(
                    name,
                    self._parts[name].size_bytes,
                    self._parts[name].load_us,
                    name in self._resident,
                )
                for name in (*away, *self._resident)
            )

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    # ------------------------------------------------------------------------------------------
    # the compute thread's side

    @contextmanager
    def use(self, demand: MemoryDemand) -> Iterator[tuple[SideNote, ...]]:
        """Holds a part on the device; gives what is to be told of the load that it took, if any.

        Raises whatever made the load fail, and StoreClosed.
        """
        if demand.part not in self._parts:
            raise KeyError(f"no weights of {demand.part}")
        with self._changed:
            for order in [order for order in self._demands if order < demand.order]:
                del self._demands[order]  # assignments are run in their order: those are over
            demand = self._demands.setdefault(demand.order, demand)
            waited = self._wait_for(demand)
            self._in_use = demand
            arrival = self._touch(demand.part)
        try:
            yield () if arrival is None else (_told(arrival, waited),)
        finally:
            if self._thread is not None and self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # it may be freed from now on
            with self._changed:
                self._in_use = None
                self._demands.pop(demand.order, None)
                self._changed.notify_all()

    def evict_others(self, keep: PartName) -> None:
        """Makes all the room there is: after an allocation failed."""
        with self._changed:
            away = [name for name in self._resident if name != keep] if self.budget_bytes else []
            for name in away:
                self._evict(name)

    def _wait_for(self, demand: MemoryDemand) -> int:
        """Returns how long it took, in nanoseconds. The lock is held by the caller."""
        began = Stopwatch()
        self._waiting = demand
        self._failed.pop(demand.part, None)  # of an attempt that nobody waited for
        self._changed.notify_all()
        self._changed.wait_for(
            lambda: demand.part in self._resident or demand.part in self._failed or self._closed
        )
        if demand.part in self._resident:
            self._make_room(demand)
        self._waiting = None
        if (failure := self._failed.pop(demand.part, None)) is not None:
            self._demands.pop(demand.order, None)
            raise failure
        if demand.part not in self._resident:
            raise StoreClosed
        return began.elapsed_ns()

    def _make_room(self, demand: MemoryDemand) -> None:
        """For the activations of a part that may have been there before."""
        for name in self._victims(demand) or () if self.budget_bytes else ():
            self._evict(name)

    def _touch(self, name: PartName) -> SideNote | None:
        del self._resident[name]
        self._resident[name] = None
        part = self._parts[name]
        arrival, part.arrival = part.arrival, None
        return arrival

    # ------------------------------------------------------------------------------------------
    # the loader

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                found = None if self._closed else self._next()
                if found is None:
                    return
                demand, victims = found
                for name in victims:
                    self._evict(name)
                self._loading = demand.part
            try:
                self._load(self._parts[demand.part], victims)
            except BaseException as error:  # whoever needs the part raises it
                log.warning("cannot load %s's %s: %s", *demand.part, error)
                traceback.clear_frames(error.__traceback__)  # what it had read so far lives there
                with self._changed:
                    self._loading = None
                    self._failed[demand.part] = error
                    self._changed.notify_all()

    def _next(self) -> tuple[MemoryDemand, tuple[PartName, ...]] | None:
        """The load to begin now, and what has to leave for it."""
        urgent = [self._waiting] if self._waiting is not None else []
        for demand in (*urgent, *(self._demands[order] for order in sorted(self._demands))):
            if demand.part in self._resident or demand.part in self._failed:
                continue
            victims = self._victims(demand)
            return None if victims is None else (demand, victims)
        return None

    def _victims(self, demand: MemoryDemand) -> tuple[PartName, ...] | None:
        """What has to leave for a part; None where that is not to be had now."""
        before = {w.part for w in self._demands.values() if w.order <= demand.order}
        before.add(demand.part)
        if self._waiting is not None:  # whose demand a newer leader may have forgotten
            before.add(self._waiting.part)
        later: dict[PartName, Order] = {}
        for order in sorted(self._demands, reverse=True):
            later[self._demands[order].part] = order  # the first one stays
        used = self._in_use
        free = [
            name
            for name in self._resident
            if name not in before and (used is None or name != used.part)
        ]
        free.sort(key=lambda name: _worth(name, demand, later))
        activations_bytes = max(demand.activations_bytes, used.activations_bytes if used else 0)
        excess_bytes = self._used_bytes() + activations_bytes - self.budget_bytes
        if demand.part not in self._resident:
            excess_bytes += self._parts[demand.part].size_bytes
        victims = []
        for name in free:
            if excess_bytes <= 0:
                break
            victims.append(name)
            excess_bytes -= self._parts[name].size_bytes
        for name in tuple(victims):  # a large one may have made the room of small ones before it
            if excess_bytes + self._parts[name].size_bytes <= 0:
                excess_bytes += self._parts[name].size_bytes
                victims.remove(name)
        # Activations are an estimate: it must not keep the compute thread waiting for ever.
        return tuple(victims) if excess_bytes <= 0 or demand is self._waiting else None

    def _load(self, part: _Part, victims: tuple[PartName, ...]) -> None:
        began = Stopwatch()
        tensors = part.fill()
        with self._changed:
            part.install(tensors)
            part.load_us = began.elapsed_ns() // 1000
            part.arrival = began.side(
                spans.LOAD,
                {
                    spans.PART: "/".join(part.name),
                    spans.BYTES: part.size_bytes,
                    spans.EVICTED: ",".join("/".join(name) for name in victims),
                },
            )
            self._resident[part.name] = None
            self._loading = None
            self.loads += 1
            self._changed.notify_all()

    def _evict(self, name: PartName) -> None:
        del self._resident[name]
        self._parts[name].drop(self._device)
        self._parts[name].arrival = None
        self.evictions += 1

    def _used_bytes(self) -> int:
        """On the device: resident, on the way there, or stuck."""
        fixed = sum(
            copy.fixed_bytes
            for name, part in self._parts.items()
            if name not in self._resident
            for copy in part.copies
        )
        coming = () if self._loading is None else (self._loading,)
        return fixed + sum(self._parts[name].size_bytes for name in (*self._resident, *coming))


def _worth(
    name: PartName, demand: MemoryDemand, later: dict[PartName, Order]
) -> tuple[bool, int, int]:
    """Small leaves first; equal ones in the order of their last use."""
    term, sequence = later.get(name, (0, 0))
    soon = (-term, -sequence) if name in later else (-(1 << 62), 0)
    return (name not in demand.evict, *soon)


def _told(arrival: SideNote, waited_ns: int) -> SideNote:
    attributes = {**arrival.attributes, spans.WAITED_US: waited_ns // 1000}
    return SideNote(arrival.name, arrival.start_unix_ns, arrival.end_unix_ns, attributes)
