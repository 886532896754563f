"""An asyncio event loop in simulated time, shared by simulated processes.

    nothing is ready  ──▶  time jumps to the earliest timer  ──▶  what was due is ready, in order

A process is a context variable: every task and callback that a process starts carries it, so that a
process can be stopped (its callbacks wait, as under SIGSTOP) and killed (its tasks are cancelled
and nothing that it does reaches anybody any more). Nothing here reads a clock or draws a number, so
a run is a function of what is put in.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextvars import Context, ContextVar, copy_context
from functools import partial
from heapq import heappop, heappush
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
Tell = Callable[[], None]

_SWEEPS = 50  # so often the tasks of a killed process are cancelled before they count as immortal
_CALLBACKS_AN_INSTANT = 500_000  # more than that without time going on: the run never ends
_current: ContextVar[SimulatedProcess | None] = ContextVar("process", default=None)


class Deadlock(RuntimeError):
    """Nothing is ready and nothing will ever be: whoever still waits, waits in vain."""


class TimeStandsStill(RuntimeError):
    """Callbacks go on calling each other without any simulated time going by."""


class SimulatedProcess:
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


def current_process() -> SimulatedProcess | None:
    """The process whose code is running."""
    return _current.get()


class _Handle:
    """A callback that waits; asyncio's own handle does as much at five times the cost. Made by
    `_handle_of` or, where it counts, in place: a constructor would take longer than the rest.
    """

    __slots__ = ("args", "callback", "context", "is_cancelled")

    callback: Callable[..., object]
    args: tuple[Any, ...]
    context: Context | None
    is_cancelled: bool

    def cancel(self) -> None:
        self.is_cancelled = True
        self.args = ()

    def cancelled(self) -> bool:
        return self.is_cancelled


_new: Callable[[type[_Handle]], _Handle] = object.__new__


def _handle_of(callback: Callable[..., object], args: tuple[Any, ...] = ()) -> _Handle:
    """Of something outside of every process."""
    handle = _new(_Handle)
    handle.callback, handle.args, handle.context = callback, args, None
    handle.is_cancelled = False
    return handle


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
        self.watched: Callable[[SimulatedProcess, Coroutine[Any, Any, Any]], Tell | None] | None = (
            None
        )
        # By id of a task that it made: the newest of that id.
        self.owners: dict[int, SimulatedProcess] = {}
        # Without a Python frame: asked for more often than anything else.
        self.create_future = partial(asyncio.Future, loop=self)  # type: ignore[method-assign]
        self.set_exception_handler(_on_exception)
        self.unowned: list[tuple[str, BaseException]] = []  # failures outside of any process

    def process(self, name: str) -> SimulatedProcess:
        return SimulatedProcess(self, name)

    def ready(self, handles: list[_Handle]) -> None:
        """Puts callbacks in front of what is ready."""
        self._queue.extendleft(reversed(handles))

    def at_us(self, when_us: int, callback: Callable[..., object], *args: object) -> None:
        """Calls something at an instant, outside of every process."""
        handle = _handle_of(callback, args)
        heappush(self._timers, (when_us / 1e6, next(self._numbers), handle))

    def alarm(self, callback: Callable[[], object]) -> Callable[[int], None]:
        """For what is called again and again: what it returns does as `at_us` with the callback."""
        timers, numbers, handle = self._timers, self._numbers, _handle_of(callback)

        def at_us(when_us: int) -> None:
            heappush(timers, (when_us / 1e6, next(numbers), handle))

        return at_us

    # What asyncio asks of a loop.

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Handle:
        handle = _new(_Handle)
        handle.callback = callback
        handle.args = args
        handle.context = copy_context() if context is None else context
        handle.is_cancelled = False
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
        handle = _new(_Handle)
        handle.callback = callback
        handle.args = args
        handle.context = copy_context() if context is None else context
        handle.is_cancelled = False
        heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> _Handle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        owner = _current.get() if context is None else context.get(_current)
        if self.watched is not None and owner is not None and isinstance(coro, Coroutine):
            tell = self.watched(owner, coro)
            if tell is not None:
                coro = stepped(coro, tell)
        named = "" if name is None else str(name)  # asyncio would make one up, at some cost
        task: asyncio.Task[T] = asyncio.Task(coro, loop=self, name=named, context=context)
        if owner is not None:
            owner.adopt(task)
            self.owners[id(task)] = owner
        else:
            self.owners.pop(id(task), None)
        return task

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
        take, add = queue.popleft, queue.append
        while not self._stopping:  # type: ignore[attr-defined]
            if not queue:
                self._move_on()
            while timers and timers[0][0] <= self._now:
                add(heappop(timers)[2])
            count = len(queue)
            self.callbacks += count
            self._since_time_moved += count
            if self._since_time_moved > _CALLBACKS_AN_INSTANT:
                raise TimeStandsStill(f"at {self.now_us} µs")
            for _ in range(count):
                handle = take()
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

    def _move_on(self) -> None:
        """To the next timer."""
        timers = self._timers
        while timers:
            when, _, handle = timers[0]
            if handle.is_cancelled:
                heappop(timers)
                continue
            if when > self._now:
                self._now, self.now_us = when, round(when * 1e6)
                self._since_time_moved = 0
            return
        raise Deadlock(f"at {self.now_us} µs")


def _nothing() -> None:
    """A process that has not said what SIGTERM means to it."""


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
