"""The live shell in simulated time: a slice of the seeds, and what they find where it is broken.

The whole of it: `python -m bench shell --seeds 0-9999 --jobs 2`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from bench.shell.awaits import SITES, courses
from bench.shell.command import play_all
from bench.shell.scenario import BEGIN_US, Script, SeedResult, perform
from bench.shell.stories import draw_burst, draw_slow
from control import admission, desk
from control.admission import AdmissionControl
from control.entrance import servicer
from control.requests.endings import Endings
from control.requests.records import Record, ending_event
from control.workers import intake
from control.workers.leases import Leases
from gateway import follower
from hocket.messaging.stores import AppendCondition, Log
from hocket.v1 import journal_pb2

SLICE = 80
AWAITED = tuple(
    p for p in SITES if p.coroutine in ("ServerCall._serve", "AdmissionControl.", "Endings.")
)


def told(results: Iterable[SeedResult]) -> str:
    return "\n".join(
        f"seed {v.seed} {v.faults}: {'; '.join(map(str, v.problems))}"
        for v in results
        if v.problems
    )


@pytest.mark.parametrize("first", range(0, SLICE, 40))
def test_nothing_is_wrong_with_a_slice(first: int) -> None:
    results = play_all(list(range(first, first + 40)), ())
    assert not told(results), told(results)
    assert sum(v.requests for v in results) > 100


def test_a_seed_tells_the_same_story_twice() -> None:
    once, again, other = play_all([2, 2, 3], ())
    assert once.digest == again.digest != other.digest


def test_nothing_goes_wrong_at_some_awaits() -> None:
    found = {}
    for what, result in courses(AWAITED, every=4, most=1):
        found[what] = told([result])
    assert len(found) > 15
    assert not any(found.values()), {what: told for what, told in found.items() if told}


def is_found(wrong: set[str], seeds: range, kinds: tuple[str, ...] = ()) -> bool:
    """Whether one of the seeds shows one of these problems."""
    results = (play_all([seed], kinds)[0] for seed in seeds)
    return any(problem.kind in wrong for result in results for problem in result.problems)


def test_a_leader_without_a_fence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    append = Log.append

    async def unguarded(self: Log, subject: str, data: bytes, **options: Any) -> int:
        if ".promise.request." in subject and isinstance(options.get("guard"), AppendCondition):
            options["guard"] = None
        return await append(self, subject, data, **options)

    kinds = ("stop", "broker held from")
    monkeypatch.setattr(Log, "append", unguarded)
    assert is_found({"terms interleaved", "accepted twice"}, range(104, 112), kinds)


def test_callers_without_a_grace_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    followers = desk.Followers
    monkeypatch.setattr(desk, "Followers", lambda grace_us: followers(0))
    wrong = {"lost while its caller moved", "cancelled without a cancel"}
    assert is_found(wrong, range(25))


def test_a_cancel_that_is_acknowledged_before_its_end_is_stored_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hasty(self: Endings, record: Record) -> None:
        """As control answered at first."""

    monkeypatch.setattr(Endings, "over", hasty)
    assert is_found({"a cancel was acknowledged before it was stored"}, range(9, 14))


def test_an_ending_told_before_it_is_stored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hasty(self: Endings, record: Record, ended: journal_pb2.EndedRequest) -> None:
        self._tell(self._records.end(record.id, ending_event(ended), 1))

    monkeypatch.setattr(Endings, "_end", hasty)
    assert is_found({"told an end that is not stored"}, range(5))


@pytest.mark.parametrize("check", ["check_heartbeat", "check_report"])
def test_a_door_that_takes_anything_is_found(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    monkeypatch.setattr(intake, check, lambda message, term: None)
    assert is_found({"rogue payload not counted"}, range(10), ("rogue",))


def test_submits_that_nobody_checks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (admission, servicer):
        monkeypatch.setattr(module, "check_submit", lambda submit: ())
    assert is_found({"rogue call not refused"}, range(10), ("rogue",))


def test_two_workers_of_one_name_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leases, "refused", lambda self, beat: None)
    assert is_found({"two workers of one name"}, range(5), ("twin",))


def test_a_burst_without_answers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _burst().problems
    offer = AdmissionControl.offer

    def silent(self: AdmissionControl, submit: Any, answered: Any, **options: Any) -> None:
        def unless_full(response: Any, known: bool) -> None:
            if response.rejected.reason != "QUEUE_FULL":
                answered(response, known)

        offer(self, submit, unless_full, **options)

    monkeypatch.setattr(AdmissionControl, "offer", silent)
    assert "no answer at once" in {problem.kind for problem in _burst().problems}


def _burst() -> SeedResult:
    stories = draw_burst(random.Random(1), BEGIN_US)
    return perform(1, Script(stories, [], "edf", workers=2, open_max=3))


def test_a_mailbox_without_a_bound_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _slow().problems
    monkeypatch.setattr(follower, "BACKLOG_MAX", 1_000)
    assert {"mailbox without a bound"} == {problem.kind for problem in _slow().problems}


def _slow() -> SeedResult:
    return perform(1, Script([draw_slow(random.Random(1), BEGIN_US)], [], "edf", workers=2))
