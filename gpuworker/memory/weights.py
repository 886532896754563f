"""The weights a worker serves with: which are on the device, which come next, which have to leave.

A component's weights are a *part*, named by what they are (gpuworker/folders/identity.py). A node
of a model needs one or several; what several models have in common is one part: one module, loaded
once, counted once, evicted once. With a budget, parts come when an assignment needs them and leave
when others need the room; without one, all are there from the start and stay.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gpuworker.executor import SideNote, Stopwatch
from gpuworker.memory.host_copies import FileCopy, PinnedCopy
from gpuworker.memory.parts import NodeName, PartFact, PartId, WeightPart
from hocket.tracing import spans

log = logging.getLogger(__name__)

Order = tuple[int, int]  # term and sequence of an assignment


class MemoryDemand(NamedTuple):
    """What an assignment needs."""

    order: Order
    node: NodeName  # whose parts it uses
    activations_bytes: int  # beside the weights, while it runs
    evict: tuple[PartId, ...] = ()  # what the plan makes room with


class BudgetTooSmall(Exception):
    """A node's parts are larger than the budget. Fields: `node`, `size_bytes`, `budget_bytes`."""

    def __init__(self, node: NodeName, size_bytes: int, budget_bytes: int) -> None:
        super().__init__(
            f"memory_mib: {budget_bytes / 2**20:.1f} MiB for weights; allowed: no less than the "
            f"{size_bytes / 2**20:.1f} MiB of {node[0]}'s {node[1]}"
        )
        self.node, self.size_bytes, self.budget_bytes = node, size_bytes, budget_bytes


class StoreClosed(Exception):
    """The worker stops: no more weights come."""


