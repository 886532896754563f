"""The step loop of a torch worker: take assignment → group → latents → steps → report.

Runs in one compute thread. It talks to peers only through the group (collectives) and their stores
(latents), to the agent only through `Inbox` and the listener. Two rules keep many workers exact and
free of deadlocks:

* Every member takes every assignment, in sequence order, and enters its group, truncated or not.
  Before each step the first member decides whether the group goes on and tells the others by a
  control word; nobody leaves alone.
* A step returns a new latent. The old one stays on the shelf until the new one is complete, so
  whatever survives a crash is the exact state after some step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gpuworker import media
from gpuworker.executor import Listener, Media, RunNote, SideNote, StepNote, Stopwatch
from gpuworker.groups import BlobLost, Group, GroupCache, GroupLost, Rendezvous
from gpuworker.inbox import Inbox
from gpuworker.latents import LatentShelf
from gpuworker.memory import Memory, OutOfMemory
from gpuworker.models.card import ModelCard
from gpuworker.state import LatentState
from gpuworker.team import Layout, Team
from gpuworker.weights import StoreClosed
from hocket import spans, telemetry
from hocket.v1 import mesh_pb2, types_pb2

log = logging.getLogger(__name__)

_GO, _STOP = 1, 0
_REPORT_EVERY_NS = 5_000_000  # shorter steps are reported in batches
_GROUP_SPAN_AT_LEAST_NS = 500_000  # joining a cached group is no news
_FORM_TIMEOUT_S = 10.0

# Asks a holder (worker name) for a latent and returns the store key, or raises LatentMissing.
Ask = Callable[[str, mesh_pb2.LatentRequest], mesh_pb2.LatentReply]


@dataclass
class LatentMissing(Exception):
    """No holder could give the latent that an assignment starts from."""

    request: str
    steps_done: int
    tried: tuple[str, ...]

    def __str__(self) -> str:
        return f"no latent of {self.request} after step {self.steps_done}; tried {self.tried}"


class _Truncated(Exception):
    """A job of one step was called off before it began."""


@dataclass
class _Run:
    """An assignment in hand."""

    assignment: mesh_pb2.Assignment
    group: Group | None = None  # None at degree 1
    sides: list[SideNote] = field(default_factory=list)
    steps: list[StepNote] = field(default_factory=list)
    unreported: Stopwatch = field(default_factory=Stopwatch)

    @property
    def members(self) -> Sequence[mesh_pb2.BatchMember]:
        """The jobs, of one model and shape."""
        return self.assignment.batch

    def leads(self, worker: str) -> bool:
        return self.assignment.group.members[0] == worker


class Engine:
    """Owns the compute thread's world: models, groups, latents."""

    def __init__(
        self,
        worker: str,
        cards: Mapping[str, ModelCard],
        inbox: Inbox,
        shelf: LatentShelf,
        rendezvous: Rendezvous,
        groups: GroupCache,
        ask: Ask,
        memory: Memory,
    ) -> None:
        self._worker = worker
        self._cards = cards
        self._inbox = inbox
        self._shelf = shelf
        self._rendezvous = rendezvous
        self._groups = groups
        self._ask = ask
        self._memory = memory

    def run(self, listener: Listener) -> None:
        """Runs assignments until the inbox is closed."""
        torch.set_grad_enabled(False)
        while (assignment := self._inbox.take()) is not None:
            run = _Run(assignment)
            with telemetry.within(run.members[0].traceparent):
                note = self._run(run, listener)
            if run.leads(self._worker) or note.failure is not None:
                listener(note)
            self._inbox.done(assignment)

    def _run(self, run: _Run, listener: Listener) -> RunNote:
        try:
            with self._memory.at_work(run.assignment, run.sides):
                run.group = self._join(run)
                return self._work(run, listener)
        except (_Truncated, StoreClosed):
            return self._failed(run, "TRUNCATED", "called off before it began")
        except GroupLost as lost:
            # Forming, it names who was missing; inside a collective nobody knows who failed.
            suspects = lost.suspects if run.group is None else self._others(run)
            return self._failed(run, "GROUP_LOST", str(lost), suspects)
        except (LatentMissing, BlobLost) as missing:
            self._abort(run)
            return self._failed(run, "LATENT_MISSING", str(missing))
        except OutOfMemory as error:
            self._abort(run)
            return self._failed(run, "OUT_OF_MEMORY", str(error), (), **error.metadata)
        except Exception as error:
            log.exception("assignment %d failed", run.assignment.sequence)
            self._abort(run)
            return self._failed(run, "MODEL_ERROR", f"{type(error).__name__}: {error}")

    def _work(self, run: _Run, listener: Listener) -> RunNote:
        node = run.assignment.node
        if node == "text":
            return self._encode(run)
        states = [self._obtain(run, member) for member in run.members]
        if node == "vae":
            return self._decode(run, states)
        return self._denoise(run, states, listener)

    # ------------------------------------------------------------------------------------------
    # nodes

    def _encode(self, run: _Run) -> RunNote:
        if self._must_stop(run, 0):
            raise _Truncated
        began, card, resolved = Stopwatch(), self._card(run), {}
        for member in run.members:
            spec = member.spec
            state = card.encode(
                prompt=spec.prompt,
                negative_prompt=spec.negative_prompt,
                width=spec.shape.width,
                height=spec.shape.height,
                frames=max(1, spec.shape.frames),
                steps=spec.steps,
                guidance_scale=spec.guidance_scale,
                seed=spec.seed,
            )
            self._shelf.put(member.request_id, state)
            if (given := card.resolve(spec.prompt)) != spec.prompt:
                resolved[member.request_id] = given
        run.steps.append(began.step(0))
        return self._note(run, 0, last=True, resolved=resolved)

    def _denoise(self, run: _Run, states: list[LatentState], listener: Listener) -> RunNote:
        card = self._card(run)
        team = Team(run.group, _layout(run.assignment)) if run.group is not None else None
        made = 0
        while made < run.assignment.steps and self._goes_on(run, made):
            began = Stopwatch()
            states = card.step(states, team)
            self._settle(run)
            for member, state in zip(run.members, states, strict=True):
                self._shelf.put(member.request_id, state)
            self._groups.acknowledge()
            run.steps.append(began.step(made))
            made += 1
            if (
                made < run.assignment.steps
                and run.leads(self._worker)
                and run.unreported.elapsed_ns() >= _REPORT_EVERY_NS
            ):
                listener(self._note(run, made))
        return self._note(run, made, last=True)

    def _decode(self, run: _Run, states: list[LatentState]) -> RunNote:
        if self._must_stop(run, 0):
            raise _Truncated
        began = Stopwatch()
        made: dict[str, Media] = {}
        card = self._card(run)
        for member, state in zip(run.members, states, strict=True):
            spec = member.spec
            fps = spec.shape.fps or card.facts.fps
            made[member.request_id] = Media(
                *media.encode_media(card.decode(state), spec.media_type, fps)
            )
        run.steps.append(began.step(0))
        return self._note(run, 0, last=True, media=made)

    # ------------------------------------------------------------------------------------------
    # groups

    def _join(self, run: _Run) -> Group | None:
        named, began = run.assignment.group, Stopwatch()
        if len(named.members) == 1:
            return None
        group = self._groups.get(
            named.epoch,
            tuple(named.members),
            run.assignment.rendezvous_address,
            _FORM_TIMEOUT_S + run.assignment.load_time_us / 1e6,
            _Off(self._inbox, run.assignment),
        )
        group.timeout_s = run.assignment.collective_timeout_us / 1e6
        waited = run.assignment.load_time_us > 0  # for others' weights: says nothing of forming
        if began.elapsed_ns() > _GROUP_SPAN_AT_LEAST_NS and not waited:
            run.sides.append(began.side(spans.GROUP, {}))
        return group

    def _goes_on(self, run: _Run, made: int) -> bool:
        """Settles, on every member alike, whether the next step is run."""
        stop = self._must_stop(run, made)
        if run.group is None:
            return not stop
        word = (_STOP if stop else _GO) if run.group.rank == 0 else None
        return run.group.broadcast_word(word) == _GO

    def _must_stop(self, run: _Run, made: int) -> bool:
        return self._inbox.must_stop(run.assignment, made)

    def _others(self, run: _Run) -> tuple[str, ...]:
        return tuple(name for name in run.assignment.group.members if name != self._worker)

    def _settle(self, run: _Run) -> None:
        """Returns when the step has ended on this member's device."""
        if run.group is not None:
            run.group.settle()
        elif torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def _abort(self, run: _Run) -> None:
        if run.group is not None:
            run.group.abort()

    # ------------------------------------------------------------------------------------------
    # latents

    def _obtain(self, run: _Run, member: mesh_pb2.BatchMember) -> LatentState:
        """The latent to start from: held here, broadcast by a member, or fetched from a holder
        outside.
        """
        steps_done = member.first_step
        own = self._shelf.get(member.request_id, steps_done)
        if run.group is None:
            if own is None:
                own = self._fetch(run, member)
                self._shelf.put(member.request_id, own)
            return own
        source = _source(run.assignment, member)
        if source is None:  # the plan knows that every member holds it
            if own is None:
                raise LatentMissing(member.request_id, steps_done, (self._worker,))
            return own
        began = Stopwatch()
        if run.group.rank == source and own is None:
            own = self._fetch(run, member)
        blob = own.to_bytes() if own is not None and run.group.rank == source else None
        content = run.group.broadcast_blob(blob, source)
        if own is None:
            own = LatentState.from_bytes(content, run.group.device)
        self._shelf.put(member.request_id, own)
        if run.leads(self._worker):
            members = run.assignment.group.members
            holder = members[source]
            others = ",".join(name for name in members if name != holder)
            run.sides.append(
                began.side(
                    spans.TRANSFER,
                    {spans.BYTES: len(content), spans.FROM: holder, spans.TO: others},
                )
            )
        return own

    def _fetch(self, run: _Run, member: mesh_pb2.BatchMember) -> LatentState:
        tried, began = [], Stopwatch()
        for holder in member.holders:
            if holder.worker == self._worker:
                continue
            tried.append(holder.worker)
            reply = self._ask(
                holder.worker,
                mesh_pb2.LatentRequest(
                    request_id=member.request_id,
                    steps_done=member.first_step,
                    attempt=member.attempt,
                    wait_us=run.assignment.collective_timeout_us // 2,
                ),
            )
            if reply.HasField("failure"):
                log.warning("%s gave no latent: %s", holder.worker, reply.failure.message)
                continue
            blob = self._rendezvous.fetch(
                holder.store_address,
                reply.key,
                run.assignment.collective_timeout_us / 1e6,
                _Off(self._inbox, run.assignment),
            )
            run.sides.append(
                began.side(
                    spans.TRANSFER,
                    {spans.BYTES: len(blob), spans.FROM: holder.worker, spans.TO: self._worker},
                )
            )
            return LatentState.from_bytes(blob)
        raise LatentMissing(member.request_id, member.first_step, tuple(tried))

    # ------------------------------------------------------------------------------------------
    # notes

    def _card(self, run: _Run) -> ModelCard:
        return self._cards[run.members[0].spec.model]

    def _note(
        self,
        run: _Run,
        made: int,
        *,
        last: bool = False,
        media: Mapping[str, Media] | None = None,
        resolved: Mapping[str, str] | None = None,
    ) -> RunNote:
        """What is behind the jobs after `made` steps of the assignment."""
        note = RunNote(
            assignment=run.assignment,
            behind={m.request_id: m.first_step + made for m in run.members},
            steps=tuple(run.steps),
            sides=tuple(run.sides),
            last=last,
            media=media or {},
            resolved=resolved or {},
        )
        run.steps.clear()
        run.sides.clear()
        run.unreported = Stopwatch()
        return note

    def _failed(
        self, run: _Run, reason: str, message: str, suspects: tuple[str, ...] = (), **facts: str
    ) -> RunNote:
        held = {m.request_id: self._shelf.steps_done(m.request_id) for m in run.members}
        return RunNote(
            assignment=run.assignment,
            behind={request: steps for request, steps in held.items() if steps is not None},
            last=True,
            failure=types_pb2.Failure(reason=reason, message=message, metadata=facts),
            suspects=suspects,
        )


class _Off(threading.Event):
    """Looks like an event; is set once the assignment's attempt has been truncated."""

    def __init__(self, inbox: Inbox, assignment: mesh_pb2.Assignment) -> None:
        super().__init__()
        self._inbox = inbox
        self._assignment = assignment

    def is_set(self) -> bool:
        return self._inbox.must_stop(self._assignment)


def _layout(assignment: mesh_pb2.Assignment) -> Layout:
    named = assignment.layout
    return Layout(max(1, named.cfg), max(1, named.ulysses), max(1, named.ring))


def _source(assignment: mesh_pb2.Assignment, member: mesh_pb2.BatchMember) -> int | None:
    """Rank that broadcasts the latent; None when every member holds it already.

    Computed from the plan alone, so that all members agree without a word. Rank 0 fetches where no
    member holds it.
    """
    holders = {h.worker for h in member.holders if h.steps_done == member.first_step}
    holding = [worker in holders for worker in assignment.group.members]
    if all(holding):
        return None
    return holding.index(True) if any(holding) else 0
