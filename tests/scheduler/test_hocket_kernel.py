"""hocket's kernel, on pods small enough to play through by hand, and on many drawn ones."""

import json
import os
import subprocess
import sys

import pytest

from control.scheduler.policies.hocket.improve import BUSY, HOLD
from control.scheduler.policies.hocket.kernel import AGED, AVAIL, DEADLINE, NEVER, STEPS_LEFT
from control.scheduler.policies.hocket.search import smallest

from .small_pods import (
    LIMITS,
    decided,
    decisions,
    drawn,
    given_up,
    job,
    played,
    tables,
)

ONE = tables([1], [100])
TWO = tables([1, 2], [100, 60])
ODD = tables([1, 2, 4, 8], [100, 60, 40, 50])  # 8 is slower than 4
SEEDS = range(500)


# ------------------------------------------------------------------------------------ the rollout


def test_two_jobs_by_hand():
    """First: steps 0-100 and 100-200, decode. Second: encode 0-20, step 20-120, decode."""
    rows = [job(300, steps=2, vae=10), job(400, steps=1, text=20, vae=10)]
    finish, score, _ = played(rows, 2, TWO)
    assert finish == [210, 130]
    assert score == pytest.approx(2e9 + 0.001 * (90 + 270), abs=1e-5)


def test_one_worker_serves_the_earlier_deadline_first():
    rows = [job(200, steps=2), job(1000, steps=1)]
    assert played(rows, 1, ONE)[0] == [200, 300]
    assert played(rows[::-1], 1, ONE)[0] == [100, -1], "rows stand in the order they are served in"


def test_a_run_under_way_holds_its_workers_until_its_end():
    rows = [job(5000, steps=1, avail=70, width=1), job(5000, steps=1)]
    assert played(rows, 1, ONE)[0] == [170, 270]
    assert played(rows, 1, ONE, on=[0, 1])[0] == [-1, 170], "off: it holds, and does not go on"
    assert played(rows, 2, ONE)[0] == [170, 100]


def test_who_cannot_make_it_leaves_the_workers_to_others():
    rows = [job(250, steps=3), job(260, steps=2)]
    assert played(rows, 1, ONE)[0] == [-1, 200]


def test_slack_beyond_what_is_wanted_is_worth_nothing():
    scores = [played([job(d, steps=1)], 1, ONE)[1] for d in (100, 200_100, 250_100, 900_000)]
    assert scores[0] < scores[1] < scores[2] == scores[3]


def test_weight_is_what_a_deadline_is_worth():
    assert played([job(100, steps=1, weight=1.5)], 1, ONE)[1] == pytest.approx(1.5e9)


@pytest.mark.parametrize(
    ("budget", "room", "wanted"),
    [
        (1000, 8, 0),
        (999, 8, 1),
        (599, 8, 2),
        (399, 8, 2),  # nobody makes it: the fastest, which is not the widest
        (399, 2, 1),
        (10_000, 0, -1),
    ],
)
def test_the_smallest_width_that_makes_it_else_the_fastest_that_fits(budget, room, wanted):
    assert smallest(10.0, float(budget), room, 0, ODD.step_us, ODD.widths) == wanted


def test_a_width_that_a_kind_does_not_split_into_is_never_chosen():
    tab = tables([1, 2, 4], [100, NEVER, 40])
    for budget, wanted in ((1000, 0), (999, 2), (1, 2)):
        assert smallest(10.0, float(budget), 4, 0, tab.step_us, tab.widths) == wanted
    assert smallest(10.0, 1.0, 3, 0, tab.step_us, tab.widths) == 0


def test_free_workers_widen_only_to_what_is_faster():
    rows = [job(100_000, steps=3, vae=10)]
    assert played(rows, 8, ODD)[0] == [130], "degree 4, never 8"
    assert played(rows, 3, ODD)[0] == [190]
    assert played(rows, 8, tables([1, 2, 4, 8], [100, 60, 40, 30]))[0] == [100]


def test_the_first_in_deadline_order_is_widened_first():
    rows = [job(100_000, steps=1), job(200_000, steps=1)]
    assert played(rows, 3, TWO)[0] == [60, 100]


# ------------------------------------------------------------------------------------ batches


def together(us):
    return tables([1], [100], batch_us=[[100, us, us]])


def test_a_job_without_a_worker_joins_a_batch():
    rows = [job(500, steps=2, vae=10), job(600, steps=2, vae=10)]
    assert played(rows, 1, together(120))[0] == [250, 260]
    assert played(rows, 1, ONE)[0] == [210, 420]


