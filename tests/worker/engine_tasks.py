"""A real engine in a test worker: assignments go in, notes and latents come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.rendezvous import Cancel
from gpuworker.executor import RunNote
from gpuworker.loading import load_card
from gpuworker.memory.budget import Memory
from gpuworker.memory.latents import LatentShelf
from gpuworker.memory.weights import WeightStore
from gpuworker.models.card import ModelCard
from gpuworker.state import LatentState
from gpuworker.steps.engine import Engine
from gpuworker.steps.fetching import Fetcher
from gpuworker.steps.inbox import Inbox, StopMark
from gpuworker.steps.pace import StepPace
from gpuworker.steps.sources import Sources
from hocket.clock import steady_ns
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker.worker_pool import CPU, Member


@dataclass(frozen=True)
class Order:
    """What a worker does; what happens meanwhile is named by request."""

    folder: str
    assignments: tuple[bytes, ...]
    stops: tuple[tuple[str, int], ...] = ()  # called off during that call of the denoiser
    stops_in_decode: tuple[tuple[str, str], ...] = ()  # (called off, while this one is decoded)
    broken: tuple[str, ...] = ()  # cannot be decoded
    lacking: tuple[str, ...] = ()  # their latents are nowhere
    busy_us: int = 0  # added to each call of the denoiser's network, at work
    ahead: bool = False  # launches the next step before it looks at the last one's end
    lost_after: int = 0  # so many steps, this worker's groups are no more


@dataclass(frozen=True)
class Told:
    """A note, as it travels through a pipe."""

    sequence: int
    behind: dict[str, int]
    last: bool
    reason: str
    request: str  # that a failure names
    suspects: tuple[str, ...]
    tried: tuple[str, ...]
    spent: tuple[str, ...]
    media: tuple[str, ...]
    members_us: tuple[tuple[int, ...], ...]  # by step

    @classmethod
    def of(cls, note: RunNote) -> Told:
        failure = note.failure or types_pb2.Failure()
        job = note.failed_job or mesh_pb2.FailedJob()
        return cls(
            note.assignment.sequence,
            dict(note.behind),
            note.last,
            failure.reason,
            job.request_id,
            tuple(job.suspects),
            tuple(job.tried),
            tuple(job.spent),
            tuple(note.media),
            tuple(step.members_us for step in note.steps),
        )


def run_engine(member: Member, order: Order) -> tuple[list[Told], dict[str, bytes]]:
    """Runs the assignments; the notes, and every latent that is left."""
    assignments = [mesh_pb2.Assignment.FromString(blob) for blob in order.assignments]
    inbox = _Closing(assignments[-1].sequence)
    inbox.accept_term(1)
    shelf = LatentShelf(member.rendezvous.put, member.rendezvous.drop)
    weights = WeightStore(CPU)
    card = load_card(order.folder, CPU, torch.float32, weights)
    for member_of in (m for a in assignments for m in a.batch):
        member_of.spec.model = card.facts.name
    _Watcher(card, order, inbox, shelf, assignments)
    if order.busy_us:
        card._parts["transformer"].register_forward_pre_hook(partial(_work, order.busy_us))
    if order.lost_after:
        _lose_after(member.groups, order.lost_after)
    cards = {card.facts.name: card}
    sources = Sources(member.name, inbox, shelf, Fetcher(member.name, member.rendezvous, _nobody))
    memory = Memory(cards, CPU, weights, shelf)
    pace = StepPace()
    pace.ahead = order.ahead
    engine = Engine(member.name, cards, inbox, shelf, member.groups, sources, pace, memory)
    for assignment in assignments:
        inbox.put(assignment)
    notes: list[RunNote] = []
    engine.run(notes.append)
    requests = {m.request_id for a in assignments for m in a.batch}
    left = {r: shelf.get(r, shelf.steps_done(r) or 0) for r in sorted(requests)}
    states = {r: state.to_bytes() for r, state in left.items() if state is not None}
    return [Told.of(note) for note in notes], states


def _work(busy_us: int, *_: object) -> None:
    """A slow processor: the time goes by in the network itself, not in an exchange."""
    end_ns = steady_ns() + 1000 * busy_us
    while steady_ns() < end_ns:
        pass


def _lose_after(groups: GroupCache, steps: int) -> None:
    """Gives all groups up once so many steps have ended here."""
    left, acknowledge = steps, groups.acknowledge

    def counted() -> None:
        nonlocal left
        left -= 1
        acknowledge()
        if left == 0:
            groups.abort()

    groups.acknowledge = counted  # type: ignore[method-assign]


class _Closing(Inbox):
    """Ends the engine's loop behind the last assignment."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last = last

    def done(self, assignment: mesh_pb2.Assignment) -> None:
        super().done(assignment)
        if assignment.sequence == self._last:
            self.close()


class _Watcher:
    """Sees to it that during the calls of a real card something happens."""

    def __init__(
        self,
        card: ModelCard,
        order: Order,
        inbox: Inbox,
        shelf: LatentShelf,
        assignments: Sequence[mesh_pb2.Assignment],
    ) -> None:
        self._step, self._decode, self._order = card.step, card.decode, order
        self._inbox, self._shelf, self._calls = inbox, shelf, 0
        self._names = {m.spec.seed: m.request_id for a in assignments for m in a.batch}
        card.step, card.decode = self.step, self.decode  # type: ignore[method-assign]

    def step(self, states: Sequence[LatentState], team: Any) -> list[LatentState]:
        self._calls += 1
        for request, call in self._order.stops:
            if call == self._calls:
                self._inbox.truncate(request, StopMark(0, 0))
        fresh = self._step(states, team)
        if self._calls == 1:
            for request in self._order.lacking:
                self._shelf.release(request)
        return fresh

    def decode(self, state: LatentState) -> Any:
        name = self._names[int(str(state.facts["seed"]))]
        for request, meanwhile in self._order.stops_in_decode:
            if meanwhile == name:
                self._inbox.truncate(request, StopMark(0, 0))
        if name in self._order.broken:
            raise ValueError(f"{name} has no picture")
        return self._decode(state)


def _nobody(holder: str, asked: mesh_pb2.LatentRequest, _: Cancel) -> mesh_pb2.LatentReply:
    return mesh_pb2.LatentReply(
        failure=types_pb2.Failure(reason="LATENT_MISSING", message=f"{holder} has none")
    )
