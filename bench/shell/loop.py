"""An asyncio event loop in simulated time, shared by simulated processes.

    nothing is ready  ──▶  time jumps to the earliest timer  ──▶  what was due is ready, in order

A process is a context variable: every task and callback that a process starts carries it, so that a
process can be stopped (its callbacks wait, as under SIGSTOP) and killed (its tasks are cancelled
and nothing that it does reaches anybody any more). Nothing here reads a clock or draws a number, so
a run is a function of what is put in.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
Tell = Callable[[], None]

_SWEEPS = 50  # so often the tasks of a killed process are cancelled before they count as immortal
_CALLBACKS_AN_INSTANT = 500_000  # more than that without time going on: the run never ends
_current: ContextVar[Process | None] = ContextVar("process", default=None)


class Deadlock(RuntimeError):
    """Nothing is ready and nothing will ever be: whoever still waits, waits in vain."""


class TimeStandsStill(RuntimeError):
    """Callbacks go on calling each other without any simulated time going by."""


class Process:
    """What shares one fate. Made by `SimulatedLoop.process`."""

    def __init__(self, loop: SimulatedLoop, name: str) -> None:
        self.name = name
        self.loop = loop
        self.stopped = False
        self.dead = False
        self._cancelled = False
        self.errors: list[tuple[str, BaseException]] = []  # of tasks that nobody looked at
        self._held: list[_Handle] = []
        self._tasks: list[asyncio.Task[Any]] = []  # in the order of their making, some over
        self._tasks_max = 64  # beyond it those that are over are dropped
        self.at_death: list[Callable[[], None]] = []  # what cuts its links; called once
        self.on_terminate: Callable[[], object] = _nothing  # SIGTERM
        self.context = copy_context()
        self.context.run(_current.set, self)

    def start(self, work: Coroutine[Any, Any, T], name: str = "") -> asyncio.Task[T]:
        """Runs a coroutine inside the process."""
        return self.loop.create_task(work, name=name or None, context=self.context.copy())

    def call(self, callback: Callable[..., object], *args: object) -> None:
        """Calls something inside the process, at this instant."""
        self.loop.call_soon(callback, *args, context=self.context)

    def stop(self) -> None:
        """SIGSTOP: no callback runs until `resume`."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT: what had become ready meanwhile runs first, in its order."""
        self.stopped = False
        held, self._held = self._held, []
        self.loop.ready(held)

    async def kill(self) -> int:
        """SIGKILL: links are cut first, so that nothing of the clean-up is seen by others. Returns
        how many tasks refused to end.
        """
        if self._cancelled:
            return 0
        self._cancelled = True
        self.cut_off()
        self.resume()
        return await self.cancel_all()

    def cut_off(self) -> None:
        """The first half of `kill`, at once: nothing that it does is seen by others any more."""
        if not self.dead:
            self.dead = True
            for cut in self.at_death:
                cut()

    async def cancel_all(self) -> int:
        """Cancels every task; returns how many refused to end."""
        me = asyncio.current_task()
        for _ in range(_SWEEPS):
            left = [t for t in self.tasks() if t is not me]
            if not left:
                return 0
            for task in left:
                task.cancel()
            for _ in range(3):
                await asyncio.sleep(0)
        return len([t for t in self.tasks() if t is not me])

    def tasks(self) -> list[asyncio.Task[Any]]:
        """Its tasks that are not over, oldest first."""
        self._tasks = [t for t in self._tasks if not t.done()]
        return list(self._tasks)

    def adopt(self, task: asyncio.Task[Any]) -> None:
        self._tasks.append(task)
        if len(self._tasks) > self._tasks_max:
            self._tasks_max = 2 * len(self.tasks()) + 64

    def hold(self, handle: _Handle) -> None:
        self._held.append(handle)


def current_process() -> Process | None:
    """The process whose code is running."""
    return _current.get()


