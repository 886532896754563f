"""GENSERVE's pictures: batches of one resolution on one worker each, by deadline.

    queue, earliest deadline first ── first of it opens a batch ── same resolution joins while all
    members of the larger batch are on time ── next batch …        then, likewise, those too late

arXiv 2604.04335v1, sections 4.3 (batching) and 4.4 (B*(g), the best plan on g workers: here the
first g batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..values import Request
from ..workflow import Section

if TYPE_CHECKING:
    from ..outlook.scene import Scene, Work

NEVER_US = 1 << 62


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures to run together; all begin with the same node."""

    works: tuple[Work, ...]
    on_time: bool
    score: float  # f_img: sum of 1 / (1 + slack in seconds)


@dataclass(frozen=True, slots=True)
class ImageRules:
    """What the paper leaves open about batches."""

    batch_max: int  # 0: as many as the workers take
    wait_us: int  # longest wait for company, while slack permits


def deadline_us(request: Request) -> int:
    return NEVER_US if request.deadline_us is None else request.deadline_us


def batch_us(scene: Scene, work: Work, batch: int) -> int:
    """T_img: what is left of a batch of such pictures, on one worker."""
    request = work.request
    left_us = scene.after_us(request, batch)
    if work.section is not Section.AFTER:
        left_us += request.steps * scene.step_us(request, 1, batch)
    if work.section is Section.BEFORE:
        left_us += scene.before_us(request, batch)
    return left_us


def batches(scene: Scene, works: Sequence[Work], rules: ImageRules, most: int) -> list[Batch]:
    """At most that many batches: those in which all are on time, then those too late."""
    queue = sorted(works, key=lambda w: (-w.request.priority, deadline_us(w.request), w.order))
    now_us = scene.now_us
    late = [w for w in queue if now_us + batch_us(scene, w, 1) > deadline_us(w.request)]
    names = {w.id for w in late}
    timely = [w for w in queue if w.id not in names]
    found: list[Batch] = []
    for some, on_time in ((timely, True), (late, False)):
        while some and len(found) < most:
            members = _fill(scene, some, rules, on_time)
            if on_time and _waits(scene, members, rules):
                some = [w for w in some if w not in members]
                continue
            found.append(Batch(tuple(members), on_time, _score(scene, members)))
            some = [w for w in some if w not in members]
    return found


def waits_until_us(scene: Scene, works: Sequence[Work], rules: ImageRules) -> int | None:
    """When the first of them has waited for company long enough."""
    if not rules.wait_us:
        return None
    ends = [w.arrived_us + rules.wait_us for w in works]
    return min((e for e in ends if e > scene.now_us), default=None)


def _fill(scene: Scene, queue: Sequence[Work], rules: ImageRules, on_time: bool) -> list[Work]:
    """The first of the queue and whoever can join it."""
    first = queue[0]
    limit = scene.batch_max(first.request, first.node)
    if rules.batch_max:
        limit = min(limit, rules.batch_max)
    members = [first]
    for work in queue[1:]:
        if len(members) >= limit:
            break
        if not alike(work, first):
            continue
        end_us = scene.now_us + batch_us(scene, first, len(members) + 1)
        if not on_time or all(end_us <= deadline_us(m.request) for m in (*members, work)):
            members.append(work)
    return members


def alike(a: Work, b: Work) -> bool:
    """May share a batch."""
    ra, rb = a.request, b.request
    key = (ra.model, ra.shape, ra.steps, ra.workflow, a.node, a.first_step, a.company)
    return key == (rb.model, rb.shape, rb.steps, rb.workflow, b.node, b.first_step, b.company)


def _waits(scene: Scene, members: Sequence[Work], rules: ImageRules) -> bool:
    """Not full, nobody has waited long, and one more could still be served in time."""
    first = members[0]
    limit = min(rules.batch_max or NEVER_US, scene.batch_max(first.request, first.node))
    if not rules.wait_us or len(members) >= limit:
        return False
    oldest_us = min(m.arrived_us for m in members)
    latest_us = min(deadline_us(m.request) for m in members)
    until_us = oldest_us + rules.wait_us
    return scene.now_us < until_us <= latest_us - batch_us(scene, first, len(members) + 1)


def _score(scene: Scene, members: Sequence[Work]) -> float:
    end_us = scene.now_us + batch_us(scene, members[0], len(members))
    slack = [max(0, deadline_us(m.request) - end_us) for m in members]
    return sum(1 / (1 + s / 1e6) for s in slack)