class WeightStore:
    """Thread-safe: the agent expects, the compute thread uses, a thread of its own loads."""

    def __init__(self, device: torch.device, budget_bytes: int = 0) -> None:
        """`budget_bytes` is for weights and activations; 0: everything stays."""
        self._device = device
        self.budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._parts: dict[PartId, WeightPart] = {}
        self._nodes: dict[NodeName, list[PartId]] = {}
        self._resident: dict[PartId, None] = {}  # least recently used first
        self._demands: dict[Order, MemoryDemand] = {}  # of assignments not over, in plan order
        self._newest: Order = (0, 0)
        self._waiting: MemoryDemand | None = None  # the compute thread cannot go on without it
        self._in_use: MemoryDemand | None = None
        self._loading: PartId | None = None
        self._failed: dict[PartId, BaseException] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        self.loads = 0
        self.evictions = 0

    # ------------------------------------------------------------------------------------------
    # at start

    def module(self, part: PartId) -> nn.Module | None:
        """The module of a part that is here already; None: it has to be made, and added."""
        known = self._parts.get(part)
        return None if known is None else known.module

    def add(self, node: NodeName, part: PartId, module: nn.Module, files: Sequence[Path]) -> None:
        """Has a node use a part, whose module's weights are on the host, or shared with others.

        Without a budget they go to the device for good; with one, they leave memory, and come back
        from `files` (on a CPU). Raises `BudgetTooSmall`.
        """
        if part not in self._parts:
            self._parts[part] = self._taken(part, module, files)
        entry = self._parts[part]
        assert entry.module is module, "a part has one module"
        parts = self._nodes.setdefault(node, [])
        if part not in parts:
            parts.append(part)
        if node not in entry.nodes:
            entry.nodes.append(node)
        size_bytes = sum(self._parts[each].size_bytes for each in parts)
        if self.budget_bytes and size_bytes > self.budget_bytes:
            raise BudgetTooSmall(node, size_bytes, self.budget_bytes)

    def model_parts(self, model: str) -> tuple[tuple[str, PartId], ...]:
        """What a model's nodes use: (node, part)."""
        nodes = self._nodes.items()
        return tuple((name[1], part) for name, parts in nodes for part in parts if name[0] == model)

    def _taken(self, part: PartId, module: nn.Module, files: Sequence[Path]) -> WeightPart:
        entry = WeightPart(part, module, sum(parameter.nbytes for parameter in module.parameters()))
        began = Stopwatch()
        if not self.budget_bytes:
            module.to(self._device)
            self._resident[part] = None
        elif self._device.type == "cuda":
            entry.copy = PinnedCopy(module, self._device)
        else:
            entry.copy = FileCopy(module, files)
        entry.load_us = began.elapsed_ns() // 1000  # it read everything once: a first estimate
        if self.budget_bytes:
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self._device)
            entry.drop(self._device)
        return entry

    def start(self, activations_bytes: Callable[[NodeName], int]) -> None:
        """Loads what fits beside each other, in the order of `add`, and begins to take demands."""
        if not self.budget_bytes:
            return
        for part in self._parts.values():
            room = self.budget_bytes - self._used_bytes() - part.size_bytes
            there = [self._parts[other] for other in self._resident]
            users = [node for other in (*there, part) for node in other.nodes]
            if room >= max(map(activations_bytes, users)):
                self._load(part, ())
                part.arrival = None  # it is no request's
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------
    # the agent's side

    def expect(self, demand: MemoryDemand) -> None:
        """An assignment will need parts; loading begins when there is room. Never blocks."""
        with self._changed:
            if demand.order > self._newest and demand.node in self._nodes:
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
            away = [part for part in self._parts if part not in self._resident]
            return tuple(
                PartFact(
                    part,
                    tuple(self._parts[part].nodes),
                    self._parts[part].size_bytes,
                    self._parts[part].load_us,
                    part in self._resident,
                )
                for part in (*away, *self._resident)
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
        """Holds a node's parts on the device; gives what is to be told of the loads that it took.

        Raises whatever made a load fail, and StoreClosed.
        """
        if demand.node not in self._nodes:
            raise KeyError(f"no weights of {demand.node}")
        with self._changed:
            for order in [order for order in self._demands if order < demand.order]:
                del self._demands[order]  # assignments are run in their order: those are over
            demand = self._demands.setdefault(demand.order, demand)
            waited = self._wait_for(demand)
            self._in_use = demand
            arrivals = self._touch(demand.node)
        try:
            yield _told(arrivals, waited)
        finally:
            if self._thread is not None and self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # it may be freed from now on
            with self._changed:
                self._in_use = None
                self._demands.pop(demand.order, None)
                self._changed.notify_all()

    def evict_others(self, keep: NodeName) -> None:
        """Makes all the room there is: after an allocation failed."""
        with self._changed:
            kept = self._nodes.get(keep, ())
            away = [part for part in self._resident if part not in kept]
            for part in away if self.budget_bytes else ():
                self._evict(part)

    def _wait_for(self, demand: MemoryDemand) -> int:
        """Returns how long it took, in nanoseconds. The lock is held by the caller."""
        began = Stopwatch()
        parts = self._nodes[demand.node]
        self._waiting = demand
        for part in parts:
            self._failed.pop(part, None)  # of an attempt that nobody waited for
        self._changed.notify_all()
        self._changed.wait_for(
            lambda: (
                all(part in self._resident for part in parts)
                or any(part in self._failed for part in parts)
                or self._closed
            )
        )
        complete = all(part in self._resident for part in parts)
        if complete:
            self._make_room(demand)
        self._waiting = None
        failures = [self._failed.pop(part) for part in parts if part in self._failed]
        if failures:
            self._demands.pop(demand.order, None)
            raise failures[0]
        if not complete:
            raise StoreClosed
        return began.elapsed_ns()

    def _make_room(self, demand: MemoryDemand) -> None:
        """For the activations of parts that may have been there before."""
        for part in self._victims(demand) or () if self.budget_bytes else ():
            self._evict(part)

    def _touch(self, node: NodeName) -> list[SideNote]:
        """They were used last; what there is to tell of their loads."""
        arrivals = []
        for part in self._nodes[node]:
            del self._resident[part]
            self._resident[part] = None
            entry = self._parts[part]
            if entry.arrival is not None:
                arrivals.append(entry.arrival)
            entry.arrival = None
        return arrivals

    # ------------------------------------------------------------------------------------------
    # the loader

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                found = None if self._closed else self._next()
                if found is None:
                    return
                part, victims = found
                for other in victims:
                    self._evict(other)
                self._loading = part
            try:
                self._load(self._parts[part], victims)
            except BaseException as error:  # whoever needs the part raises it
                log.warning("cannot load %s: %s", self._parts[part].name, error)
                traceback.clear_frames(error.__traceback__)  # what it had read so far lives there
                with self._changed:
                    self._loading = None
                    self._failed[part] = error
                    self._changed.notify_all()

    def _next(self) -> tuple[PartId, tuple[PartId, ...]] | None:
        """The load to begin now, and what has to leave for it."""
        urgent = [self._waiting] if self._waiting is not None else []
        for demand in (*urgent, *(self._demands[order] for order in sorted(self._demands))):
            parts = self._nodes[demand.node]
            missing = [part for part in parts if part not in self._resident]
            if not missing or any(part in self._failed for part in missing):
                continue
            victims = self._victims(demand)
            return None if victims is None else (missing[0], victims)
        return None

    def _victims(self, demand: MemoryDemand) -> tuple[PartId, ...] | None:
        """What has to leave for a node's parts; None where that is not to be had now."""
        before = {p for w in self._demands.values() if w.order <= demand.order for p in self._of(w)}
        before.update(self._of(demand))
        if self._waiting is not None:  # whose demand a newer leader may have forgotten
            before.update(self._of(self._waiting))
        later: dict[PartId, Order] = {}
        for order in sorted(self._demands, reverse=True):
            for part in self._of(self._demands[order]):
                later[part] = order  # the first one stays
        used = self._in_use
        if used is not None:
            before.update(self._of(used))
        free = [part for part in self._resident if part not in before]
        free.sort(key=lambda part: _worth(part, demand, later))
        activations_bytes = max(demand.activations_bytes, used.activations_bytes if used else 0)
        excess_bytes = self._used_bytes() + activations_bytes - self.budget_bytes
        excess_bytes += sum(
            self._parts[part].size_bytes
            for part in self._of(demand)
            if part not in self._resident and part != self._loading
        )
        victims = []
        for part in free:
            if excess_bytes <= 0:
                break
            victims.append(part)
            excess_bytes -= self._parts[part].size_bytes
        for part in tuple(victims):  # a large one may have made the room of small ones before it
            if excess_bytes + self._parts[part].size_bytes <= 0:
                excess_bytes += self._parts[part].size_bytes
                victims.remove(part)
        # Activations are an estimate: it must not keep the compute thread waiting for ever.
        return tuple(victims) if excess_bytes <= 0 or demand is self._waiting else None

    def _of(self, demand: MemoryDemand) -> Sequence[PartId]:
        return self._nodes[demand.node]

    def _load(self, part: WeightPart, victims: tuple[PartId, ...]) -> None:
        began = Stopwatch()
        tensors = part.fill()
        with self._changed:
            part.install(tensors)
            part.load_us = began.elapsed_ns() // 1000
            part.arrival = began.side(
                spans.LOAD,
                {
                    spans.PART: part.name,
                    spans.BYTES: part.size_bytes,
                    spans.EVICTED: ",".join(self._parts[other].name for other in victims),
                },
            )
            self._resident[part.id] = None
            self._loading = None
            self.loads += 1
            self._changed.notify_all()

    def _evict(self, part: PartId) -> None:
        del self._resident[part]
        self._parts[part].drop(self._device)
        self._parts[part].arrival = None
        self.evictions += 1

    def _used_bytes(self) -> int:
        """On the device: resident, on the way there, or stuck."""
        parts = self._parts.items()
        fixed = sum(entry.fixed_bytes for part, entry in parts if part not in self._resident)
        coming = () if self._loading is None else (self._loading,)
        return fixed + sum(self._parts[part].size_bytes for part in (*self._resident, *coming))


def _worth(part: PartId, demand: MemoryDemand, later: dict[PartId, Order]) -> tuple[bool, int, int]:
    """Small leaves first; equal ones in the order of their last use."""
    term, sequence = later.get(part, (0, 0))
    soon = (-term, -sequence) if part in later else (-(1 << 62), 0)
    return (part not in demand.evict, *soon)


def _told(arrivals: Sequence[SideNote], waited_ns: int) -> tuple[SideNote, ...]:
    """With what was waited for all of them, at the last one: readers add it up."""
    told = []
    for number, note in enumerate(arrivals, 1):
        waited_us = waited_ns // 1000 if number == len(arrivals) else 0
        attributes = {**note.attributes, spans.WAITED_US: waited_us}
        told.append(SideNote(note.name, note.start_unix_ns, note.end_unix_ns, attributes))
    return tuple(told)