def test_nobody_joins_who_would_make_a_member_late():
    rows = [job(215, steps=2, vae=10), job(600, steps=2, vae=10)]
    assert played(rows, 1, together(120))[0] == [210, 420], "102 us a step is all the first has"
    assert played(rows, 1, together(102))[0] == [214, 224]


def test_nobody_joins_who_would_be_late_himself():
    rows = [job(500, steps=2, vae=10), job(600, steps=5, vae=10)]
    assert played(rows, 1, together(119))[0] == [210, -1], "118 us a step is all the second has"
    assert played(rows, 1, together(115))[0] == [240, 550]


def test_only_one_kind_shares_a_batch_and_no_more_than_fit():
    two_kinds = tables([1], [100], [100], batch_us=[[100, 110], [100, 110]])
    rows = [job(500, steps=1), job(500, steps=1, kind=1), job(500, steps=1), job(500, steps=1)]
    assert played(rows, 1, two_kinds)[0] == [110, 210, 110, 310]


# ------------------------------------------------------------------------------------ giving up


def test_the_first_late_one_is_given_up_unless_one_worth_less_makes_room_for_it():
    """One worker: 100 due 110, 30 due 120, 30 due 130; the second is the first to be late."""
    tab = tables([1], [100], [30])
    rows = [job(110, steps=1), job(120, steps=1, kind=1), job(130, steps=1, kind=1)]
    assert given_up(rows, 1, tab)[0] == [1, 0, 1]
    assert given_up(rows, 2, tab)[0] == [1, 1, 1]
    worthy = [rows[0], job(120, steps=1, kind=1, weight=1.1), rows[2]]
    assert given_up(worthy, 1, tab)[0] == [0, 1, 1]
    assert given_up(worthy, 1, tab, LIMITS._replace(yielding=0))[0] == [1, 0, 1]


def test_nobody_is_given_up_in_vain_for_one_worth_more():
    tab = tables([1], [100], [30])
    rows = [job(30, steps=1, kind=1), job(120, steps=1, weight=1.5)]
    assert given_up(rows, 1, tab)[0] == [0, 1]
    rows = [job(30, steps=1, kind=1), job(60, steps=1, kind=1), job(125, steps=1, weight=1.5)]
    assert given_up(rows, 1, tab)[0] == [1, 1, 0], "two would have to go for it"


def test_the_hopeless_the_aged_and_those_without_a_deadline_are_never_on():
    rows = [job(-1, steps=1), job(99, steps=1), job(100, steps=1), job(900, steps=1, aged=5)]
    assert given_up(rows, 4, ONE)[0] == [0, 0, 1, 0]
    running = job(150, steps=1, avail=60, width=1)
    assert given_up([running], 1, ONE)[0] == [0], "it begins when its run is over"


@pytest.mark.parametrize("seed", SEEDS[::25])
def test_nobody_who_is_left_on_is_late(seed):
    pod = drawn(seed)
    on, _ = given_up(pod.rows, pod.gpus, pod.tab)
    finish, *_ = played(pod.rows, pod.gpus, pod.tab, on=on)
    assert all(f >= 0 for f, counted in zip(finish, on, strict=True) if counted)


# ------------------------------------------------------------------------------------ decisions


def workers(pod, decision, jobs=None):
    """Workers that a decision takes, of all jobs or of some."""
    taken = range(len(pod.rows)) if jobs is None else jobs
    heads = [i for i in taken if decision.choice[i] >= 0 and decision.head[i] == i]
    return sum(int(pod.tab.widths[decision.choice[i]]) for i in heads)


@pytest.mark.parametrize("passes", [0, 2])
def test_drawn_pods_are_decided_soundly(passes):
    limits = LIMITS._replace(passes=passes)
    held = batched = 0
    for seed in SEEDS:
        pod = drawn(seed)
        d = decided(pod.rows, pod.gpus, pod.free, pod.tab, limits, on=pod.on)
        n = range(len(pod.rows))
        counted = [i for i in n if d.on[i]]
        running = [i for i in n if pod.rows[i][AVAIL] > 0]
        assert all((d.choice[i] == BUSY) == (i in running) for i in n)
        assert workers(pod, d) <= pod.free, "no more than there are"
        assert not any(d.on[i] and pod.rows[i][AGED] for i in n)
        assert not any(d.on[i] and not pod.on[i] for i in n), "who was not considered stays off"
        if counted and not running:
            assert any(c >= 0 for c in d.choice), "somebody has to start"
        for i in n:
            if d.choice[i] < 0 or d.head[i] == i:
                continue
            first = d.head[i]
            batched += 1
            assert d.head[first] == first and d.choice[first] == d.choice[i] == 0
            assert pod.rows[i][0] == pod.rows[first][0] and pod.rows[i][STEPS_LEFT] > 0
        held += sum(d.choice[i] == HOLD for i in counted)
    assert held > 10 and (batched > 3 or not passes), "the drawn pods try what this is about"


