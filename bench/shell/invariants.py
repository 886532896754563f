"""What must hold when the faults are over and things had time to settle.

Each check returns what it found wrong, as `Problem`s of a kind, so that many runs can be counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpuworker.mesh.naming import NameRefused
from hocket.errors import BrokerUnavailable

from .callers import NARROW
from .scenario_run import ScenarioRun
from .stories import ENDINGS, CallerEvent, Story
from .toy_model import STEP_US

SECOND_US = 1_000_000
GRACE_US = 10 * SECOND_US  # a request without followers is kept so long
SLACK_US = 5 * SECOND_US  # for noticing, deciding and stopping
WORKS_ON_US = 8 * SECOND_US  # the same where a worker's heartbeats have to show it: four and a bit
MAILBOX = 32  # events that a gateway keeps for a caller that does not read
_ON_ITS_WAY = 4  # between mailbox and connection
_REFUSALS = (
    "refused heartbeats",
    "refused reports",
    "refused messages",
    "undecodable messages",
)


@dataclass(frozen=True)
class Problem:
    """Something that must not be."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def check(run: ScenarioRun) -> list[Problem]:
    """All that is wrong with a run that is over."""
    return [problem for look in CHECKS for problem in look(run)]


def answered(run: ScenarioRun) -> Iterator[Problem]:
    """Whoever stayed learned exactly one end, or a refusal before anything was accepted."""
    for story in run.stories:
        endings = [t for t in story.told if t.kind in ENDINGS]
        kinds = {(t.request, t.kind) for t in endings}
        if len(kinds) > 1:
            yield Problem("two endings", f"{story.name}: {endings}")
        if not story.over:
            yield Problem("never answered", str(story))
        kinds_told = [t.kind for t in story.told if t.kind in ("refused", "accepted")]
        if kinds_told != sorted(kinds_told, reverse=True):
            yield Problem("refused after accepted", str(story))
        if story.lost and not run.faults:
            yield Problem("lost without a fault", str(story))
        if any(t.kind == "failed" for t in endings):
            yield Problem("failed", str(story))
        if story.behaviour != "cancel" and any(t.kind == "cancelled" for t in endings):
            yield Problem("cancelled without a cancel", str(story))


def one_request_a_key(run: ScenarioRun) -> Iterator[Problem]:
    """Callers with one key hear of one request, and of one end of it."""
    by_key: dict[str, list[Story]] = {}
    for story in run.stories:
        if story.key:
            by_key.setdefault(story.key, []).append(story)
    for key, stories in by_key.items():
        requests = {t.request for s in stories for t in s.told if t.request}
        made = {r for r in requests if not any(e.outcome == "cancelled" for e in run.ends(r))}
        if len(made) > 1:
            yield Problem("one key, several requests", f"{key}: {sorted(requests)}")
        moved = all(s.behaviour == "move" for s in stories)
        if len(requests) > 1 and run.calm and moved:
            yield Problem("lost while its caller moved", f"{key}: {sorted(requests)}")
        for request in requests:
            endings = {t.kind for s in stories for t in s.told if _is_end(t, request)}
            if len(endings) > 1:
                yield Problem("followers told different ends", f"{key}: {sorted(endings)}")


def typed(run: ScenarioRun) -> Iterator[Problem]:
    """Each status said what the matter was, and no gateway that lives dropped a caller."""
    for story in run.stories:
        for status in story.odd:
            yield Problem("odd status", f"{story}: {status}")
        ends = [f for f in run.faults if f.kind in ("kill", "terminate", "stop")]
        if story.dropped and not any(f.target.startswith("gateway") for f in ends):
            yield Problem("dropped after accepted", f"{story}: {story.dropped}")


