"""Guards: what is kept in hand of a firm promise's time, and how it is spent.

A job that cannot keep its guard is held to its deadline. The first that is late goes first, since
that may save those behind it: a rollout for each. Many guards would cost many rollouts. So beyond
`operations_max` all who are late go together, with the next ones in deadline order where they are
fewer than went before: the number at least doubles with each rollout, so a few are enough.

Compiled (numba).
"""

from __future__ import annotations

from numba import njit

from .kernel import DEADLINE, FINISH, GUARD, Floats, Ints, Rules, Scratch, Tables, rollout


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def relax(
    now: float,
    gpus: int,
    jobs: Floats,
    on: Ints,
    tab: Tables,
    rules: Rules,
    operations_max: int,
    s: Scratch,
) -> tuple[int, int]:
    """Holds to its deadline who cannot keep its guard, as `give_up` does, and gives up nobody.
    How many, and operations: `operations_max` and a few rollouts at most. FINISH tells of each job.
    """
    relaxed = 0
    _, operations = rollout(now, gpus, jobs, on, tab, rules, s)
    for _ in range(jobs.shape[0]):
        late = _first_guarded(jobs, on, s)
        if late < 0:
            break
        relaxed += spend_guards(late, relaxed, operations >= operations_max, jobs, on, s)
        _, used = rollout(now, gpus, jobs, on, tab, rules, s)
        operations += used
    return relaxed, operations


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def spend_guards(late: int, before: int, spent: bool, jobs: Floats, on: Ints, s: Scratch) -> int:
    """Holds `late` to its deadline; where the budget is `spent`, all who are late in the last
    rollout, and at least as many as `before`, while there are any. How many.
    """
    n = on.shape[0]
    relaxed = 0
    for i in range(n):
        is_late = s.floats[FINISH, i] < 0.0
        if i == late or (spent and on[i] and jobs[i, GUARD] > 0.0 and is_late):
            _spend(i, jobs)
            relaxed += 1
    for more in range(1, n if spent else 0):
        i = (late + more) % n
        if relaxed >= before:
            break
        if on[i] and jobs[i, GUARD] > 0.0:
            _spend(i, jobs)
            relaxed += 1
    return relaxed


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _spend(i: int, jobs: Floats) -> None:
    jobs[i, DEADLINE] += jobs[i, GUARD]
    jobs[i, GUARD] = 0.0


@njit(cache=True, nogil=True, _nrt=False)  # type: ignore[untyped-decorator]
def _first_guarded(jobs: Floats, on: Ints, s: Scratch) -> int:
    for i in range(on.shape[0]):
        if on[i] and jobs[i, GUARD] > 0.0 and s.floats[FINISH, i] < 0.0:
            return i
    return -1
