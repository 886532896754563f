"""How much of a group's step was a member's own: all of it but what it spent in exchanges.

    member a   ▓▓▓▓▓▓░▓▓▓▓▓▓░     ▓ own     ░ in an exchange, until the last one has come
    member b   ▓▓▓░░░░▓▓▓░░░░     the slow one waits for nobody

On a CPU the clock is read around each exchange. On a GPU it is only launched: events of the stream
stand around it, and are read once the step has ended. Nothing is waited for to get a figure.
"""

from __future__ import annotations

from typing import Any

import torch

from hocket.clock import steady_ns


class Waited:
    """What one step of one member spends in exchanges; opened and closed around each of them."""

    __slots__ = ("_began_ns", "_events", "_known", "_spent_ns")

    def __init__(self) -> None:
        self._spent_ns = self._began_ns = 0
        self._events: list[tuple[Any, Any]] = []  # of a GPU: before and behind an exchange
        self._known = True

    def begin(self, device: torch.device) -> None:
        """An exchange of tensors on that device begins."""
        if device.type == "cuda":
            self._events.append((_mark(), None))
        else:
            self._began_ns = steady_ns()

    def end(self, device: torch.device) -> None:
        """It has ended, or on a GPU: all that follows waits for its end."""
        if device.type == "cuda":
            self._events[-1] = (self._events[-1][0], _mark())
        else:
            self._spent_ns += steady_ns() - self._began_ns

    def unseen(self) -> None:
        """There are exchanges that do not come by here."""
        self._known = False

    def own_us(self, took_us: int) -> int | None:
        """What is left of a step that has ended; None: not known."""
        if not self._known:
            return None
        on_gpu_ms = sum(begin.elapsed_time(end) for begin, end in self._events)
        return max(1, took_us - self._spent_ns // 1000 - int(1000 * on_gpu_ms))


def _mark() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
