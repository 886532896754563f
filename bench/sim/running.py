"""An assignment that the simulated workers have in hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from control.scheduler.values import Assignment


@dataclass(slots=True, eq=False)
class Running:
    """An assignment in the workers' hands."""

    assignment: Assignment
    call_us: int  # of one step, by the profile
    started: bool = False
    over: bool = False
    stop_at: int | None = None  # truncated: over at the next step that reaches this number
    steps_done: int = 0
    step_us: int = 0  # of the step under way
    reported_us: int = 0  # the last report went out, or the first step began
    unreported: list[int] = field(default_factory=list)  # times of steps since then
    setup_us: tuple[int, int, int] = (0, 0, 0)  # load, transfer, group: for the first report

    def stops(self) -> bool:
        """The step that has just ended was its last."""
        if self.steps_done == self.assignment.steps:
            return True
        if self.stop_at is None:
            return False
        return self.assignment.batch[0].first_step + self.steps_done >= self.stop_at
