"""`bench chaos`: what it draws, what it compares, and that its checks see planted violations."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from bench.chaos import faults, wishes
from bench.chaos.calls_made import MadeCall, again, by_node, needless
from bench.chaos.checks import OPEN, Leftovers, Written, all_checks, nothing_left
from bench.chaos.faults import ChaosFault, draw
from bench.chaos.history import (
    CANCELLED,
    FAILED,
    FINISHED,
    GIVEN_UP,
    QUIT,
    History,
    ObservedCall,
    Struck,
    by_kind,
)
from bench.chaos.ledger import journalled, promised
from bench.chaos.pictures import EQUAL, NEAR, compare
from hocket.v1.control_pb2 import SubmitRequest
from hocket.v1.generation_pb2 import Finished, GenerateRequest
from hocket.v1.journal_pb2 import AcceptedRequest, EndedRequest, JournalEntry, Promise

SECONDS = 600.0


@pytest.mark.parametrize("seed", range(20))
def test_faults_of_one_target_leave_it_time_to_come_back(seed: int) -> None:
    drawn = draw(seed, SECONDS, faults.TARGETS, (4.0, 9.0))
    assert drawn == draw(seed, SECONDS, faults.TARGETS, (4.0, 9.0))
    assert len(drawn) > 40 and {f.target for f in drawn} == set(faults.TARGETS)
    assert [f.at_s for f in drawn] == sorted(f.at_s for f in drawn)
    assert all(f.at_s + f.span_s <= SECONDS + 0.01 for f in drawn)
    groups = [("leader", "standby"), *((t,) for t in faults.TARGETS)]
    for group in groups:
        own = [f for f in drawn if f.target in group]
        for before, after in itertools.pairwise(own):
            assert after.at_s > before.at_s + before.span_s + 7.0


def test_other_seeds_draw_other_faults_and_calls() -> None:
    assert draw(0, SECONDS, faults.TARGETS, (4, 9)) != draw(1, SECONDS, faults.TARGETS, (4, 9))
    wanted = wishes.catalogue((64, 128), 12)
    first, again, other = (wishes.Errands(seed, wanted) for seed in (0, 0, 1))
    calls = [first.next() for _ in range(200)]
    assert calls == [again.next() for _ in range(200)]
    assert [c.wish for c in calls] != [other.next().wish for _ in range(200)]
    assert len({c.key for c in calls}) == 200
    behaviours = {"patient", "rider", "operation", "detached", "quitter", "canceller"}
    assert {c.behaviour for c in calls} == behaviours
    assert {c.wish.model for c in calls} == {wishes.PICTURES, wishes.CLIPS}
    assert {c.wish.workflow for c in calls} == {"", wishes.TWO_PASSES, wishes.MADE_OVER}


def observed(name: str, behaviour: str = wishes.PATIENT, ended: str = FINISHED) -> ObservedCall:
    told = ObservedCall(
        name, behaviour, 0.0, ids=[f"r-{name}"], accepted_s=0.1, ended=ended, ended_s=9.0
    )
    if ended == FINISHED:
        told.picture, told.finishes = EQUAL, 1
    return told


def sound() -> tuple[History, list[Written]]:
    """A run in which everything held."""
    history = History()
    for one in (
        observed("a"),
        observed("b", wishes.DETACHED),
        observed("c", wishes.CANCELLER, CANCELLED),
        observed("d", wishes.QUITTER, QUIT),
    ):
        history.calls[one.key] = one
    states = {"a": FINISHED, "b": FINISHED, "c": CANCELLED, "d": CANCELLED}
    return history, [Written(f"r-{key}", state, key) for key, state in states.items()]


def test_a_sound_run_has_no_violation() -> None:
    history, written = sound()
    assert all_checks(history, written, Leftovers()) == []


def violations(change: str) -> list[str]:
    """Of a sound run with one thing wrong."""
    history, written = sound()
    a = history.calls["a"]
    match change:
        case "lost":
            a.ended, a.problem = GIVEN_UP, "no end"
        case "never ended":
            a.ended = ""
        case "failed":
            a.ended = FAILED
        case "cancelled by nobody":
            a.ended = CANCELLED
        case "two ids":
            a.ids.append("r-a2")
            written.append(Written("r-a2", FINISHED, "a"))
        case "told twice":
            a.finishes = 2
        case "another picture":
            a.picture = "up to 9 levels apart"
        case "not written":
            written.pop(0)
        case "ended otherwise":
            written[0] = Written("r-a", CANCELLED, "a")
        case "still open":
            written[3] = Written("r-d", OPEN, "d", endings=0)
        case "ended twice":
            written[0] = Written("r-a", FINISHED, "a", endings=2)
        case "for nobody":
            written.append(Written("r-x", FINISHED, "x"))
    return all_checks(history, written, Leftovers())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("lost", "gave up waiting"),
        ("never ended", "never ended"),
        ("failed", "failed"),
        ("cancelled by nobody", "nobody had asked"),
        ("two ids", "doubled"),
        ("told twice", "told 2 times"),
        ("another picture", "9 levels apart"),
        ("not written", "written down nowhere"),
        ("ended otherwise", "written down as cancelled"),
        ("still open", "still open"),
        ("ended twice", "ended 2 times"),
        ("for nobody", "made for nobody"),
    ],
)
def test_a_planted_violation_is_seen(change: str, told: str) -> None:
    found = violations(change)
    assert any(told in one for one in found), found


def test_what_is_left_over_is_seen() -> None:
    allowed = {"gateway MiB": 50.0}
    before = {"gateway MiB": 60.0, "broker connections": 8.0}
    assert not nothing_left(Leftovers(before, {**before, "gateway MiB": 110.0}, allowed))
    assert nothing_left(Leftovers(before, {**before, "gateway MiB": 111.0}, allowed))
    assert nothing_left(Leftovers(before, {**before, "broker connections": 9.0}, allowed))
    assert nothing_left(Leftovers({}, {"processes": 1.0}, {}))


def test_recovery_is_counted_from_the_fault_to_what_comes_next() -> None:
    history = History()
    for name in ("a", "b"):
        history.calls[name] = observed(name, ended="")
        history.calls[name].workers = ("w1",) if name == "a" else ("w0",)
    history.progress_s |= {"a": [1.0, 1.02, 3.5], "b": [1.5]}
    fault = ChaosFault(1.0, faults.WORKER, faults.KILL, 0.0, 0.5)
    affected = history.affected(fault, "w1")
    assert affected == {"a"}
    history.calls["probe"] = observed("probe")
    history.calls["probe"].accepted_s = 1.75
    history.struck.append(Struck(fault, 1.0, "w1", affected, "probe"))
    (row,) = by_kind(history)
    assert row["kind"] == "kill -9, worker" and row["faults"] == 1
    assert row["progress_s"] == {"n": 1, "p50": 2.5, "p99": 2.5, "max": 2.5}, (
        "not what was under way"
    )
    assert row["accepted_s"] == {"n": 1, "p50": 0.75, "p99": 0.75, "max": 0.75}


def png(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_files_are_compared_by_bytes_and_then_by_pixels() -> None:
    plain = np.full((8, 8, 3), 100)
    near, far = plain.copy(), plain.copy()
    near[0, 0, 0], far[0, 0, 0] = 101, 102
    assert compare(png(plain), png(plain), exact=True) == EQUAL
    assert compare(png(near), png(plain), exact=False) == NEAR
    assert "not byte-equal" in compare(png(near), png(plain), exact=True)
    assert "2 levels apart" in compare(png(far), png(plain), exact=False)
    assert "shape" in compare(png(plain[:4]), png(plain), exact=False)


def test_promises_and_journals_are_read_alike() -> None:
    wanted = GenerateRequest(idempotency_key="k")
    submit = SubmitRequest(request_id="r", request=wanted)
    ended = EndedRequest(request_id="r", finished=Finished())
    done = Promise(submit=submit, ended=ended).SerializeToString()
    assert promised(done) == Written("r", FINISHED, "k", 1)
    assert promised(Promise(submit=submit).SerializeToString()) == Written("r", OPEN, "k", 0)
    accepted = JournalEntry(accepted=AcceptedRequest(submit=submit))
    ends = [JournalEntry(ended=ended)] * 2
    assert journalled([accepted]) == [Written("r", OPEN, "k", 0)]
    assert journalled([accepted, *ends]) == [Written("r", FINISHED, "k", 2)]


def test_calls_made_again_are_needless_where_a_living_worker_had_made_them() -> None:
    def made(node: str, step: int, at_ns: int, *workers: str) -> MadeCall:
        return MadeCall("r", node, step, workers, at_ns)

    calls = [
        made("text", 1, 0, "w0"),
        made("first", 1, 1, "w0"),
        made("first", 2, 2, "w0", "w1"),
        made("text", 1, 3, "w1"),  # w0 was lost
        made("first", 2, 4, "w1"),  # w1 had it
    ]
    assert again(calls) == calls[3:] and needless(calls, "w0") == calls[4:]
    assert by_node(calls) == {"first": 3, "text": 2}
