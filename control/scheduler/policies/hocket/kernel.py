"""The rollout: what happens if everybody is served earliest deadline first from here on.

Compiled (numba). One call plays the known jobs of one pod forward, step by step, under the base
rule, and says who makes the deadline:

    at each step end, in deadline order: the smallest degree that makes the deadline, else the
    fastest that fits; no room left: join a batch of one's kind if all its members stay on time;
    what is then free widens those just started, in deadline order

Jobs are rows of a matrix in deadline order, times are microseconds. A row that is `on` counts; one
that is off only holds its workers until `AVAIL`. Encode and decode take one worker each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NEVER = 1e18
EPS = 0.5  # microseconds

# Columns of the job matrix.
KIND = 0  # row of the tables
TEXT_LEFT = 1  # of the encode; 0: done
STEPS_LEFT = 2  # beyond the run under way
VAE_LEFT = 3  # of the decode
DEADLINE = 4
AVAIL = 5  # its run under way ends then; <= now: it waits
WIDTH = 6  # workers that its run under way holds
WEIGHT = 7  # what making the deadline is worth
AGED = 8  # 1: best effort that has waited too long
COLUMNS = 9


class Tables(NamedTuple):
    """Prices of one pod, by kind (model and shape)."""

    widths: Ints  # (K,) degrees on offer, ascending
    step_us: Floats  # (kinds, K); NEVER where a kind does not split that way
    batch_us: Floats  # (kinds, B) one step of 1..B jobs together at degree 1; NEVER: not batched
    fastest_us: Floats  # (kinds,)


class Rules(NamedTuple):
    """What is weighed how."""

    slack_sat_us: float  # slack beyond this is worth nothing
    slack_worth: float  # of one microsecond of it, where making a deadline is worth 1e9
    finish_worth: float  # of one microsecond of earlier finish
    coarseness: float  # steps are played in bunches of this part of the time looked ahead


# Rows of the work space: floats, then integers.
TEXT, LEFT, VAE, END, PACE, FINISH = range(6)
HELD, CHOICE, HEAD, SIZE, LIVE = range(5)
# PACE: longest step that keeps all members of a batch on time. FINISH: when on time, else -1.
# HELD: workers held until END. CHOICE: index into widths of what starts at this instant, -1:
# nothing. HEAD: first member of the batch that it starts in. SIZE: members of the batch that it
# heads. LIVE: jobs still in play, in deadline order.


class Scratch(NamedTuple):
    """Work space for up to as many jobs as its matrices have columns."""

    floats: Floats
    ints: Ints


def scratch(n: int) -> Scratch:
    """Work space for n jobs."""
    return Scratch(np.zeros((6, n)), np.zeros((5, n), np.int64))


@njit(cache=True)  # type: ignore[untyped-decorator]
def rollout(
    now: float, gpus: int, jobs: Floats, on: Ints, tab: Tables, rules: Rules, s: Scratch
) -> tuple[float, int]:
    """Score of the pod's future, and the operations it took; `FINISH` of the work space tells of each job."""
    widths, step_us, batch_us, fastest_us = tab
    f, d = s
    coarse = rules.coarseness
    m = _enter(now, jobs, on, f, d)
    t = now
    score = 0.0
    operations = 0
    while m > 0:
        operations += m
        room, until = _room(t, m, gpus, f, d)
        m, room = _allocate(t, m, room, jobs, on, widths, step_us, batch_us, fastest_us, f, d)
        if room > 0:
            _widen(m, room, jobs, widths, step_us, f, d)
        until = _start(t, now, m, until, jobs, widths, step_us, batch_us, coarse, f, d)
        if until >= NEVER:
            break
        t = until
        m, gained = _settle(t, now, m, jobs, on, rules, f, d)
        score += gained
    return score, operations


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _enter(now: float, jobs: Floats, on: Ints, f: Floats, d: Ints) -> int:
    m = 0
    for i in range(jobs.shape[0]):
        f[FINISH, i] = -1.0
        if on[i] or jobs[i, AVAIL] > now:
            f[TEXT, i] = jobs[i, TEXT_LEFT]
            f[LEFT, i] = jobs[i, STEPS_LEFT]
            f[VAE, i] = jobs[i, VAE_LEFT]
            f[END, i] = jobs[i, AVAIL]
            d[HELD, i] = int(jobs[i, WIDTH])
            d[LIVE, m] = i
            m += 1
    return m


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _room(t: float, m: int, gpus: int, f: Floats, d: Ints) -> tuple[int, float]:
    """Free workers at t, and the first end of a run."""
    room = gpus
    until = NEVER
    for x in range(m):
        i = d[LIVE, x]
        if f[END, i] > t:
            room -= d[HELD, i]
            until = min(until, f[END, i])
    return room, until


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def smallest(
    left: float, budget: float, room: int, kind: int, step_us: Floats, widths: Ints
) -> int:
    """Index of the smallest width whose steps fit the budget, else of the fastest that fits."""
    best = -1
    best_us = NEVER
    for k in range(widths.shape[0]):
        if widths[k] > room:
            break
        if step_us[kind, k] < NEVER and left * step_us[kind, k] <= budget + EPS:
            return k
        if step_us[kind, k] < best_us:
            best_us = step_us[kind, k]
            best = k
    return best


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _allocate(
    t: float,
    m: int,
    room: int,
    jobs: Floats,
    on: Ints,
    widths: Ints,
    step_us: Floats,
    batch_us: Floats,
    fastest_us: Floats,
    f: Floats,
    d: Ints,
) -> tuple[int, int]:
    """Who starts at t; rows that are off and over, or hopeless, leave."""
    w = 0
    for x in range(m):
        i = d[LIVE, x]
        d[CHOICE, i] = -1
        if f[END, i] > t:
            d[LIVE, w] = i
            w += 1
            continue
        kind = int(jobs[i, KIND])
        budget = jobs[i, DEADLINE] - f[VAE, i] - t
        if not on[i] or f[TEXT, i] + f[LEFT, i] * fastest_us[kind] > budget + EPS:
            continue
        d[LIVE, w] = i
        w += 1
        d[HEAD, i] = i
        d[SIZE, i] = 1
        denoises = f[TEXT, i] <= 0.0 and f[LEFT, i] > 0.0
        f[PACE, i] = budget / f[LEFT, i] if denoises else 0.0
        if room > 0:
            if denoises:
                d[CHOICE, i] = smallest(f[LEFT, i], budget, room, kind, step_us, widths)
            else:
                d[CHOICE, i] = 0
            if d[CHOICE, i] >= 0:
                room -= widths[d[CHOICE, i]]
        elif denoises and batch_us.shape[1] > 1:
            _join(i, kind, w, jobs, widths, batch_us, f, d)
    return w, room


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _join(
    i: int, kind: int, m: int, jobs: Floats, widths: Ints, batch_us: Floats, f: Floats, d: Ints
) -> None:
    """Lets a job without a worker into the first batch of its kind where nobody gets late by it."""
    for x in range(m - 1):
        j = d[LIVE, x]
        if d[CHOICE, j] != 0 or d[HEAD, j] != j or int(jobs[j, KIND]) != kind or f[PACE, j] <= 0.0:
            continue
        if d[SIZE, j] >= batch_us.shape[1] or widths[0] != 1:
            continue
        together_us = batch_us[kind, d[SIZE, j]]
        if together_us <= min(f[PACE, i], f[PACE, j]):
            d[CHOICE, i] = 0
            d[HEAD, i] = j
            d[SIZE, j] += 1
            f[PACE, j] = min(f[PACE, i], f[PACE, j])
            return


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _widen(
    m: int, room: int, jobs: Floats, widths: Ints, step_us: Floats, f: Floats, d: Ints
) -> None:
    for x in range(m):
        i = d[LIVE, x]
        if d[CHOICE, i] < 0 or f[TEXT, i] > 0.0 or f[LEFT, i] <= 0.0 or d[SIZE, i] > 1:
            continue
        kind = int(jobs[i, KIND])
        for k in range(d[CHOICE, i] + 1, widths.shape[0]):
            more = widths[k] - widths[d[CHOICE, i]]
            if more > room:
                break
            if step_us[kind, k] < step_us[kind, d[CHOICE, i]]:
                room -= more
                d[CHOICE, i] = k
        if room <= 0:
            return


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _start(
    t: float,
    now: float,
    m: int,
    until: float,
    jobs: Floats,
    widths: Ints,
    step_us: Floats,
    batch_us: Floats,
    coarse: float,
    f: Floats,
    d: Ints,
) -> float:
    """Books what was allocated; the first end of a run."""
    for x in range(m):
        i = d[LIVE, x]
        if d[CHOICE, i] < 0:
            continue
        d[HELD, i] = widths[d[CHOICE, i]] if d[HEAD, i] == i else 0
        if f[TEXT, i] > 0.0:
            f[END, i] = t + f[TEXT, i]
            f[TEXT, i] = 0.0
        elif f[LEFT, i] > 0.0:
            kind = int(jobs[i, KIND])
            size = d[SIZE, d[HEAD, i]]
            one_us = step_us[kind, d[CHOICE, i]]
            steps = 1.0
            if size > 1:
                one_us = batch_us[kind, size - 1]
            elif coarse > 0.0:
                steps = np.floor(coarse * (t - now) / one_us)
                steps = max(1.0, min(f[LEFT, i], steps))
            f[END, i] = t + steps * one_us
            f[LEFT, i] -= steps
        else:
            f[END, i] = t + f[VAE, i]
            f[VAE, i] = 0.0
        until = min(until, f[END, i])
    return until


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _settle(
    t: float, now: float, m: int, jobs: Floats, on: Ints, rules: Rules, f: Floats, d: Ints
) -> tuple[int, float]:
    """Takes out who is done; what their deadlines are worth."""
    w = 0
    gained = 0.0
    for x in range(m):
        i = d[LIVE, x]
        over = f[END, i] <= t and f[TEXT, i] <= 0.0 and f[LEFT, i] <= 0.0 and f[VAE, i] <= 0.0
        if not over:
            d[LIVE, w] = i
            w += 1
        elif on[i] and f[END, i] <= jobs[i, DEADLINE] + EPS:
            f[FINISH, i] = f[END, i]
            slack = min(rules.slack_sat_us, jobs[i, DEADLINE] - f[END, i])
            gained += jobs[i, WEIGHT] * 1e9 + rules.slack_worth * slack
            gained -= rules.finish_worth * (f[END, i] - now)
    return w, gained
