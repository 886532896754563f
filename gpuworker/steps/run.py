"""An assignment in a worker's hands: who is still in it, and what is told of it.

A job may leave a batch between two steps, called off or given up; the others go on. Members of a
group must agree on who stays, so the first member's control word says it:

    1  all go on      0  nobody does, the run is over      -mask  those whose bit is set, in order

By the same exchange each member tells how much of the steps that it saw end last was its own: of
two, for where steps are launched ahead as many end between the last exchanges.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gpuworker.collectives.groups import Group
from gpuworker.executor import RunNote, SideNote, StepNote, Stopwatch
from hocket.v1 import mesh_pb2, types_pb2

GO, STOP = 1, 0
TOLD_STEPS = 2
# Which input a job lacks, told in the numbers that have no times before the first step.
_INPUT_BITS, _JOBS_A_NUMBER = 3, 16


@dataclass
class Run:
    """An assignment in hand."""

    assignment: mesh_pb2.Assignment
    group: Group | None = None  # None at degree 1
    members: list[mesh_pb2.BatchMember] = field(default_factory=list)  # still in it, in order
    sides: list[SideNote] = field(default_factory=list)
    steps: list[StepNote] = field(default_factory=list)
    unreported: Stopwatch = field(default_factory=Stopwatch)
    # Request -> member that lacks an input of it, and the input's number.
    lacking: dict[str, tuple[str, int]] = field(default_factory=dict)
    _lacks: dict[int, int] = field(default_factory=dict)  # the same of this member, by place
    _left: dict[str, int] = field(default_factory=dict)  # steps behind those who left since a note
    _ended: list[StepNote] = field(default_factory=list)  # the last ones, newest first
    _own: dict[int, dict[int, int]] = field(default_factory=dict)  # step -> rank -> own time

    def __post_init__(self) -> None:
        self.members = list(self.assignment.batch)

    def leads(self, worker: str) -> bool:
        """Whether that worker is the first member."""
        return self.assignment.group.members[0] == worker

    def alone(self) -> bool:
        """It was no batch from the beginning: whatever fails is this job's."""
        return len(self.assignment.batch) == 1

    def ended(self, note: StepNote) -> None:
        """A step, or the one call of another node, has ended here."""
        self.steps.append(note)
        self._ended = [note, *self._ended][:TOLD_STEPS]

    def own(self) -> list[int]:
        """What the other members are told: steps that have ended here, and how much of the last of
        them was this member's own, newest first (0: there was none, or it is not known).

        Before the first step, instead: minus a mask of the jobs of which this member lacks an
        input, and which input that is of each (by number, from 1).
        """
        if self._lacks:
            told = [-sum(1 << place for place in self._lacks), *[0] * TOLD_STEPS]
            for place, number in self._lacks.items():
                where, at = divmod(place, _JOBS_A_NUMBER)
                told[1 + where] |= number + 1 << at * _INPUT_BITS
            return told
        own_us = [note.own_us or 0 for note in self._ended]
        steps = self._ended[0].step + 1 if self._ended else 0
        return [steps, *own_us, *[0] * (TOLD_STEPS - len(own_us))]

    def heard(self, told: Iterable[Sequence[int]]) -> None:
        """What `own` is on each member, in their order."""
        for rank, (steps, *own_us) in enumerate(told):
            if steps < 0:
                self._heard_lacking(self.assignment.group.members[rank], -steps, own_us)
                continue
            for back, each in enumerate(own_us, 1):
                if each:
                    self._own.setdefault(steps - back, {})[rank] = each

    def lack(self, member: mesh_pb2.BatchMember, number: int = 0) -> None:
        """This member has no input of that number, though the plan says that every member does."""
        self._lacks[list(self.assignment.batch).index(member)] = number

    def took_off(self) -> list[tuple[mesh_pb2.BatchMember, str, int]]:
        """Jobs in it that cannot begin, with a member that lacks an input, and the input's number:
        told to all by now.
        """
        lacking, self.lacking, self._lacks = self.lacking, {}, {}
        return [(m, *lacking[m.request_id]) for m in self.members if m.request_id in lacking]

    def _heard_lacking(self, worker: str, mask: int, numbers: Sequence[int]) -> None:
        for place, job in enumerate(self.assignment.batch):
            if mask >> place & 1:
                where, at = divmod(place, _JOBS_A_NUMBER)
                number = (numbers[where] >> at * _INPUT_BITS) & ((1 << _INPUT_BITS) - 1)
                self.lacking[job.request_id] = (worker, number - 1)

    def word(self, staying: Collection[str]) -> int:
        """The control word by which those go on."""
        stays = [member.request_id in staying for member in self.members]
        if all(stays):
            return GO
        return -sum(1 << i for i, stay in enumerate(stays) if stay)

    def obey(self, word: int, made: int) -> bool:
        """Lets go of those who leave after `made` steps; false when the run is over."""
        if word < 0:
            leaving = [m for i, m in enumerate(self.members) if not -word >> i & 1]
            for member in leaving:
                self.leave(member, made)
        return word != STOP

    def leave(self, member: mesh_pb2.BatchMember, made: int | None = None) -> None:
        """A job is out; it is told of once more where it stands behind `made` steps."""
        self.members.remove(member)
        if made:
            self._left[member.request_id] = member.first_step + made

    def note(self, made: int, *, last: bool = False, resolved: Mapping[str, str]) -> RunNote:
        """What is behind the jobs after `made` steps of the assignment."""
        behind = {m.request_id: m.first_step + made for m in self.members} | self._left
        self._left = {}
        return self._told(behind, last=last, resolved=resolved)

    def note_of(self, member: mesh_pb2.BatchMember, *, last: bool) -> RunNote:
        """One job is through, but for its file: that is still to be put in."""
        return self._told({member.request_id: member.first_step}, last=last)

    def over(self) -> RunNote:
        """All has been told."""
        return self._told({}, last=True)

    def failed(
        self,
        held: Mapping[str, int | None],
        failure: types_pb2.Failure,
        failed_job: mesh_pb2.FailedJob,
        *,
        last: bool = True,
    ) -> RunNote:
        """It, or the one job that is named, was given up; `held` by this worker are the latents
        with so many steps behind them.
        """
        return RunNote(
            assignment=self.assignment,
            behind={request: steps for request, steps in held.items() if steps is not None},
            last=last,
            failure=failure,
            failed_job=failed_job,
        )

    def _told(
        self,
        behind: Mapping[str, int],
        *,
        last: bool,
        resolved: Mapping[str, str] | None = None,
    ) -> RunNote:
        note = RunNote(
            assignment=self.assignment,
            behind=behind,
            steps=tuple(self._with_own(step) for step in self.steps),
            sides=tuple(self.sides),
            last=last,
            resolved=resolved or {},
        )
        self.steps.clear()
        self.sides.clear()
        self.unreported = Stopwatch()
        return note

    def _with_own(self, note: StepNote) -> StepNote:
        """A step, with every member's own part of it where all have told theirs."""
        known, size = self._own.pop(note.step, {}), len(self.assignment.group.members)
        if size == 1 or len(known) < size:
            return note
        return replace(note, members_us=tuple(known[rank] for rank in range(size)))
