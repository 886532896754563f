"""What heartbeats do not name, heartbeat after heartbeat, was lost on the way."""

from __future__ import annotations

import msgspec

from control.scheduler.values import Assignment, Holder, Layout, Member
from control.workers.lost_messages import LostMessages
from hocket.v1 import mesh_pb2

TERM = 3


def assignment(sequence: int, worker: str = "w0") -> Assignment:
    holder = Holder(worker=worker, steps_done=4)
    return Assignment(
        sequence=sequence,
        node="dit",
        batch=(Member(request="r", first_step=4, attempt=1, holders=(holder,)),),
        steps=2,
        workers=(worker, "w1"),
        epoch=1,
        layout=Layout(ulysses=2),
        step_time_us=1000,
        step_time_us_safe=1100,
        start_us=0,
        end_us=2000,
        reason="minimal",
    )


def beat(number: int, *pending: int, term: int = TERM) -> dict[str, mesh_pb2.Heartbeat]:
    latent = mesh_pb2.HeldLatent(request_id="r", steps_done=5)
    return {
        "w0": mesh_pb2.Heartbeat(
            worker="w0",
            sequence=number,
            term=term,
            pending_sequences=pending,
            latents=[latent],
        )
    }


def checks(lost: LostMessages, numbers: range, *pending: int) -> list[tuple[object, ...]]:
    """A check every 250 ms, each with the next heartbeat."""
    return [lost.check(beat(n, *pending), (assignment(7),), n * 250_000) for n in numbers]


def test_an_assignment_absent_for_a_second_and_four_heartbeats_is_lost_once() -> None:
    lost = LostMessages(TERM)
    assert checks(lost, range(4)) == [()] * 4
    ((failed,),) = checks(lost, range(4, 5))
    assert failed.sequence == 7 and failed.reason == "MESSAGE_LOST" and failed.suspects == ()
    assert failed.jobs[0].steps_done == 5  # the latent that the worker still holds
    assert checks(lost, range(5, 20)) == [()] * 15


def test_naming_it_once_starts_the_count_anew() -> None:
    lost = LostMessages(TERM)
    assert not any(checks(lost, range(4)))
    assert not any(checks(lost, range(4, 5), 7))
    assert not any(checks(lost, range(5, 9)))
    assert checks(lost, range(9, 10)) != [()]


def test_many_old_heartbeats_at_once_prove_nothing() -> None:
    """After a pause of control, a second's heartbeats come in one moment."""
    lost = LostMessages(TERM)
    assert not any(lost.check(beat(n), (assignment(7),), 5_000_000) for n in range(40))


def test_numbers_of_another_term_name_nothing() -> None:
    lost = LostMessages(TERM)
    old = [lost.check(beat(n, 7, term=TERM - 1), (assignment(7),), n * 250_000) for n in range(6)]
    assert any(old)


def test_a_follower_that_never_got_it_counts_too() -> None:
    """Its first member would wait for it in vain."""
    lost = LostMessages(TERM)
    follower = beat(0)["w0"]
    found: list[object] = []
    for n in range(6):
        leader = mesh_pb2.Heartbeat(worker="w5", sequence=n, term=TERM, pending_sequences=[9])
        follower.sequence = n
        led = msgspec.structs.replace(assignment(9, "w5"), workers=("w5", "w0"))
        found += lost.check({"w5": leader, "w0": follower}, (led,), n * 250_000)
    assert len(found) == 1


def test_other_workers_assignments_are_not_its_business() -> None:
    lost = LostMessages(TERM)
    for n in range(9):
        assert not lost.check(beat(n), (assignment(7, "w5"),), n * 250_000)


def test_a_worker_that_goes_on_with_what_is_called_off_is_told_again() -> None:
    lost = LostMessages(TERM)
    found = [lost.still_running(beat(n, 7), (assignment(8),)) for n in range(5)]
    assert found == [(), (), (), (), ("w0",)]
    assert lost.still_running(beat(5, 8), (assignment(8),)) == ()
    assert lost.still_running(beat(6, 7), (assignment(8),)) == ()