def test_aged_best_effort_takes_its_workers_first_and_no_more():
    rows = [job(-1, steps=9, aged=5), job(-1, steps=9, aged=7), job(100, steps=1)]
    assert decided(rows, 1, 1, ONE).choice == [HOLD, 0, HOLD], "the longest waiting first"
    young = [job(-1, steps=9), job(-1, steps=9), job(100, steps=1)]
    assert decided(young, 1, 1, ONE).choice == [HOLD, HOLD, 0]
    none = LIMITS._replace(aged_workers=0)
    assert decided(rows, 1, 1, ONE, none).choice == [HOLD, HOLD, 0]
    running = [job(-1, steps=9, aged=5, avail=50, width=1), *rows[1:]]
    assert decided(running, 2, 1, ONE).choice == [BUSY, HOLD, 0], "it counts where it runs"


def test_best_effort_fills_with_short_steps_while_others_run():
    tab = tables([1, 2], [300_000, 140_000])
    late, running = job(-1, steps=3), job(9e9, steps=3, avail=50, width=1)
    assert decided([late, running], 4, 3, tab, on=[0, 1]).choice[0] == 1, "short enough at two"
    assert decided([late, running], 2, 1, tab, on=[0, 1]).choice[0] == HOLD
    slow = tables([1, 2], [300_000, 250_000])
    assert decided([late, running], 4, 3, slow, on=[0, 1]).choice[0] == HOLD
    assert decided([late], 4, 4, slow, on=[0]).choice == [1], "an empty pod takes its fastest"


def test_holding_the_wide_saves_the_urgent():
    """The base rule starts in deadline order; a step of 10,000 would block the newcomer."""
    tab = tables([1], [10_000], [100])
    rows = [job(10_500, steps=1, kind=1), job(10_200, steps=1)]
    rows.sort(key=lambda row: row[DEADLINE])
    decision = decided(rows, 1, 1, tab)
    assert decision.on == [1, 1] and decision.choice == [HOLD, 0]


def test_slack_counts_for_nothing_once_somebody_is_given_up():
    tab = tables([1], [10_000], [100])
    rows = [job(50, steps=1), job(10_200, steps=1), job(10_500, steps=1, kind=1)]
    decision = decided(rows, 1, 1, tab)
    assert decision.on == [0, 1, 1] and decision.choice[1:] == [0, HOLD], "in deadline order"
    assert decided(rows[1:], 1, 1, tab).choice == [HOLD, 0], "the urgent first, were it not for it"
    assert decided(rows, 1, 1, tab, saving=True).choice[1:] == [HOLD, 0], "where batches save much"
    rows[0] = job(-1, steps=1)
    assert decided(rows, 1, 1, tab).choice[1:] == [HOLD, 0], "who has no deadline is not given up"


def rollout_operations_max(pod):
    """At each instant all live jobs are looked at; each ends a run of somebody, or is the first."""
    return len(pod.rows) * (1 + sum(row[STEPS_LEFT] + 3 for row in pod.rows))


def test_operations_are_bounded():
    cut_off = 0
    for seed in SEEDS:
        pod = drawn(seed)
        for most in (1, 20, 100):
            limits = LIMITS._replace(operations_max=most)
            used = decided(pod.rows, pod.gpus, pod.free, pod.tab, limits, on=pod.on).operations
            # the last look at whom to give up and the last alternative may begin below the bound
            slack = (limits.yielding + 4) * rollout_operations_max(pod)
            assert used <= 2 * most + slack
        endless = LIMITS._replace(operations_max=10**9)
        all_of_it = decided(pod.rows, pod.gpus, pod.free, pod.tab, endless, on=pod.on).operations
        cut_off += all_of_it > used
    assert cut_off > 40, "the bound cuts something off"


def test_compiled_and_plain_python_decide_alike():
    here = json.loads(json.dumps(decisions(0, 60)))
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-m", "tests.scheduler.small_pods", "0", "60"]
    plain = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(plain.stdout) == here
    assert len({json.dumps(d) for d in here}) > 40
