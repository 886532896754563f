"""The decision of one pod: whom to serve on time, what starts now, what fills the rest.

    give up ──▶ base start ──▶ improve ──▶ fill
    (jointly, by rollouts)     (one start differently, by rollouts)   (best effort, short steps)

Compiled (numba); bounded by `operations_max`: when they are spent, what stands is kept, and who is
late is held to its deadline or given up together with others, so that a few more rollouts end it.
"""

from __future__ import annotations

from numba import njit

from .guards import spend_guards
from .improve import BUSY, HOLD, Limits, Start, denoises, improve
from .kernel import (
    AGED,
    AVAIL,
    DEADLINE,
    EPS,
    FINISH,
    GUARD,
    KEPT,
    KIND,
    NEVER,
    PROMISED_WORTH,
    STEPS_LEFT,
    TEXT_LEFT,
    VAE_LEFT,
    WEIGHT,
    WIDTH,
    Floats,
    Ints,
    Rules,
    Scratch,
    Tables,
    rollout,
    smallest,
)


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def decide(
    now: float,
    gpus: int,
    free: int,
    jobs: Floats,
    on: Ints,
    move_us: Floats,
    tab: Tables,
    rules: Rules,
    saving: bool,
    limits: Limits,
    trial: Floats,
    start: Start,
    s: Scratch,
) -> int:
    """Fills `on` and `start` (choice, head). Operations that it took.

    Once somebody is given up there is no slack to share out, it would only be moved around; unless
    batches are `saving` much: those are found by it.
    """
    n = jobs.shape[0]
    for i in range(n):
        start.head[i] = i
        start.choice[i] = HOLD if jobs[i, AVAIL] <= now else BUSY
    operations = give_up(now, gpus, jobs, on, tab, rules, limits, s)
    for i in range(n):
        if not saving and not on[i] and jobs[i, DEADLINE] >= 0.0:
            rules = Rules(rules.slack_sat_us, 0.0, rules.coarseness)
    room = _aged(now, free, jobs, on, tab, limits, start)
    _base(now, room, jobs, on, tab, start)
    operations += improve(
        now, gpus, room, jobs, on, move_us, tab, rules, limits, operations, trial, start, s
    )
    _fill(gpus, free, jobs, on, tab, limits, start)
    return operations


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def give_up(
    now: float,
    gpus: int,
    jobs: Floats,
    on: Ints,
    tab: Tables,
    rules: Rules,
    limits: Limits,
    s: Scratch,
) -> int:
    """Of those that are `on`, turns off the hopeless, and others until the rest are on time.

    At the first job that gets late in a rollout, it goes; or one that is worth less and not due
    later, where that leaves a better rollout.
    """
    operations = 0
    relaxed = 0
    wanted = 0
    for i in range(jobs.shape[0]):
        begin = max(now, jobs[i, AVAIL])
        fastest = jobs[i, STEPS_LEFT] * tab.fastest_us[int(jobs[i, KIND])]
        need = jobs[i, TEXT_LEFT] + fastest + jobs[i, VAE_LEFT]
        hopeless = jobs[i, AGED] > 0.0 or begin + need > jobs[i, DEADLINE] + jobs[i, GUARD] + EPS
        on[i] = 0 if hopeless else on[i]
        wanted += on[i]
    while wanted > 0:
        _, used = rollout(now, gpus, jobs, on, tab, rules, s)
        operations += used
        late = _first_late(on, s)
        if late < 0:
            break
        if jobs[late, GUARD] > 0.0:
            spent = operations >= limits.operations_max
            relaxed += spend_guards(late, relaxed, spent, jobs, on, s)
            continue
        if operations >= 2 * limits.operations_max:
            if not _cut(late, jobs, on, s):
                break
        elif jobs[late, WEIGHT] >= PROMISED_WORTH:
            tries = limits.yielding if operations < limits.operations_max else 1
            operations += _make_room(now, gpus, late, jobs, on, tab, rules, tries, s)
        elif operations >= limits.operations_max:
            on[late] = 0
        else:
            operations += _drop_one(now, gpus, late, jobs, on, tab, rules, limits, s)
        wanted -= 1
    return operations


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _make_room(
    now: float,
    gpus: int,
    late: int,
    jobs: Floats,
    on: Ints,
    tab: Tables,
    rules: Rules,
    tries: int,
    s: Scratch,
) -> int:
    """Gives up one that nothing was promised, where that can save `late`, which was; else `late`.

    One at a time: the caller asks again. Of the few with the most work left, the one whose going
    leaves the best rollout.
    """
    n = jobs.shape[0]
    kept = s.ints[KEPT]
    for i in range(n):
        kept[i] = on[i]
        if jobs[i, WEIGHT] < PROMISED_WORTH:
            on[i] = 0
    _, operations = rollout(now, gpus, jobs, on, tab, rules, s)
    saved = s.floats[FINISH, late] >= 0.0
    for i in range(n):
        on[i] = kept[i]
    best = late
    best_score = -1.0
    below = NEVER
    for _ in range(max(1, tries) if saved else 0):
        i = _most_unpromised(below, jobs, on, tab)
        if i < 0:
            break
        below = _work_us(jobs, i, tab)
        score, used = _without(i, now, gpus, jobs, on, tab, rules, s)
        operations += used
        if score > best_score:
            best_score = score
            best = i
    on[best] = 0
    return operations


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _cut(late: int, jobs: Floats, on: Ints, s: Scratch) -> bool:
    """Gives up many at once: all who are late and were promised nothing; where one who was is the
    first, all whom nothing was promised; where only such are left, all who are late. Whether
    another rollout has to say what became of the promised.
    """
    firm = jobs[late, WEIGHT] >= PROMISED_WORTH
    others = firm and _any_unpromised(jobs, on)
    again = others
    for i in range(on.shape[0]):
        promised = jobs[i, WEIGHT] >= PROMISED_WORTH
        is_late = s.floats[FINISH, i] < 0.0
        if others:
            on[i] = on[i] if promised else 0
        elif is_late and (firm or not promised):
            on[i] = 0
        elif is_late and on[i]:
            again = True
    return again


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _any_unpromised(jobs: Floats, on: Ints) -> bool:
    for i in range(on.shape[0]):  # noqa: SIM110 (no generators here)
        if on[i] and jobs[i, WEIGHT] < PROMISED_WORTH:
            return True
    return False


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _most_unpromised(below: float, jobs: Floats, on: Ints, tab: Tables) -> int:
    """Of those that nothing was promised, the one with the most work under `below`; -1: none."""
    found = -1
    most = -1.0
    for i in range(jobs.shape[0]):
        work = _work_us(jobs, i, tab)
        if on[i] and jobs[i, WEIGHT] < PROMISED_WORTH and most <= work < below:
            most = work
            found = i
    return found


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _first_late(on: Ints, s: Scratch) -> int:
    for i in range(on.shape[0]):
        if on[i] and s.floats[FINISH, i] < 0.0:
            return i
    return -1


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _drop_one(
    now: float,
    gpus: int,
    late: int,
    jobs: Floats,
    on: Ints,
    tab: Tables,
    rules: Rules,
    limits: Limits,
    s: Scratch,
) -> int:
    """Gives up `late`, or one of those worth less and due no later, the most work left first."""
    operations = 0
    best = late
    lighter = _most_work(late, NEVER, jobs, on, tab)
    if lighter >= 0:
        best_score, operations = _without(late, now, gpus, jobs, on, tab, rules, s)
        for _ in range(limits.yielding):
            score, used = _without(lighter, now, gpus, jobs, on, tab, rules, s)
            operations += used
            if score > best_score:
                best_score = score
                best = lighter
            lighter = _most_work(late, _work_us(jobs, lighter, tab), jobs, on, tab)
            if lighter < 0:
                break
    on[best] = 0
    return operations


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _without(
    i: int, now: float, gpus: int, jobs: Floats, on: Ints, tab: Tables, rules: Rules, s: Scratch
) -> tuple[float, int]:
    """Score of the rollout without job i, and its operations."""
    on[i] = 0
    score, used = rollout(now, gpus, jobs, on, tab, rules, s)
    on[i] = 1
    return score, used


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _work_us(jobs: Floats, i: int, tab: Tables) -> float:
    return jobs[i, STEPS_LEFT] * tab.step_us[int(jobs[i, KIND]), 0] + jobs[i, VAE_LEFT]


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _most_work(late: int, below: float, jobs: Floats, on: Ints, tab: Tables) -> int:
    """Of those worth less than `late` and due no later, the one with the most work under `below`.

    Ties go to the earlier deadline. -1: there is none.
    """
    found = -1
    most = -1.0
    for i in range(late):
        work = _work_us(jobs, i, tab)
        if on[i] and jobs[i, WEIGHT] < jobs[late, WEIGHT] and most < work < below:
            most = work
            found = i
    return found


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _aged(
    now: float,
    free: int,
    jobs: Floats,
    on: Ints,
    tab: Tables,
    limits: Limits,
    start: Start,
) -> int:
    """Best effort that has waited too long goes first, on few workers. What is left of `free`."""
    room = free
    allowed = limits.aged_workers
    for i in range(jobs.shape[0]):
        if jobs[i, AGED] > 0.0 and start.choice[i] == BUSY:
            allowed -= int(jobs[i, WIDTH])
    while room > 0 and allowed > 0:
        first = -1
        for i in range(jobs.shape[0]):
            waits = jobs[i, AGED] > 0.0 and start.choice[i] == HOLD
            if waits and (first < 0 or jobs[i, AGED] > jobs[first, AGED]):
                first = i
        if first < 0:
            break
        start.choice[first] = 0
        room -= tab.widths[0]
        allowed -= tab.widths[0]
    return room


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _base(now: float, room: int, jobs: Floats, on: Ints, tab: Tables, start: Start) -> None:
    """The base rule's start at this instant."""
    n = jobs.shape[0]
    for i in range(n):
        if room <= 0 or start.choice[i] != HOLD or not on[i]:
            continue
        k = 0
        if denoises(jobs, i):
            budget = jobs[i, DEADLINE] - jobs[i, VAE_LEFT] - now
            kind = int(jobs[i, KIND])
            k = smallest(jobs[i, STEPS_LEFT], budget, room, kind, tab.step_us, tab.widths)
        if k >= 0:
            start.choice[i] = k
            room -= tab.widths[k]
    for i in range(n):
        if start.choice[i] < 0 or not on[i] or not denoises(jobs, i):
            continue
        steps = tab.step_us[int(jobs[i, KIND])]
        for k in range(start.choice[i] + 1, tab.widths.shape[0]):
            more = tab.widths[k] - tab.widths[start.choice[i]]
            if more > room:
                break
            if steps[k] < steps[start.choice[i]]:
                room -= more
                start.choice[i] = k


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _fill(
    gpus: int, free: int, jobs: Floats, on: Ints, tab: Tables, limits: Limits, start: Start
) -> None:
    """Best effort on what is left: narrow, and only with steps that are soon over.

    A pod that has nothing else to do runs any of it, at its fastest.
    """
    room = free
    for i in range(jobs.shape[0]):
        if start.choice[i] >= 0 and start.head[i] == i:
            room -= tab.widths[start.choice[i]]
    for i in range(jobs.shape[0]):
        if start.choice[i] != HOLD or on[i] or room <= 0:
            continue
        if not denoises(jobs, i):
            start.choice[i] = 0
            room -= 1
            continue
        kind = int(jobs[i, KIND])
        for k in range(tab.widths.shape[0]):
            if tab.widths[k] > room:
                break
            enough = tab.step_us[kind, k] <= limits.fill_step_us
            if enough or (room == gpus and tab.step_us[kind, k] == tab.fastest_us[kind]):
                start.choice[i] = k
                room -= tab.widths[k]
                break
