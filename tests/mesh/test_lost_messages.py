"""What heartbeats do not name, heartbeat after heartbeat, was lost on the way."""

from __future__ import annotations

from control.lost_messages import LostMessages
from control.scheduler.values import Assignment, Holder, Layout, Member
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


def beat(*pending: int, term: int = TERM) -> mesh_pb2.Heartbeat:
    latent = mesh_pb2.HeldLatent(request_id="r", steps_done=5)
    return mesh_pb2.Heartbeat(worker="w0", term=term, pending_sequences=pending, latents=[latent])


def test_an_assignment_absent_from_four_heartbeats_is_lost() -> None:
    lost = LostMessages(TERM)
    found = [lost.check(beat(), (assignment(7),), at) for at in range(4)]
    assert found[:3] == [(), (), ()]
    (failed,) = found[3]
    assert failed.sequence == 7 and failed.reason == "MESSAGE_LOST" and failed.suspects == ()
    assert failed.jobs[0].steps_done == 5  # the latent that the worker still holds


def test_naming_it_once_starts_the_count_anew() -> None:
    lost = LostMessages(TERM)
    for pending in ((), (), (), (7,), (), (), ()):
        assert not lost.check(beat(*pending), (assignment(7),), 0)
    assert lost.check(beat(), (assignment(7),), 0)


def test_numbers_of_another_term_name_nothing() -> None:
    lost = LostMessages(TERM)
    found = [lost.check(beat(7, term=TERM - 1), (assignment(7),), 0) for _ in range(4)]
    assert found[3]


def test_other_workers_assignments_are_not_its_business() -> None:
    lost = LostMessages(TERM)
    assert not any(lost.check(beat(), (assignment(7, "w5"),), 0) for _ in range(9))
