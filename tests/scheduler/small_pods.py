"""Pods for the kernel, written by hand or drawn by a seed, and the calls that the planner makes.

`python -m tests.scheduler.small_pods SEED COUNT` prints the decisions of as many pods as JSON: with
NUMBA_DISABLE_JIT in its environment, those of the same code uncompiled.
"""

import json
import random
import sys
from typing import NamedTuple

import numpy as np

from control.scheduler.policies.hocket.improve import Limits, Start, start_space
from control.scheduler.policies.hocket.kernel import (
    COLUMNS,
    FINISH,
    NEVER,
    Rules,
    Tables,
    rollout,
    scratch,
)
from control.scheduler.policies.hocket.search import decide, give_up

EXACT = Rules(slack_sat_us=250_000.0, slack_worth=0.001, coarseness=0.0)
LIMITS = Limits(
    passes=2, yielding=6, operations_max=200_000, fill_step_us=145_000.0, aged_workers=1
)


class Decision(NamedTuple):
    """What the kernel made of a pod."""

    on: list[int]
    choice: list[int]
    head: list[int]
    operations: int
    finish: list[float]  # of the rollout that its last evaluation made


def job(deadline, steps=0, kind=0, text=0, vae=0, avail=0, width=0, weight=1.0, aged=0, guard=0):
    """A row of the job matrix."""
    columns = (kind, text, steps, vae, deadline, avail, width, weight, aged, guard)
    assert len(columns) == COLUMNS
    return tuple(float(c) for c in columns)


def tables(widths, *step_us, batch_us=None):
    """Prices by kind; without batch rows nobody batches."""
    steps = np.array(step_us, dtype=float)
    batches = steps[:, :1].copy() if batch_us is None else np.array(batch_us, dtype=float)
    return Tables(np.array(widths, np.int64), steps, batches, steps.min(axis=1))


def matrix(rows):
    return np.array(rows, dtype=float).reshape(len(rows), COLUMNS)


def played(rows, gpus, tab, on=None, now=0.0, rules=EXACT):
    """Finishes by job (-1: not on time), score and operations of one rollout."""
    n = len(rows)
    space = scratch(n)
    counted = np.array([1] * n if on is None else on, np.int64)
    score, operations = rollout(float(now), gpus, matrix(rows), counted, tab, rules, space)
    return space.floats[FINISH].tolist(), score, operations


def given_up(rows, gpus, tab, limits=LIMITS, now=0.0):
    """Who is still `on`, and the operations."""
    on = np.ones(len(rows), np.int64)
    space = scratch(len(rows))
    used = give_up(float(now), gpus, matrix(rows), on, tab, EXACT, limits, space)
    return on.tolist(), used


def decided(
    rows, gpus, free, tab, limits=LIMITS, now=0.0, rules=EXACT, saving=False, on=None, move_us=0.0
):
    """One decision, with the work space laid out as the planner's."""
    n, room = len(rows), 2 * len(rows) + 1
    counted = np.array([1] * n if on is None else on, np.int64)
    moves = np.zeros((room, 16))[:n, : len(tab.widths)]
    moves[:] = move_us
    start = Start(*(a[:n] for a in start_space(room)))
    space = scratch(room)
    trial = np.zeros((room, COLUMNS))
    operations = decide(
        float(now),
        gpus,
        free,
        matrix(rows),
        counted,
        moves,
        tab,
        rules,
        saving,
        limits,
        trial,
        start,
        space,
    )
    finish = space.floats[FINISH, :n].tolist()
    return Decision(
        counted.tolist(), start.choice.tolist(), start.head.tolist(), operations, finish
    )


class Pod(NamedTuple):
    """Arguments of `decided`."""

    rows: list[tuple[float, ...]]
    gpus: int
    free: int
    tab: Tables
    on: list[int]


def drawn(seed):
    """A pod with running, waiting, aged and given-up jobs of two kinds, one that batches."""
    dice = random.Random(seed)
    gpus = dice.choice((1, 1, 2, 4, 5, 8))
    widths = [w for w in (1, 2, 4, 8) if w <= gpus]
    step_us = [[one, *(one * dice.uniform(0.4, 1.2) for _ in widths[1:])] for one in (9e4, 2e4)]
    if gpus > 1 and dice.random() < 0.3:
        step_us[0][dice.randrange(1, len(widths))] = NEVER
    tab = tables(widths, *step_us, batch_us=[[9e4, NEVER, NEVER], [2e4, 2.4e4, 3e4]])
    busy, rows = gpus, []
    for _ in range(dice.randint(1, 7)):
        kind = int(dice.random() < 0.7)
        text = dice.choice((0, 0, 0, 9_000))
        steps = dice.randint(1, 5) if text else dice.randint(0, 5)
        alone = text + 3_000 + max(1, steps) * min(step_us[kind])
        width = dice.choice((0, 0, 0, *widths))
        runs = 0 < width <= busy
        busy -= width if runs else 0
        avail = dice.randint(1, 100_000) if runs else 0
        aged = 0 if runs else dice.choice((0, 0, 0, 0, 0, 400_000_000))
        deadline = avail + alone * dice.uniform(0.9, 5.0)
        weight = 1.0 + 0.1 * dice.randint(0, 2)
        rows.append(job(deadline, steps, kind, text, 3_000, avail, width * runs, weight, aged))
    rows.sort(key=lambda row: row[4])
    on = [int(dice.random() < 0.95) for _ in rows]
    return Pod(rows, gpus, busy, tab, on)


def decisions(seed, count):
    return [decided(p.rows, p.gpus, p.free, p.tab, on=p.on) for p in map(drawn, range(seed, count))]


if __name__ == "__main__":
    print(json.dumps(decisions(int(sys.argv[1]), int(sys.argv[2]))))
