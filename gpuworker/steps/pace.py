"""How a step is timed, and waited for: by the clock on a CPU, by the stream's events on a GPU.

On a GPU a step is only *launched* by the code that makes it. `end` leaves an event behind it; the
engine waits for that event before it shows the step to anyone, and reads the time from it then. So
no synchronisation is made for a figure, and while steps are short the next one is launched before
the last is waited for: the GPU goes from one to the other without a gap.

Between `start` and `end` the group adds up what the step spends in exchanges (own_time.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from gpuworker.collectives.groups import Group
from gpuworker.collectives.own_time import Waited
from gpuworker.executor import StepNote, Stopwatch

_AHEAD_BELOW_US = 50_000  # a longer step would make a truncation wait, and hides its launch anyway


class MarkedCall(NamedTuple):
    """A call behind which a mark was left; `start` and `end` are its events on a GPU."""

    step: int
    watch: Stopwatch
    group: Group | None  # whose members made it; None: this worker alone
    waited: Waited | None
    start: Any = None
    end: Any = None

    def own_us(self, took_us: int) -> int | None:
        """How much of it was this member's own; None: not known."""
        return took_us if self.waited is None else self.waited.own_us(took_us)


class StepPace:
    """Of a CPU: what has returned has ended."""

    ahead = False  # whether the next step may be launched before the last is waited for

    def enter(self) -> None:
        """To be called by the compute thread, once."""

    def start(self, group: Group | None = None) -> MarkedCall:
        """Marks where a call begins."""
        waited = None if group is None else group.watch()
        return MarkedCall(0, Stopwatch(), group, waited, self._mark())

    def end(self, started: MarkedCall, step: int) -> MarkedCall:
        """Marks where it ends, as the assignment's `step`-th."""
        if started.group is not None:
            started.group.unwatch()
        return started._replace(step=step, end=self._end(started, step))

    def wait(self, ended: MarkedCall) -> StepNote:
        """Returns when the call has ended on this device. Raises `GroupLost`."""
        note: StepNote = ended.end
        return note

    def _mark(self) -> Any:
        """Where the device is, on its own clock."""

    def _end(self, started: MarkedCall, step: int) -> Any:
        note = started.watch.step(step)
        return replace(note, own_us=started.own_us(note.duration_us))


class CudaPace(StepPace):
    """Of a GPU, whose compute thread uses one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def enter(self) -> None:
        torch.cuda.set_device(self._device)  # a thread's own: it would be the first GPU

    def wait(self, ended: MarkedCall) -> StepNote:
        if ended.group is None:
            ended.end.synchronize()
        else:
            ended.group.settle(ended.end)
        took_us = int(ended.start.elapsed_time(ended.end) * 1000)
        self.ahead = took_us < _AHEAD_BELOW_US
        note = ended.watch.ended(ended.step, took_us)
        return replace(note, own_us=ended.own_us(took_us))

    def _mark(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def _end(self, started: MarkedCall, step: int) -> Any:
        return self._mark()


def pace_of(device: torch.device) -> StepPace:
    """The pace of a device."""
    return CudaPace(device) if device.type == "cuda" else StepPace()
