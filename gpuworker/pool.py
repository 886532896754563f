"""Forks the workers of one host, and forks again what died.

The parent has imported what workers need, so that they share its pages and start in milliseconds;
it starts no thread and touches no device, so that each fork is as clean as the first. A worker that
dies is started again after a pause that doubles with each death and is forgotten after a minute of
life; too many deaths in ten minutes end the pool, all the others having handed over. A worker that
ends well, has a wrong setting, or is refused its name stays away. One that hangs is not seen here:
control ends its lease. Workers never outlive the parent.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from gpuworker.mesh.naming import EXIT_FAILED, FINAL_STATUSES
from hocket.clock import SystemClock

_PR_SET_PDEATHSIG = 1
_PAUSE_US, _PAUSE_US_MAX = 500_000, 30_000_000
_LIVED_WELL_US = 60_000_000
_DEATHS_WITHIN_US = 600_000_000
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
_CLOCK = SystemClock()

Work = Callable[[int, int], int]  # (index, times started again) -> exit status


@dataclass
class _Worker:
    """One place in the pool."""

    index: int
    pid: int = 0  # 0: not running
    restarts: int = 0
    started_us: int = 0
    due_us: int | None = 0  # when to start it; None: it runs, or stays away
    pause_us: int = _PAUSE_US
    deaths_us: deque[int] = field(default_factory=deque)


def run_pool(count: int, first_index: int, work: Work, restarts_max: int = 10) -> int:
    """Runs `work(index, restarts)` in `count` forked processes, and again where one dies, up to
    `restarts_max` times in ten minutes each.

    Returns 0 when all ended well or were told to stop; else the status of the first that did not.
    """
    return _Pool(count, first_index, work, restarts_max).run()


class _Pool:
    def __init__(self, count: int, first_index: int, work: Work, restarts_max: int) -> None:
        self._workers = [_Worker(first_index + place) for place in range(count)]
        self._work = work
        self._restarts_max = restarts_max
        self._told = False  # to stop, by whoever runs the pool
        self._worst = 0
        self._forward = 0  # signals that the workers have not been sent yet

    def run(self) -> int:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        try:
            while self._is_needed():
                self._start_due()
                select.select([reader], [], [], self._wait_s())
                with suppress(BlockingIOError):
                    os.read(reader, 4096)
                self._pass_on()
                self._reap()
        finally:
            signal.set_wakeup_fd(-1)
            os.close(reader)
            os.close(writer)
        return 0 if self._told else self._worst

    def _on_signal(self, number: int, _: object) -> None:
        if number != signal.SIGCHLD:
            self._told = True
            self._forward += 1

    def _is_needed(self) -> bool:
        return any(worker.pid or worker.due_us is not None for worker in self._workers)

    def _wait_s(self) -> float | None:
        due = [w.due_us for w in self._workers if w.due_us is not None]
        if self._forward:
            return 0.0
        return max(0, min(due) - _CLOCK.now_us()) / 1e6 if due else None

    def _start_due(self) -> None:
        now_us = _CLOCK.now_us()
        for worker in self._workers:
            if worker.due_us is None or worker.due_us > now_us:
                continue
            worker.due_us, worker.started_us = None, now_us
            sys.stdout.flush()
            sys.stderr.flush()
            worker.pid = os.fork()
            if worker.pid == 0:
                _become_worker()
                os._exit(_guarded(self._work, worker.index, worker.restarts))

    def _pass_on(self) -> None:
        """Every signal reaches every worker: the first asks, the second hurries."""
        while self._forward:
            self._forward -= 1
            self._stop_all()

    def _stop_all(self) -> None:
        for worker in self._workers:
            worker.due_us = None
            if worker.pid:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGTERM)

    def _reap(self) -> None:
        for worker in self._workers:
            if worker.pid and (ended := os.waitpid(worker.pid, os.WNOHANG))[0]:
                worker.pid = 0
                self._ended(worker, os.waitstatus_to_exitcode(ended[1]))

    def _ended(self, worker: _Worker, status: int) -> None:
        what = f"worker process {worker.index} ended with {status}"
        if self._told or status in FINAL_STATUSES:
            self._worst = self._worst or status
            print(what, file=sys.stderr, flush=True)
            return
        now_us, deaths = _CLOCK.now_us(), worker.deaths_us
        deaths.append(now_us)
        while deaths[0] <= now_us - _DEATHS_WITHIN_US:
            deaths.popleft()
        if len(deaths) > self._restarts_max:
            print(f"{what}, {len(deaths)} times in ten minutes: all stop", file=sys.stderr)
            self._worst = self._worst or (status if status > 0 else EXIT_FAILED)
            self._stop_all()
            return
        if now_us - worker.started_us >= _LIVED_WELL_US:
            worker.pause_us = _PAUSE_US
        pause_us, worker.pause_us = worker.pause_us, min(2 * worker.pause_us, _PAUSE_US_MAX)
        worker.restarts += 1
        worker.due_us = now_us + pause_us
        told = f"{what}; it is started again in {pause_us / 1e6:.1f} s (restart {worker.restarts})"
        print(told, file=sys.stderr, flush=True)


def _become_worker() -> None:
    """Forgets what is the parent's. A terminal's Ctrl-C reaches both: the parent passes it on."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _guarded(work: Work, index: int, restarts: int) -> int:
    try:
        return work(index, restarts)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return EXIT_FAILED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
