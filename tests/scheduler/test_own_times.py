"""Members' own times on their way: from the report to the fact, the journal and a replay."""

import msgspec

from bench.replay import replay
from bench.sim.costs import Costs, StepTimes, Straggler
from bench.sim.loop import Loop
from control.scheduler.values import (
    Assignment,
    Event,
    JobProgress,
    Layout,
    Member,
    StepsEnded,
)
from control.translate import to_event
from hocket.v1 import journal_pb2, mesh_pb2

from .driving import FLUX_CSV, case

OLD = (
    '{"kind":"steps_ended","at_us":7,"sequence":3,"jobs":[{"request":"r","attempt":0,'
    '"steps_done":2}],"step_time_us":[5,6],"last":true,"group_time_us":0,"transfer_time_us":0,'
    '"load_time_us":0}'
)


def test_a_report_tells_them_and_the_journal_keeps_them():
    report = mesh_pb2.StepReport(
        sequence=3,
        members=["w0", "w1"],
        step_time_us=[10, 11],
        member_time_us=[9, 4, 0, 0],
        results=[mesh_pb2.StepResult(request_id="r", steps_done=2)],
        last=True,
    )
    fact = to_event(mesh_pb2.StepReport.FromString(report.SerializeToString()), 7)
    assert isinstance(fact, StepsEnded) and fact.member_time_us == (9, 4, 0, 0)
    assert msgspec.json.decode(msgspec.json.encode(fact), type=Event) == fact


def test_a_fact_of_an_older_journal_knows_none():
    fact = msgspec.json.decode(OLD, type=Event)
    assert fact == StepsEnded(
        at_us=7,
        sequence=3,
        jobs=(JobProgress(request="r", attempt=0, steps_done=2),),
        step_time_us=(5, 6),
        last=True,
    )


def recorded(tell: bool) -> list[journal_pb2.JournalEntry]:
    """The journal of a run in which one of four workers is slow, and is avoided once it is found;
    without `tell` that of a control that knew no own times.
    """
    slow = Straggler(worker="w0001", from_us=0, until_us=1 << 60, factor=1.8)
    rows = [(i * 100_000, (512, 1024)[i % 2], 30_000_000) for i in range(12)]
    told = msgspec.structs.replace(
        case(rows, policy="fixed-4"), stragglers=(slow,), costs=Costs(noise=0.02)
    )
    loop, entries = Loop(told), []
    observe, plan = loop.scheduler.observe, loop.scheduler.plan
    started = journal_pb2.LeaderStarted(
        settings_json=msgspec.json.encode(told.settings).decode(), profile_csv=FLUX_CSV
    )
    entries.append(journal_pb2.JournalEntry(leader_started=started))

    def observed(fact):
        if isinstance(fact, StepsEnded) and not tell:
            fact = msgspec.structs.replace(fact, member_time_us=())
        text = msgspec.json.encode(fact).decode()
        if not tell:
            text = text.replace(',"member_time_us":[]', "")
        entries.append(journal_pb2.JournalEntry(observed_json=text))
        return observe(fact)

    def planned(now_us):
        made = plan(now_us)
        record = journal_pb2.PlanRecord(now_us=now_us, digest=made.digest)
        entries.append(journal_pb2.JournalEntry(plan=record))
        return made

    loop.scheduler.observe, loop.scheduler.plan = observed, planned
    while loop.instant():
        pass
    for number, entry in enumerate(entries, 1):
        entry.term, entry.sequence = 1, number
    return entries


def test_journals_replay_with_them_and_without():
    new, old = recorded(tell=True), recorded(tell=False)
    assert not any("member_time_us" in e.observed_json for e in old)
    for entries in (new, old):
        assert replay(entries).agrees and replay(entries).plans > 10


def test_a_journal_that_lost_them_does_not_replay():
    entries = recorded(tell=True)
    for entry in entries:
        if '"member_time_us"' in entry.observed_json:
            fact = msgspec.json.decode(entry.observed_json, type=Event)
            lost = msgspec.structs.replace(fact, member_time_us=())
            entry.observed_json = msgspec.json.encode(lost).decode()
    assert replay(entries).differing


# ------------------------------------------------------------------------------------ simulated


def assignment(workers):
    member = Member(request="r", first_step=4, attempt=0, holders=())
    return Assignment(
        sequence=1,
        node="dit",
        batch=(member,),
        steps=8,
        workers=workers,
        layout=Layout(ulysses=len(workers)),
        epoch=1,
        step_time_us=1000,
        step_time_us_safe=1000,
        start_us=0,
        end_us=0,
        reason="",
    )


def test_simulated_members_wait_for_the_slowest_and_it_for_nobody():
    slow = Straggler(worker="w1", from_us=0, until_us=10, factor=1.25)
    quiet = StepTimes(Costs(), (slow,), 0)
    assert quiet.of(assignment(("w0", "w1", "w2")), 0, 1000, 5) == (1250, (1000, 1250, 1000))
    assert quiet.of(assignment(("w0", "w1")), 0, 1000, 10) == (1000, (1000, 1000))
    assert quiet.of(assignment(("w1",)), 0, 1000, 5) == (1250, ())
    assert StepTimes(Costs(), (), 0).of(assignment(("w0", "w1")), 0, 1000, 5)[1] == (1000, 1000)


def test_own_times_have_a_noise_of_their_own():
    """What a step takes does not depend on how many members tell of it."""
    noisy = StepTimes(Costs(noise=0.1), (), 3)
    for step in range(20):
        (alone_us, _), (pair_us, own_us) = (
            noisy.of(assignment(workers), step, 1000, 0) for workers in (("w0",), ("w0", "w1"))
        )
        assert alone_us == pair_us == max(own_us) > min(own_us)