class _Handle:
    """A callback that waits; asyncio's own handle does as much at five times the cost."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "when_s")

    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context | None,
        when_s: float,
    ) -> None:
        self.callback, self.args, self.context = callback, args, context
        self.when_s, self.is_cancelled = when_s, False

    def cancel(self) -> None:
        self.is_cancelled = True
        self.args = ()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.when_s


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs simulated processes until told to stop. `now_us` is the only time there is."""

    def __init__(self, start_us: int = 1_000_000_000) -> None:
        super().__init__()
        self.start_us = start_us
        self.now_us = start_us
        self._now = start_us / 1e6
        self._queue: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._numbers = itertools.count()
        self._since_time_moved = 0
        self.callbacks = 0  # run so far
        self.thread_us: Callable[[], int] = int  # what work in a thread takes; 0
        self._threads_us: dict[int, int] = {}  # by executor: its last piece of work ends then
        self.watched: Callable[[Process, Coroutine[Any, Any, Any]], Tell | None] | None = None
        self.owners: dict[int, Process] = {}  # by id of a task that it made: the newest of that id
        self.set_task_factory(_make_task)
        self.set_exception_handler(_on_exception)
        self.unowned: list[tuple[str, BaseException]] = []  # failures outside of any process

    def process(self, name: str) -> Process:
        return Process(self, name)

    def ready(self, handles: list[_Handle]) -> None:
        """Puts callbacks in front of what is ready."""
        self._queue.extendleft(reversed(handles))

    def at_us(self, when_us: int, callback: Callable[..., object], *args: object) -> None:
        """Calls something at an instant, outside of every process."""
        when_s = when_us / 1e6
        handle = _Handle(callback, args, None, when_s)
        heapq.heappush(self._timers, (when_s, next(self._numbers), handle))

    # What asyncio asks of a loop.

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Handle:
        if context is None:
            context = copy_context()
        handle = _Handle(callback, args, context, self._now)
        self._queue.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> _Handle:
        if context is None:
            context = copy_context()
        handle = _Handle(callback, args, context, when)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> _Handle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    get_debug = bool  # False; asked for each future that is made

    def _write_to_self(self) -> None:
        """Nobody has to be woken: there is one thread."""

    def _process_events(self, event_list: object) -> None:
        """There are no file descriptors."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Runs at once, in the loop; what came of it is told `thread_us` later, in order."""
        done: asyncio.Future[T] = self.create_future()
        settle: Callable[..., object] = done.set_result
        try:
            result: Any = func(*args)
        except Exception as error:
            settle, result = done.set_exception, error
        late_us = max(self.now_us + self.thread_us(), self._threads_us.get(id(executor), 0))
        self._threads_us[id(executor)] = late_us
        self.call_at(late_us / 1e6, lambda: None if done.done() else settle(result))
        return done

    def _run_once(self) -> None:
        """Runs on until it is told to stop, which asyncio would ask for after each batch."""
        queue, timers = self._queue, self._timers
        while True:
            if not queue and not self._stopping:  # type: ignore[attr-defined]
                self._move_on()
            while timers and timers[0][0] <= self._now:
                queue.append(heapq.heappop(timers)[2])
            count = len(queue)
            self.callbacks += count
            self._since_time_moved += count
            if self._since_time_moved > _CALLBACKS_AN_INSTANT:
                raise TimeStandsStill(f"at {self.now_us} µs")
            for _ in range(count):
                handle = queue.popleft()
                if handle.is_cancelled:
                    continue
                context = handle.context
                try:
                    if context is None:
                        handle.callback(*handle.args)
                    elif (owner := context.get(_current)) is not None and owner.stopped:
                        owner.hold(handle)
                    else:
                        context.run(handle.callback, *handle.args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    told = {"message": f"in {handle.callback!r}", "exception": error}
                    self.call_exception_handler(told)
            if self._stopping:  # type: ignore[attr-defined]
                return

    def _move_on(self) -> None:
        """To the next timer."""
        timers = self._timers
        while timers and timers[0][2].is_cancelled:
            heapq.heappop(timers)
        if not timers:
            raise Deadlock(f"at {self.now_us} µs")
        when = timers[0][0]
        if when > self._now:
            self._now, self.now_us = when, round(when * 1e6)
            self._since_time_moved = 0


class SimulatedClock:
    """`hocket.clock.Clock` of one process: the loop's time, and an origin of its own."""

    def __init__(self, loop: SimulatedLoop, origin_us: int = 0) -> None:
        self._loop = loop
        self._origin_us = origin_us

    def now_us(self) -> int:
        return self._loop.now_us - self._origin_us

    async def sleep_until(self, at_us: int) -> None:
        while at_us > self.now_us():
            waiter: asyncio.Future[None] = self._loop.create_future()
            timer = self._loop.call_at((at_us + self._origin_us) / 1e6, _wake, waiter)
            try:
                await waiter
            finally:
                timer.cancel()

    async def settle(self) -> None:
        await asyncio.sleep(0)


def _nothing() -> None:
    """A process that has not said what SIGTERM means to it."""


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _make_task(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, T] | Generator[Any, None, T],
    context: Context | None = None,
) -> asyncio.Task[T]:
    owner = context.get(_current) if context is not None else _current.get()
    assert isinstance(loop, SimulatedLoop)
    if loop.watched is not None and owner is not None and isinstance(work, Coroutine):
        tell = loop.watched(owner, work)
        if tell is not None:
            work = stepped(work, tell)
    task: asyncio.Task[T] = asyncio.Task(work, loop=loop, context=context)
    if owner is not None:
        owner.adopt(task)
        loop.owners[id(task)] = owner
    else:
        loop.owners.pop(id(task), None)
    return task


async def stepped(work: Coroutine[Any, Any, T], tell: Tell) -> T:
    """Does the work, and tells of each await at which it has to wait."""
    return await _Stepped(work, tell)


class _Stepped(Awaitable[T]):
    def __init__(self, work: Coroutine[Any, Any, T], tell: Tell) -> None:
        self._work, self._tell = work, tell

    def __await__(self) -> Generator[Any, None, T]:
        error: BaseException | None = None
        while True:
            try:
                waits = self._work.send(None) if error is None else self._work.throw(error)
            except StopIteration as done:
                result: T = done.value
                return result
            self._tell()
            error = None
            try:
                yield waits
            except GeneratorExit:  # the world is over, and this with it
                self._work.close()
                raise
            except BaseException as raised:
                error = raised


def _on_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Failures that nobody retrieved: kept for the checks, with their process where known."""
    assert isinstance(loop, SimulatedLoop)
    error = context.get("exception")
    if error is None:
        return
    task = context.get("task") or context.get("future")
    owner = loop.owners.get(id(task)) if isinstance(task, asyncio.Task) else None
    if owner is not None and owner.dead:
        return
    found = (str(context.get("message")), error)
    (owner.errors if owner is not None else loop.unowned).append(found)
