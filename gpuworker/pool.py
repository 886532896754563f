"""Forks the workers of one host and waits for them.

The parent has imported what workers need, so that they share its pages and start in milliseconds;
it starts no thread and touches no device before the fork. A worker that dies is not restarted here:
its lease ends, its jobs move, and whoever supervises the host decides. Workers never outlive the
parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def run_pool(count: int, first_index: int, work: Callable[[int], int]) -> int:
    """Runs `work(index)` in `count` forked processes; returns 0 when all ended well or were told to
    stop.
    """
    children: dict[int, int] = {}
    told = False

    def forward(sign: int, _: object) -> None:
        nonlocal told
        told = True
        for pid in children:
            os.kill(pid, signal.SIGTERM)

    for index in range(first_index, first_index + count):
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _die_with_parent()
            os._exit(_guarded(work, index))
        children[pid] = index
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, forward)
    worst = 0
    while children:
        pid, status = os.wait()
        if pid in children:
            code = os.waitstatus_to_exitcode(status)
            print(f"worker process {children.pop(pid)} ended with {code}", file=sys.stderr)
            worst = worst or code
    return 0 if told else worst


def _guarded(work: Callable[[int], int], index: int) -> int:
    try:
        return work(index)
    except KeyboardInterrupt:
        return 0
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