def in_order(run: ScenarioRun) -> Iterator[Problem]:
    """Cursors rise, from one call to the one that goes on behind it too."""
    for story in run.stories:
        for chain in {t.chain for t in story.told if t.chain}:
            told = [t for t in story.told if t.chain == chain and t.cursor]
            if any(later.cursor <= now.cursor for now, later in itertools.pairwise(told)):
                shown = [(t.kind, t.cursor >> 32, t.cursor & 0xFFFFFFFF) for t in told]
                yield Problem("told twice or out of order", f"{story.name}: {shown}")
            steps = [int(t.detail) for t in told if t.kind == "progress" and t.detail]
            if run.calm and any(later < now for now, later in itertools.pairwise(steps)):
                yield Problem("steps went back", f"{story.name}: {steps}")


def stored(run: ScenarioRun) -> Iterator[Problem]:
    """What was told stands in the journal, once, and nothing stands there that never ended."""
    accepted, ended = run.accepted, run.ended
    for request, times in accepted.items():
        if len(times) > 1:
            yield Problem("accepted twice", request)
        if request not in ended:
            yield Problem("accepted, never ended", f"{request}: {_who(run, request)}")
    for request in sorted(run.incomplete):
        yield Problem("accepted without its defaults", f"{request}: {_who(run, request)}")
    for request, entries in ended.items():
        if len(entries) > 1:
            yield Problem("ended twice", f"{request}: {[e.outcome for e in entries]}")
    for story in run.stories:
        for told in story.told:
            if told.kind == "accepted" and told.request not in accepted:
                yield Problem("told accepted, not stored", str(story))
            if told.kind in ENDINGS and told.request:
                outcomes = [e.outcome for e in ended.get(told.request, ())]
                if told.kind not in outcomes:
                    yield Problem("told an end that is not stored", f"{story} {outcomes}")


def cancels_hold(run: ScenarioRun) -> Iterator[Problem]:
    """Whoever was told that a request is called off can rely on it: its end is stored by then."""
    for story in run.stories:
        ends = run.ended.get(story.request)
        told_us = story.cancelled_us
        if told_us is not None and (not ends or ends[0].at_us > told_us):
            yield Problem("a cancel was acknowledged before it was stored", str(story))


def one_leader(run: ScenarioRun) -> Iterator[Problem]:
    """Once a term has written, no earlier one does."""
    for before, after in itertools.pairwise(run.terms):
        if after < before:
            yield Problem("terms interleaved", f"{after} behind {before}")


def within_room(run: ScenarioRun) -> Iterator[Problem]:
    """Never more requests open at a time than control takes."""
    comes = [(times[0], 1) for times in run.accepted.values()]
    goes = [(e[0].at_us, -1) for r, e in run.ended.items() if r in run.accepted]
    inside = most = 0
    for _, change in sorted(comes + goes):
        inside += change
        most = max(most, inside)
    if most > run.world.open_max:
        yield Problem("more than there is room for", f"{most} of {run.world.open_max}")


def for_somebody(run: ScenarioRun) -> Iterator[Problem]:
    """A request without followers ends soon, and what has ended is not worked on."""
    followers: dict[str, list[Story]] = {}
    for story in run.stories:
        for name in {t.request for t in story.told if t.request}:
            followers.setdefault(name, []).append(story)
    for request in run.accepted:
        stories = followers.get(request, [])
        ends = run.ended.get(request)
        if not ends or any(s.behaviour == "forget" for s in stories):
            continue
        if all(s.left_us is not None for s in stories):
            alone_us = max([run.healed_us, *(s.left_us or 0 for s in stories)])
            if ends[0].at_us > alone_us + GRACE_US + SLACK_US and ends[0].outcome == "finished":
                yield Problem("made for nobody", request)
    for request, worked_us in run.world.work.at_us.items():
        ends = run.ended.get(request)
        if ends and worked_us > max(ends[0].at_us, run.healed_us) + WORKS_ON_US:
            yield Problem("work behind the end", request)


def drains_hold(run: ScenarioRun) -> Iterator[Problem]:
    """A worker that is drained gets nothing new, whoever leads and however often it restarts."""
    for worker, since_us, until_us in run.world.drained:
        for (name, term, sequence), at_us in run.assigned_us.items():
            if name == worker and since_us + SECOND_US < at_us < until_us:
                told = f"{worker} got assignment {sequence} of term {term} while it was drained"
                yield Problem("drain forgotten", told)


