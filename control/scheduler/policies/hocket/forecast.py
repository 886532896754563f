"""When would a newcomer be done? A rollout of its pod with it inside.

Not an estimate of a queue: the same future that the planner judges its own starts by, at safe step
times. It knows nothing of who comes later.
"""

from __future__ import annotations

import numpy as np

from ...ledger import Ledger
from ...values import Request
from .kernel import COLUMNS, DEADLINE, FINISH, Rules, rollout, scratch
from .pods import Pods
from .roster import RosterMaker

FAR_US = 1e15  # the deadline of who has none


def newcomer_finish_us(
    ledger: Ledger, pods: Pods, maker: RosterMaker, rules: Rules, request: Request, now_us: int
) -> int | None:
    """Finish in the pod that it would join; None if it would be late there, or nobody can."""
    pod = pods.best(request.model)
    if pod is None:
        return None
    roster = maker.make(ledger, pod, now_us, look=True)
    price = maker.price(ledger, pod, roster.widths, request)
    roster.prices.append(price)
    row = np.zeros(COLUMNS)
    deadline_us = FAR_US if request.deadline_us is None else float(request.deadline_us)
    row[:8] = (
        len(roster.prices) - 1,
        price.text_us,
        request.steps,
        price.vae_us,
        deadline_us,
        now_us,
        0.0,
        1.0,
    )
    at = int(np.searchsorted(roster.jobs[:, DEADLINE], deadline_us, side="right"))
    jobs = np.insert(roster.jobs, at, row, axis=0)
    on = np.array([e.hopeful for e in roster.entries], np.int64)
    on = np.insert(on, at, 1)
    space = scratch(len(jobs))
    rollout(float(now_us), len(pod.workers), jobs, on, roster.tables(), rules, space)
    finish_us = space.floats[FINISH, at]
    return int(finish_us) if finish_us > 0 else None
