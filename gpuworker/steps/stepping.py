"""Calls of many steps, in groups that stop where their first member says.

Members make the same exchanges, whatever happens: what they start from, one control word before
each step, and one more behind the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from gpuworker.collectives.group_cache import GroupCache
from gpuworker.collectives.groups import GroupLost
from gpuworker.collectives.team import GroupLayout, Team
from gpuworker.executor import RunNote
from gpuworker.memory.latents import LatentShelf
from gpuworker.models.card import ModelCard, ShapeRefused
from gpuworker.operations.making import JobCall, begin
from gpuworker.operations.names import Operation, OperationRefused, artifact_of, model_of
from gpuworker.state import LatentState
from gpuworker.steps.encoding import NotesInOrder
from gpuworker.steps.failing import Failures
from gpuworker.steps.gathering import Gathering
from gpuworker.steps.inbox import Inbox
from gpuworker.steps.pace import MarkedCall, StepPace
from gpuworker.steps.run import GO, Run
from hocket.v1 import mesh_pb2

# Steps that end sooner are reported together: a report takes the interpreter for a millisecond.
_REPORT_EVERY_NS = 50_000_000
_REFUSED = (OperationRefused, ShapeRefused)  # on every member alike

Launched = deque[tuple[list[LatentState], MarkedCall]]


class SteppedCalls:
    """Of one worker."""

    def __init__(
        self,
        worker: str,
        cards: Mapping[str, ModelCard],
        inbox: Inbox,
        shelf: LatentShelf,
        groups: GroupCache,
        gathering: Gathering,
        failures: Failures,
        pace: StepPace,
    ) -> None:
        self._worker = worker
        self._cards = cards
        self._inbox = inbox
        self._shelf = shelf
        self._groups = groups
        self._gathering = gathering
        self._failures = failures
        self._pace = pace

    def run(self, run: Run, operation: Operation, notes: NotesInOrder) -> RunNote:
        """Runs the steps; what is still to be told of them."""
        card = self._cards[model_of(run.assignment.batch[0])]
        team = Team(run.group, _layout(run.assignment)) if run.group is not None else None
        # Nobody fetches for who has left.
        if not run.alone() and not run.obey(self._word(run, 0), 0):
            return run.note(0, last=True, resolved={})
        jobs = self._gathering.jobs(run, operation, notes, told_later=True)
        states: dict[str, LatentState] = {}
        made, seen = 0, 0
        launched: Launched = deque()  # and not seen to end
        while made < run.assignment.steps:
            word = self._word(run, made)
            self._report(run, seen, notes)
            if word != GO:  # whoever leaves does so with the steps that it has run
                seen += self._land_all(run, launched)
            if not run.obey(word, made):
                break
            self._gathering.take_off(run, operation, notes)
            states = states or self._begun(run, jobs, notes)
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

    def _begun(
        self, run: Run, jobs: Mapping[str, JobCall], listener: Callable[[RunNote], None]
    ) -> dict[str, LatentState]:
        """The states before the first step of the run, which every member makes for itself. A call
        that cannot be made leaves the batch, on all members alike.
        """
        states = {}
        for member in tuple(run.members):
            job, further = jobs[member.request_id], member.first_step > 0
            try:
                states[member.request_id] = job.input("latents") if further else begin(job)
            except _REFUSED as error:
                if len(run.members) == 1:
                    raise
                self._failures.give_up(run, member, error, listener)
        return states

    def _report(self, run: Run, seen: int, listener: Callable[[RunNote], None]) -> None:
        """Tells of steps that were seen to end, once the other members have told of theirs."""
        due = run.steps and run.unreported.elapsed_ns() >= _REPORT_EVERY_NS
        if due and run.leads(self._worker):
            listener(run.note(seen, resolved={}))

    def _land_all(self, run: Run, launched: Launched) -> int:
        """Waits for all that was launched; how many steps that were."""
        count = len(launched)
        while launched:
            self._land(run, *launched.popleft())
        return count

    def _land(self, run: Run, states: Sequence[LatentState], ended: MarkedCall) -> None:
        """Waits for the end of a step on this member's device; what it made is shown from then."""
        note = self._pace.wait(ended)
        for member, state in zip(run.members, states, strict=True):
            self._shelf.put(member.request_id, state, artifact_of(member))
        self._groups.acknowledge()
        run.ended(note)

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


def _layout(assignment: mesh_pb2.Assignment) -> GroupLayout:
    named = assignment.layout
    return GroupLayout(max(1, named.cfg), max(1, named.ulysses), max(1, named.ring))
