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
PROMISED_WORTH = 1000.0  # of a firm promise, beyond its deadline's: more than all others in a pod

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
GUARD = 9  # what was taken off a firm promise's deadline, to have something in hand
COLUMNS = 10


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
    coarseness: float  # steps are played in bunches of this part of the time looked ahead


# Rows of the work space: text, left, vae, end, pace, finish; held, choice, head, size, live, kept.
FINISH = 5
KEPT = 5
# pace: longest step that keeps all members of a batch on time. finish: when on time, else -1.
# held: workers held until end. choice: index into widths of what starts at this instant, -1:
# nothing. head: first member of the batch that it starts in. size: members of the batch that it
# heads. live: jobs still in play, in deadline order. kept: free for who calls.


class Scratch(NamedTuple):
    """Work space for up to as many jobs as its matrices have columns."""

    floats: Floats
    ints: Ints


def scratch(n: int) -> Scratch:
    """Work space for n jobs."""
    return Scratch(np.zeros((6, n)), np.zeros((6, n), np.int64))


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def rollout(
    now: float, gpus: int, jobs: Floats, on: Ints, tab: Tables, rules: Rules, s: Scratch
) -> tuple[float, int]:
    """Score of the pod's future, and the operations it took; FINISH tells of each job."""
    widths, step_us, batch_us, fastest_us = tab
    text, left, vae, end, pace, finish = s.floats
    held, choice, head, size, live, _ = s.ints
    coarse = rules.coarseness
    m = _enter(now, jobs, on, text, left, vae, end, finish, held, live)
    t = now
    score = 0.0
    operations = 0
    while m > 0:
        operations += m
        room, until = _room(t, m, gpus, end, held, live)
        m, room = _allocate(
            t,
            m,
            room,
            jobs,
            on,
            widths,
            step_us,
            batch_us,
            fastest_us,
            text,
            left,
            vae,
            end,
            pace,
            choice,
            head,
            size,
            live,
        )
        if room > 0:
            _widen(m, room, jobs, widths, step_us, text, left, choice, size, live)
        until = _start(
            t,
            now,
            m,
            until,
            jobs,
            widths,
            step_us,
            batch_us,
            coarse,
            text,
            left,
            vae,
            end,
            held,
            choice,
            head,
            size,
            live,
        )
        if until >= NEVER:
            break
        t = until
        m, gained = _settle(t, m, jobs, on, rules, text, left, vae, end, finish, live)
        score += gained
    return score, operations


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _enter(
    now: float,
    jobs: Floats,
    on: Ints,
    text: Floats,
    left: Floats,
    vae: Floats,
    end: Floats,
    finish: Floats,
    held: Ints,
    live: Ints,
) -> int:
    m = 0
    for i in range(jobs.shape[0]):
        finish[i] = -1.0
        if on[i] or jobs[i, AVAIL] > now:
            text[i] = jobs[i, TEXT_LEFT]
            left[i] = jobs[i, STEPS_LEFT]
            vae[i] = jobs[i, VAE_LEFT]
            end[i] = jobs[i, AVAIL]
            held[i] = int(jobs[i, WIDTH])
            live[m] = i
            m += 1
    return m


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _room(t: float, m: int, gpus: int, end: Floats, held: Ints, live: Ints) -> tuple[int, float]:
    """Free workers at t, and the first end of a run."""
    room = gpus
    until = NEVER
    for x in range(m):
        i = live[x]
        if end[i] > t:
            room -= held[i]
            if end[i] < until:
                until = end[i]
    return room, until


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def smallest(
    steps: float, budget: float, room: int, kind: int, step_us: Floats, widths: Ints
) -> int:
    """Index of the smallest width whose steps fit the budget, else of the fastest that fits."""
    best = -1
    best_us = NEVER
    for k in range(widths.shape[0]):
        if widths[k] > room:
            break
        if step_us[kind, k] < NEVER and steps * step_us[kind, k] <= budget + EPS:
            return k
        if step_us[kind, k] < best_us:
            best_us = step_us[kind, k]
            best = k
    return best


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
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
    text: Floats,
    left: Floats,
    vae: Floats,
    end: Floats,
    pace: Floats,
    choice: Ints,
    head: Ints,
    size: Ints,
    live: Ints,
) -> tuple[int, int]:
    """Who starts at t; rows that are off and over, or hopeless, leave."""
    w = 0
    for x in range(m):
        i = live[x]
        choice[i] = -1
        if end[i] > t:
            live[w] = i
            w += 1
            continue
        kind = int(jobs[i, KIND])
        budget = jobs[i, DEADLINE] - vae[i] - t
        if not on[i] or text[i] + left[i] * fastest_us[kind] > budget + EPS:
            continue
        live[w] = i
        w += 1
        head[i] = i
        size[i] = 1
        denoises = text[i] <= 0.0 and left[i] > 0.0
        pace[i] = budget / left[i] if denoises else 0.0
        if room > 0:
            if denoises:
                choice[i] = smallest(left[i], budget, room, kind, step_us, widths)
            else:
                choice[i] = 0
            if choice[i] >= 0:
                room -= widths[choice[i]]
        elif denoises and batch_us.shape[1] > 1:
            _join(i, kind, w, jobs, widths, batch_us, pace, choice, head, size, live)
    return w, room


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _join(
    i: int,
    kind: int,
    m: int,
    jobs: Floats,
    widths: Ints,
    batch_us: Floats,
    pace: Floats,
    choice: Ints,
    head: Ints,
    size: Ints,
    live: Ints,
) -> None:
    """Lets a job without a worker into the first batch of its kind where nobody gets late by it."""
    for x in range(m - 1):
        j = live[x]
        if choice[j] != 0 or head[j] != j or int(jobs[j, KIND]) != kind or pace[j] <= 0.0:
            continue
        if size[j] >= batch_us.shape[1] or widths[0] != 1:
            continue
        together_us = batch_us[kind, size[j]]
        if together_us <= min(pace[i], pace[j]):
            choice[i] = 0
            head[i] = j
            size[j] += 1
            pace[j] = min(pace[i], pace[j])
            return


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _widen(
    m: int,
    room: int,
    jobs: Floats,
    widths: Ints,
    step_us: Floats,
    text: Floats,
    left: Floats,
    choice: Ints,
    size: Ints,
    live: Ints,
) -> None:
    for x in range(m):
        i = live[x]
        if choice[i] < 0 or text[i] > 0.0 or left[i] <= 0.0 or size[i] > 1:
            continue
        kind = int(jobs[i, KIND])
        for k in range(choice[i] + 1, widths.shape[0]):
            more = widths[k] - widths[choice[i]]
            if more > room:
                break
            if step_us[kind, k] < step_us[kind, choice[i]]:
                room -= more
                choice[i] = k
        if room <= 0:
            return


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
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
    text: Floats,
    left: Floats,
    vae: Floats,
    end: Floats,
    held: Ints,
    choice: Ints,
    head: Ints,
    size: Ints,
    live: Ints,
) -> float:
    """Books what was allocated; the first end of a run."""
    for x in range(m):
        i = live[x]
        if choice[i] < 0:
            continue
        held[i] = widths[choice[i]] if head[i] == i else 0
        if text[i] > 0.0:
            end[i] = t + text[i]
            text[i] = 0.0
        elif left[i] > 0.0:
            kind = int(jobs[i, KIND])
            members = size[head[i]]
            one_us = step_us[kind, choice[i]]
            steps = 1.0
            if members > 1:
                one_us = batch_us[kind, members - 1]
            elif coarse > 0.0:
                steps = np.floor(coarse * (t - now) / one_us)
                steps = max(1.0, min(left[i], steps))
            end[i] = t + steps * one_us
            left[i] -= steps
        else:
            end[i] = t + vae[i]
            vae[i] = 0.0
        if end[i] < until:
            until = end[i]
    return until


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _settle(
    t: float,
    m: int,
    jobs: Floats,
    on: Ints,
    rules: Rules,
    text: Floats,
    left: Floats,
    vae: Floats,
    end: Floats,
    finish: Floats,
    live: Ints,
) -> tuple[int, float]:
    """Takes out who is done; what their deadlines are worth."""
    w = 0
    gained = 0.0
    for x in range(m):
        i = live[x]
        over = end[i] <= t and text[i] <= 0.0 and left[i] <= 0.0 and vae[i] <= 0.0
        if not over:
            live[w] = i
            w += 1
        elif on[i] and end[i] <= jobs[i, DEADLINE] + EPS:
            finish[i] = end[i]
            slack = min(rules.slack_sat_us, jobs[i, DEADLINE] - end[i])
            gained += jobs[i, WEIGHT] * 1e9 + rules.slack_worth * slack
    return w, gained
