"""The step loop of a torch worker: take assignment → group → latents → steps → report.

Runs in one compute thread. It talks to peers only through the group (collectives) and their stores
(latents), to the agent only through `Inbox` and the listener. Two rules keep many workers exact and
free of deadlocks:

* Every member takes every assignment, in sequence order, and enters its group, truncated or not.
  Before each step the first member decides whether the group goes on, and with which jobs of a
  batch, and tells the others by a control word; nobody leaves alone. By the same exchange, and by
  one more behind the last step, each tells how much of a step was its own. All members make the
  same exchanges, whatever happens: they hang on nothing but words and the steps made.
* A step returns a new latent. The old one stays on the shelf until the new one is complete, so
  whatever survives a crash is the exact state after some step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.groups import Group, GroupLost, GroupSpent
from gpuworker.collectives.team import GroupLayout, Team
from gpuworker.executor import Listener, Media, RunNote, Stopwatch, failure_of
from gpuworker.memory.budget import Memory, OutOfMemory, ran_out
from gpuworker.memory.latents import CalledOff, LatentMissing, LatentShelf
from gpuworker.memory.weights import StoreClosed
from gpuworker.models.card import ModelCard
from gpuworker.state import LatentState
from gpuworker.steps import media
from gpuworker.steps.broken_device import DeviceBroken, is_broken
from gpuworker.steps.decode import Decodes
from gpuworker.steps.inbox import Inbox
from gpuworker.steps.pace import MarkedCall, StepPace
from gpuworker.steps.run import GO, Run
from gpuworker.steps.sources import Off, Sources
from hocket.tracing import spans, telemetry
from hocket.v1 import mesh_pb2, types_pb2

log = logging.getLogger(__name__)

# Steps that end sooner are reported together: a report takes the interpreter for a millisecond.
_REPORT_EVERY_NS = 50_000_000
_GROUP_SPAN_AT_LEAST_NS = 500_000  # joining a cached group is no news
_FORM_TIMEOUT_S = 10.0
DEVICE_BROKEN = "DEVICE_BROKEN"


class _Truncated(Exception):
    """A job of one step was called off before it began."""


class Engine:
    """Owns the compute thread's world: models, groups, latents."""

    def __init__(
        self,
        worker: str,
        cards: Mapping[str, ModelCard],
        inbox: Inbox,
        shelf: LatentShelf,
        groups: GroupCache,
        sources: Sources,
        pace: StepPace,
        memory: Memory,
    ) -> None:
        self._worker = worker
        self._cards = cards
        self._inbox = inbox
        self._shelf = shelf
        self._groups = groups
        self._sources = sources
        self._pace = pace
        self._memory = memory
        self._decodes = Decodes()

    def run(self, listener: Listener) -> None:
        """Runs assignments until the inbox is closed. Raises `DeviceBroken`, once that is told."""
        torch.set_grad_enabled(False)
        self._pace.enter()
        while (assignment := self._inbox.take()) is not None:
            run = Run(assignment)
            with telemetry.within(assignment.batch[0].traceparent):
                note = self._run(run, listener)
            if run.leads(self._worker) or note.failure is not None:
                listener(note)
            self._inbox.done(assignment)
            if note.failure is not None and note.failure.reason == DEVICE_BROKEN:
                raise DeviceBroken(note.failure.message)

    def _run(self, run: Run, listener: Listener) -> RunNote:
        try:
            with self._memory.at_work(run.assignment, run.sides):
                run.group = self._join(run)
                return self._work(run, listener)
        except (_Truncated, CalledOff, StoreClosed):
            return self._failed(run, "TRUNCATED", "called off before it began")
        except GroupSpent as spent:
            return self._failed(run, "GROUP_SPENT", str(spent), spent=spent.spent)
        except GroupLost as lost:
            return self._lost(run, lost)
        except LatentMissing as missing:
            if not missing.agreed:
                self._abort(run)
            return self._missing(run, missing, last=True)
        except OutOfMemory as error:
            self._abort(run)
            return self._failed(run, "OUT_OF_MEMORY", str(error), metadata=error.metadata)
        except Exception as error:
            log.exception("assignment %d failed", run.assignment.sequence)
            self._abort(run)
            told = f"{type(error).__name__}: {error}"
            if is_broken(error):  # nothing that is on the device can be had any more
                return self._failed(run, DEVICE_BROKEN, told, suspects=(self._worker,), held=False)
            return self._failed(run, "MODEL_ERROR", told)

    def _lost(self, run: Run, lost: GroupLost) -> RunNote:
        """Forming, it names who was missing; inside a collective nobody knows who failed, unless
        one has only given the group up, and says so.
        """
        if run.group is None:
            return self._failed(run, "GROUP_LOST", str(lost), lost.suspects)
        if spent := self._groups.spent_by(run.group):
            return self._failed(run, "GROUP_SPENT", str(lost), spent=spent)
        return self._failed(run, "GROUP_LOST", str(lost), self._others(run))

    def _work(self, run: Run, listener: Listener) -> RunNote:
        match run.assignment.node:
            case "text":
                return self._encode(run, listener)
            case "vae":
                return self._decode(run, listener)
        return self._denoise(run, listener)

    # ------------------------------------------------------------------------------------------
    # nodes

    def _encode(self, run: Run, listener: Listener) -> RunNote:
        began, card, resolved = self._pace.start(), self._card(run), {}
        states = []
        for member in tuple(run.members):
            if not self._stays(run, member):
                run.leave(member)
                continue
            spec = member.spec
            try:
                states.append(_encoded(card, spec))
            except Exception as error:
                self._give_up(run, member, error, listener)
                continue
            if (given := card.resolve(spec.prompt)) != spec.prompt:
                resolved[member.request_id] = given
        if not run.members:
            raise _Truncated
        self._land(run, states, self._pace.end(began, 0))
        return run.note(0, last=True, resolved=resolved)

    def _denoise(self, run: Run, listener: Listener) -> RunNote:
        card = self._card(run)
        team = Team(run.group, _layout(run.assignment)) if run.group is not None else None
        # Nobody fetches for who has left.
        if not run.alone() and not run.obey(self._word(run, 0), 0):
            return run.note(0, last=True, resolved={})
        states = self._gather(run, listener)
        made, seen = 0, 0
        launched: deque[tuple[list[LatentState], MarkedCall]] = deque()  # and not seen to end
        while made < run.assignment.steps:
            word = self._word(run, made)
            self._report(run, seen, listener)
            if word != GO:  # whoever leaves does so with the steps that it has run
                seen += self._land_all(run, launched)
            if not run.obey(word, made):
                break
            self._take_off(run, listener)
            began = self._pace.start(run.group)
            fresh = card.step([states[m.request_id] for m in run.members], team)
            states = {m.request_id: s for m, s in zip(run.members, fresh, strict=True)}
            launched.append((fresh, self._pace.end(began, made)))
            made += 1
            while len(launched) > self._pace.ahead:
                self._land(run, *launched.popleft())
                seen += 1
        self._land_all(run, launched)
        if made:
            self._last_words(run)
        return run.note(made, last=True, resolved={})

    def _report(self, run: Run, seen: int, listener: Listener) -> None:
        """Tells of steps that were seen to end, once the other members have told of theirs."""
        due = run.steps and run.unreported.elapsed_ns() >= _REPORT_EVERY_NS
        if due and run.leads(self._worker):
            listener(run.note(seen, resolved={}))

    def _land_all(self, run: Run, launched: deque[tuple[list[LatentState], MarkedCall]]) -> int:
        """Waits for all that was launched; how many steps that were."""
        count = len(launched)
        while launched:
            self._land(run, *launched.popleft())
        return count

    def _land(self, run: Run, states: Sequence[LatentState], ended: MarkedCall) -> None:
        """Waits for the end of a call on this member's device; what it made is shown from then."""
        note = self._pace.wait(ended)
        for member, state in zip(run.members, states, strict=True):
            self._shelf.put(member.request_id, state)
        self._groups.acknowledge()
        run.ended(note)

    def _decode(self, run: Run, listener: Listener) -> RunNote:
        """Each job is told of as soon as its file is made: others may take long, or fail."""
        states, card = self._gather(run, listener, told_later=False), self._card(run)
        told = False
        for member in tuple(run.members):
            if not self._stays(run, member):
                run.leave(member)
                continue
            began, spec = Stopwatch(), member.spec
            fps = spec.shape.fps or card.facts.fps
            try:
                frames = self._decodes.frames(card, member, states[member.request_id])
                made = Media(*media.encode_media(frames, spec.media_type, fps))
            except Exception as error:
                self._give_up(run, member, error, listener)
                continue
            run.ended(began.step(0))
            last = member is run.members[-1]
            note = run.note_of(member, made, last=last)
            if last:
                return note
            listener(note)
            told = True
        if not told:
            raise _Truncated
        return run.over()

    def _stays(self, run: Run, member: mesh_pb2.BatchMember) -> bool:
        return member.request_id in self._inbox.staying(run.assignment)

    def _give_up(
        self, run: Run, member: mesh_pb2.BatchMember, error: Exception, listener: Listener
    ) -> None:
        """One job of a batch fails by itself. Raises the error where others may be to blame."""
        if run.alone() or ran_out(error) or is_broken(error):
            raise error
        log.exception("%s in assignment %d", member.request_id, run.assignment.sequence)
        run.leave(member)
        told = f"{type(error).__name__}: {error}"
        listener(self._failed(run, "MODEL_ERROR", told, named=member.request_id, last=False))

    # ------------------------------------------------------------------------------------------
    # groups

    def _join(self, run: Run) -> Group | None:
        named, began = run.assignment.group, Stopwatch()
        if len(named.members) == 1:
            return None
        group = self._groups.get(
            named.epoch,
            tuple(named.members),
            run.assignment.rendezvous_address,
            _FORM_TIMEOUT_S + run.assignment.load_time_us / 1e6,
            Off(self._inbox, run.assignment),
        )
        group.timeout_s = run.assignment.collective_timeout_us / 1e6
        waited = run.assignment.load_time_us > 0  # for others' weights: says nothing of forming
        if began.elapsed_ns() > _GROUP_SPAN_AT_LEAST_NS and not waited:
            run.sides.append(began.side(spans.GROUP, {}))
        return group

    def _word(self, run: Run, made: int) -> int:
        """Settles, on every member alike, whether the next step is run, and with which jobs."""
        word = run.word(self._inbox.staying(run.assignment, made))
        if run.group is None:
            return word
        told = run.group.share_words(word, *run.own())
        run.heard(row[1:] for row in told)
        return told[0][0]

    def _last_words(self, run: Run) -> None:
        """How much of the last step was whose; who does not come now takes no step back."""
        if run.group is not None:
            with suppress(GroupLost):
                self._word(run, 0)

    def _others(self, run: Run) -> tuple[str, ...]:
        return tuple(name for name in run.assignment.group.members if name != self._worker)

    def _abort(self, run: Run) -> None:
        if run.group is not None:
            run.group.abort()

    # ------------------------------------------------------------------------------------------
    # latents

    def _gather(
        self, run: Run, listener: Listener, *, told_later: bool = True
    ) -> dict[str, LatentState]:
        """The latents to start from. A job whose latent nobody has leaves a batch, and so does one
        that is called off meanwhile; the members of a group agree on it. What one member alone
        lacks it tells the others by the next word.
        """
        states: dict[str, LatentState] = {}
        for member in tuple(run.members):
            try:
                states[member.request_id] = self._sources.obtain(run, member)
            except LatentMissing as missing:
                if not missing.agreed and told_later:
                    run.lack(member)
                else:
                    self._give_out(run, member, missing, listener)
            except CalledOff:
                if len(run.members) == 1:
                    raise
                run.leave(member)
        return states

    def _take_off(self, run: Run, listener: Listener) -> None:
        """Jobs of which a member lacks the latent do not begin, on any member."""
        for member, worker in run.took_off():
            missing = LatentMissing(member.request_id, member.first_step, (worker,))
            self._give_out(run, member, missing, listener)

    def _give_out(
        self, run: Run, member: mesh_pb2.BatchMember, missing: LatentMissing, listener: Listener
    ) -> None:
        """A job that cannot begin leaves its batch; the only one ends it, with that error."""
        if len(run.members) == 1 or not missing.agreed:
            raise missing
        run.leave(member)
        if run.leads(self._worker):
            listener(self._missing(run, missing, last=False))

    # ------------------------------------------------------------------------------------------
    # notes

    def _card(self, run: Run) -> ModelCard:
        return self._cards[run.assignment.batch[0].spec.model]

    def _missing(self, run: Run, missing: LatentMissing, *, last: bool) -> RunNote:
        return self._failed(
            run,
            "LATENT_MISSING",
            str(missing),
            named=missing.request,
            last=last,
            tried=missing.tried,
        )

    def _failed(
        self,
        run: Run,
        reason: str,
        message: str,
        suspects: Sequence[str] = (),
        *,
        named: str = "",
        last: bool = True,
        tried: Sequence[str] = (),
        spent: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        held: bool = True,
    ) -> RunNote:
        """What failed, `named` by whose fault where that is known; `held`: latents are left."""
        size = len(run.members) + (not last)
        failure = failure_of(reason, message, metadata)
        told = [m.request_id for m in run.assignment.batch] if last else [named]
        left = {request: self._shelf.steps_done(request) for request in told if held}
        failed_job = mesh_pb2.FailedJob(
            request_id=named, batch=size, suspects=suspects, tried=tried, spent=spent
        )
        return run.failed(left, failure, failed_job, last=last)


def _encoded(card: ModelCard, spec: types_pb2.GenerationSpec) -> LatentState:
    return card.encode(
        prompt=spec.prompt,
        negative_prompt=spec.negative_prompt,
        width=spec.shape.width,
        height=spec.shape.height,
        frames=max(1, spec.shape.frames),
        steps=spec.steps,
        guidance_scale=spec.guidance_scale,
        seed=spec.seed,
    )


def _layout(assignment: mesh_pb2.Assignment) -> GroupLayout:
    named = assignment.layout
    return GroupLayout(max(1, named.cfg), max(1, named.ulysses), max(1, named.ring))
