"""An assignment that the simulated workers have in hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from control.scheduler.values import DIT, Assignment, JobProgress, Member


@dataclass(slots=True, eq=False)
class RunningAssignment:
    """An assignment in the workers' hands."""

    assignment: Assignment  # of the jobs that are still in it
    call_us: tuple[int, int]  # of one step: alone on the host, and beside others
    started: bool = False
    over: bool = False
    stop_at: int | None = None  # truncated: over at the next step that reaches this number
    steps_done: int = 0
    step_us: int = 0  # of the step under way
    own_us: tuple[int, ...] = ()  # of that, each member's own; empty for one member
    reported_us: int = 0  # the last report went out, or the first step began
    unreported: list[int] = field(default_factory=list)  # times of steps since then
    unreported_own: list[int] = field(default_factory=list)  # and of each, each member's own
    setup_us: tuple[int, int, int] = (0, 0, 0)  # load, transfer, group: for the first report
    leaving: list[Member] = field(default_factory=list)  # called off: out at the end of the step
    left: list[JobProgress] = field(default_factory=list)  # since the last report

    def stops(self) -> bool:
        """The step that has just ended was its last."""
        if self.steps_done == self.assignment.steps:
            return True
        if self.stop_at is None:
            return False
        return self.assignment.batch[0].first_step + self.steps_done >= self.stop_at

    def progress(self, member: Member) -> JobProgress:
        """Where a job stands by the steps of this assignment."""
        steps = self.steps_done if self.assignment.node == DIT else 0
        done = member.first_step + steps
        return JobProgress(request=member.request, attempt=member.attempt, steps_done=done)

    def leave(self, member: Member) -> bool:
        """A job leaves a batch, at the end of the step under way; false for the last job."""
        if member not in self.leaving:
            if len(self.assignment.batch) - len(self.leaving) == 1:
                return False
            self.leaving.append(member)
        if not self.started:
            self.part()
            self.left.clear()  # nothing was run
        return True

    def part(self) -> None:
        """Those who were called off are out; others go on."""
        if self.leaving:
            self.left += [self.progress(m) for m in self.leaving]
            rest = tuple(m for m in self.assignment.batch if m not in self.leaving)
            self.assignment = msgspec.structs.replace(self.assignment, batch=rest)
            self.leaving.clear()