def strangers_refused(run: ScenarioRun) -> Iterator[Problem]:
    """What no door may take is refused and counted; of two workers with one name one works."""
    tally = run.world.tally
    if tally.taken:
        yield Problem("rogue call not refused", tally.taken)
    if not run.undisturbed:
        return
    counted = sum(count for what, count in run.troubles.items() if what in _REFUSALS)
    if counted < tally.heard:
        yield Problem("rogue payload not counted", f"{tally.heard} sent, {run.troubles}")
    for fault in run.faults:
        name = f"{fault.target} again"
        if fault.kind == "twin" and name not in {d.name for d in run.world.deaths}:
            yield Problem("two workers of one name", f"{name} was not refused")
    for (worker, term), turns in run.world.work.turns.items():
        if len(turns) > len(set(turns)):
            yield Problem("two workers of one name", f"{worker} in term {term}: {turns}")


def at_once(run: ScenarioRun) -> Iterator[Problem]:
    """Each of many who come together has an answer at once; who reads slowly costs a mailbox."""
    for story in run.stories:
        if story.behaviour == "burst" and run.undisturbed:
            first = next((t for t in story.told if t.kind in ("accepted", "refused")), None)
            if first is None or first.at_us > story.starts_us + SECOND_US:
                yield Problem("no answer at once", str(story))
        if story.woke_us is not None:
            until_us = story.woke_us + STEP_US
            waited = [t for t in story.told[1:] if t.at_us < until_us]
            if len(waited) > MAILBOX + NARROW + _ON_ITS_WAY:
                yield Problem("mailbox without a bound", f"{story}: {len(waited)} had waited")


def alive(run: ScenarioRun) -> Iterator[Problem]:
    """No process ended by itself, and no task died of what nobody expected."""
    for death in run.world.deaths:
        if isinstance(death.error, BrokerUnavailable):
            continue  # it says so where the broker is away when it starts, and is started again
        if isinstance(death.error, NameRefused) and _has_twin(run, death.name):
            continue
        yield Problem("died", f"{death.name} of {_named(death.error)}")
    for process in run.processes():
        for where, error in process.errors:
            yield Problem("unexpected error", f"{process.name} {where}: {_named(error)}")
    if run.world.immortal:
        yield Problem("immortal", f"{run.world.immortal} tasks of killed processes did not end")
    for where, error in run.world.loop.unowned:
        yield Problem("unexpected error", f"{where}: {_named(error)}")


def nothing_left(run: ScenarioRun) -> Iterator[Problem]:
    """All that grows with requests is back where it was before the first one."""
    for name, (before, after) in run.counts().items():
        if after > before:
            yield Problem("left over", f"{name}: {before} before, {after} after")


def nothing_held(run: ScenarioRun) -> Iterator[Problem]:
    """An artifact of a request that ended is held by nobody."""
    for worker, request, artifact in run.held:
        if request in run.ended:
            told = f"{artifact} of {request} ({_who(run, request)}) on {worker}"
            yield Problem("artifact of an ended request", told)


CHECKS: tuple[Callable[[ScenarioRun], Iterator[Problem]], ...] = (
    answered,
    one_request_a_key,
    typed,
    in_order,
    stored,
    cancels_hold,
    one_leader,
    within_room,
    for_somebody,
    drains_hold,
    strangers_refused,
    at_once,
    alive,
    nothing_left,
    nothing_held,
)


def _has_twin(run: ScenarioRun, worker: str) -> bool:
    """Whether another one of its name may have had it first."""
    first, _, again = worker.partition(" ")
    twins = any(f.kind == "twin" and f.target == first for f in run.faults)
    return bool(again) or (twins and not run.undisturbed)


def _is_end(told: CallerEvent, request: str) -> bool:
    return told.request == request and told.kind in ENDINGS


def _who(run: ScenarioRun, request: str) -> str:
    names = [s.name for s in run.stories if any(t.request == request for t in s.told)]
    return ", ".join(names) or "known to nobody"


def _named(error: BaseException | None) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
