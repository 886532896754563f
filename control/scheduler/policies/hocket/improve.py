"""What starts now, and what comes of it: one start after the other tried differently.

Compiled (numba). A start of this instant is judged by a rollout from the state that it leads to;
who is held waits for the next end of a run. Alternatives of a job: hold it, another degree, share a
batch with another job of its kind; whoever is due later makes room.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .kernel import (
    AVAIL,
    COLUMNS,
    KIND,
    NEVER,
    STEPS_LEFT,
    TEXT_LEFT,
    VAE_LEFT,
    WIDTH,
    Floats,
    Ints,
    Rules,
    Scratch,
    Tables,
    rollout,
)

BUSY = -2  # in a run that goes on
HOLD = -1  # could start, does not


class Limits(NamedTuple):
    """How far the search goes, and what best effort may do."""

    passes: int
    yielding: int  # jobs of lower worth, looked at before a late one is given up
    operations_max: int
    fill_step_us: float  # longer best-effort steps wait
    aged_workers: int  # for best effort that has waited too long


class Start(NamedTuple):
    """What starts now, by job."""

    choice: Ints  # index into widths, HOLD or BUSY
    head: Ints  # first member of its batch
    save: Ints  # work space
    save_head: Ints
    best: Ints
    best_head: Ints


def start_space(n: int) -> Start:
    """Room for n jobs."""
    return Start(*(np.zeros(n, np.int64) for _ in range(6)))


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def denoises(jobs: Floats, i: int) -> bool:
    return bool(jobs[i, TEXT_LEFT] <= 0.0 and jobs[i, STEPS_LEFT] > 0.0)


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def evaluate(
    now: float,
    gpus: int,
    jobs: Floats,
    on: Ints,
    move_us: Floats,
    tab: Tables,
    rules: Rules,
    trial: Floats,
    start: Start,
    s: Scratch,
) -> tuple[float, int]:
    """Score of starting just this now, for a step each; who is held waits for the next event."""
    n = jobs.shape[0]
    until = NEVER
    for i in range(n):
        for c in range(COLUMNS):
            trial[i, c] = jobs[i, c]
        k = start.choice[i]
        if k >= 0:
            head = start.head[i]
            trial[i, WIDTH] = tab.widths[k] if head == i else 0
            begin = now
            if jobs[i, TEXT_LEFT] > 0.0:
                trial[i, AVAIL] = begin + jobs[i, TEXT_LEFT]
                trial[i, TEXT_LEFT] = 0.0
            elif jobs[i, STEPS_LEFT] > 0.0:
                kind = int(jobs[i, KIND])
                step_us = tab.step_us[kind, k]
                size = batch_size(start, head)
                if size > 1:
                    step_us = tab.batch_us[kind, size - 1]
                trial[i, AVAIL] = begin + move_us[i, k] + step_us
                trial[i, STEPS_LEFT] -= 1.0
            else:
                trial[i, AVAIL] = begin + move_us[i, 0] + jobs[i, VAE_LEFT]
                trial[i, VAE_LEFT] = 0.0
        if trial[i, AVAIL] > now:
            until = min(until, trial[i, AVAIL])
    if until >= NEVER:
        until = now + 20_000.0
    for i in range(n):
        if start.choice[i] == HOLD and on[i]:
            trial[i, AVAIL] = until
            trial[i, WIDTH] = 0.0
    score, operations = rollout(now, gpus, trial[:n], on, tab, rules, s)
    return score, operations


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def batch_size(start: Start, head: int) -> int:
    """Members of the batch that starts with `head`."""
    size = 0
    for i in range(head, start.head.shape[0]):
        if start.head[i] == head and start.choice[i] >= 0:
            size += 1
    return size


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def improve(
    now: float,
    gpus: int,
    room: int,
    jobs: Floats,
    on: Ints,
    move_us: Floats,
    tab: Tables,
    rules: Rules,
    limits: Limits,
    spent: int,
    trial: Floats,
    start: Start,
    s: Scratch,
) -> int:
    """Replaces one job's start at a time by its best alternative, while that helps."""
    n = jobs.shape[0]
    operations = 0
    if limits.passes == 0 or not _any_choice(jobs, on, start):
        return 0
    score, used = evaluate(now, gpus, jobs, on, move_us, tab, rules, trial, start, s)
    operations += used
    for _ in range(limits.passes):
        improved = False
        for i in range(n):
            if start.choice[i] == BUSY or not on[i]:
                continue
            _copy(start.choice, start.head, start.save, start.save_head, n)
            found = False
            steps_now = denoises(jobs, i)
            options = tab.widths.shape[0] if steps_now else 1
            others = n if steps_now and tab.batch_us.shape[1] > 1 else 0
            for option in range(-1, options + others):
                if spent + operations > limits.operations_max:
                    break
                joins = option >= options
                if joins and jobs[i, KIND] != jobs[option - options, KIND]:
                    continue
                _copy(start.save, start.save_head, start.choice, start.head, n)
                if joins and not _may_join(i, option - options, jobs, on, tab, start):
                    continue
                if not _change(i, option, options, room, jobs, on, tab, start):
                    continue
                new, used = evaluate(now, gpus, jobs, on, move_us, tab, rules, trial, start, s)
                operations += used
                if new > score + 1e-6:
                    score = new
                    found = True
                    _copy(start.choice, start.head, start.best, start.best_head, n)
            if found:
                _copy(start.best, start.best_head, start.choice, start.head, n)
            else:
                _copy(start.save, start.save_head, start.choice, start.head, n)
            improved = improved or found
        if not improved:
            break
    return operations


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _any_choice(jobs: Floats, on: Ints, start: Start) -> bool:
    for i in range(jobs.shape[0]):  # noqa: SIM110 (no generators here)
        if on[i] and start.choice[i] != BUSY:
            return True
    return False


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _change(
    i: int, option: int, options: int, room: int, jobs: Floats, on: Ints, tab: Tables, start: Start
) -> bool:
    """Enters an alternative of job i: hold, a degree, or (from `options` on) another's batch."""
    n = jobs.shape[0]
    if option < options:
        if option == start.choice[i] and start.head[i] == i:
            return False
        if option >= 0:
            kind = int(jobs[i, KIND])
            if tab.widths[option] > room:
                return False
            if denoises(jobs, i) and tab.step_us[kind, option] >= NEVER:
                return False
        _dissolve(i, start)
        start.choice[i] = option
        start.head[i] = i
    else:
        j = option - options
        _dissolve(i, start)
        if start.choice[j] == HOLD:
            start.choice[j] = 0
        start.choice[i] = 0
        start.head[i] = j
    used = 0
    running = 0
    for j in range(n):
        if on[j] and start.choice[j] >= 0 and start.head[j] == j:
            used += tab.widths[start.choice[j]]
        running += start.choice[j] == BUSY
    if used == 0 and running == 0:
        return False  # somebody has to start
    for j in range(n - 1, -1, -1):
        if used <= room:
            break
        if on[j] and start.choice[j] >= 0 and start.head[j] == j and j != start.head[i]:
            used -= tab.widths[start.choice[j]]
            _dissolve(j, start)
            start.choice[j] = HOLD
    return bool(used <= room)


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _may_join(i: int, j: int, jobs: Floats, on: Ints, tab: Tables, start: Start) -> bool:
    if j >= i or not on[j] or start.head[j] != j or jobs[i, KIND] != jobs[j, KIND]:
        return False
    if start.choice[j] < HOLD or start.choice[j] > 0 or tab.widths[0] != 1 or start.head[i] == j:
        return False
    if not denoises(jobs, i) or not denoises(jobs, j):
        return False
    size = max(1, batch_size(start, j))
    if size >= tab.batch_us.shape[1]:
        return False
    return bool(tab.batch_us[int(jobs[i, KIND]), size] < NEVER)


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _dissolve(head: int, start: Start) -> None:
    """Those who shared a batch with its head are held."""
    for j in range(start.head.shape[0]):
        if start.head[j] == head and j != head:
            start.head[j] = j
            if start.choice[j] >= 0:
                start.choice[j] = HOLD


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _copy(choice: Ints, head: Ints, to_choice: Ints, to_head: Ints, n: int) -> None:
    for i in range(n):
        to_choice[i] = choice[i]
        to_head[i] = head[i]
