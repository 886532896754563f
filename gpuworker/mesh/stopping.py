"""SIGTERM and SIGINT: the first one asks a worker to hand its latents over and leave, the second
one to leave at once, a third one kills.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Sequence
from typing import Protocol

from gpuworker.executor import CLOSE_PATIENCE_S

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
AT_ONCE_PATIENCE_S = 0.5  # for the step in hand


class Stoppable(Protocol):
    """What serves until it is told to stop (see agent.Agent)."""

    def run(self) -> Awaitable[None]: ...

    def stop(self) -> None: ...


class StopSignals:
    """Create it on the loop that serves."""

    def __init__(self) -> None:
        self.leave = asyncio.Event()
        self.at_once = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def listen(self) -> None:
        """From now on signals are heard here. One that is ignored stays so: a pool's parent hears
        it and passes it on.
        """
        for number in _NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._loop.add_signal_handler(number, self.told)

    @property
    def patience_s(self) -> float:
        """How long the step in hand is waited for at the end."""
        return AT_ONCE_PATIENCE_S if self.at_once.is_set() else CLOSE_PATIENCE_S

    def told(self) -> None:
        """One more signal."""
        if not self.leave.is_set():
            self.leave.set()
            return
        self.at_once.set()
        for number in _NUMBERS:
            self._loop.remove_signal_handler(number)


async def run_until(agents: Sequence[Stoppable], signals: StopSignals) -> None:
    """Runs agents until they have left, as signals have told them. Raises what ended one."""
    async with asyncio.TaskGroup() as tasks:

        async def serve(agent: Stoppable) -> None:
            await agent.run()

        serving = [tasks.create_task(serve(agent)) for agent in agents]

        async def pass_on() -> None:
            await signals.leave.wait()
            for agent in agents:
                agent.stop()
            await signals.at_once.wait()
            for task in serving:
                task.cancel()

        telling = tasks.create_task(pass_on())
        await asyncio.wait(serving)
        telling.cancel()
