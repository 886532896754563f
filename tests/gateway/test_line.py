"""The line to the leader on a clock that stands still: batches, beats, silence, coming back."""

from __future__ import annotations

import asyncio

import pytest

from gateway.follower import BACKLOG_MAX, Follower
from gateway.line import BEAT_US, GATHER_US, SILENCE_US_MAX
from hocket.errors import ControlUnavailable, UnknownRequest
from hocket.rpc.channels import MESSAGE_BYTES_MAX
from hocket.v1.control_pb2 import AttachResponse, Followed, SubmitRequest, SubmitResponse
from hocket.v1.generation_pb2 import Accepted, Progress
from hocket.v1.mesh_pb2 import RequestEvent
from hocket.v1.types_pb2 import Failure
from hocket.v1.workflows_pb2 import WorkflowSpec
from hocket.workflows.checking import SPEC_BYTES_MAX
from tests.gateway.links import Wire, wired

SECOND_US = 1_000_000
WAIT_US = 10 * SECOND_US


def submitting(
    wire: Wire, name: str, wait_us: int = WAIT_US
) -> tuple[Follower, asyncio.Future[SubmitResponse]]:
    follower = Follower(name)
    work = wire.line.submit(SubmitRequest(request_id=name), follower, wait_us, "tp")
    return follower, asyncio.ensure_future(work)


def step(name: str, sequence: int) -> RequestEvent:
    return RequestEvent(request_id=name, sequence=sequence, progress=Progress(step=sequence))


def telling(*events: RequestEvent) -> AttachResponse:
    return AttachResponse(term=1, events=events)


async def test_what_gathers_during_a_write_goes_in_one_message() -> None:
    async with wired("a") as wire:
        calls = [submitting(wire, f"r{n}")[1] for n in range(100)]
        wire.line.follow(Follower("other", 7))
        await wire.settle()
        said = [m for m in wire.link.said if m.submits or m.follows]
        assert len(said) == 1 and len(said[0].submits) == 100
        assert wire.link.said[0].gateway == "g"
        assert [s.call for s in said[0].submits] == list(range(1, 101))
        assert said[0].submits[0].expires_us == WAIT_US - GATHER_US
        assert said[0].submits[0].traceparent == "tp"
        assert wire.link.follows == [("other", 7)]
        for number in range(1, 101):
            wire.link.accept(number, f"r{number - 1}")
        answers = await asyncio.gather(*calls)
        assert [a.request_id for a in answers] == [f"r{n}" for n in range(100)]


async def test_a_quiet_line_says_a_thing_at_once_and_what_follows_it_together() -> None:
    async with wired("a") as wire:
        await wire.pass_us(GATHER_US)
        calls = [submitting(wire, "first")[1]]
        for _ in range(9):
            await asyncio.sleep(0)
        assert wire.link.submits == ["first"]
        for number in range(50):
            calls.append(submitting(wire, f"r{number}")[1])
            await asyncio.sleep(0)
        assert wire.link.submits == ["first"]
        await wire.pass_us(GATHER_US)
        assert [len(m.submits) for m in wire.link.said if m.submits] == [1, 50]
        for call in calls:
            call.cancel()


async def test_a_large_batch_goes_in_several_messages() -> None:
    async with wired("a") as wire:
        waiting = [submitting(wire, f"r{n}")[1] for n in range(300)]
        await wire.settle()
        sizes = [len(m.submits) for m in wire.link.said if m.submits]
        assert sizes == [128, 128, 44]
        for task in waiting:
            task.cancel()


async def test_large_workflows_go_in_several_messages_and_each_goes() -> None:
    """All of them in one message would be more than gRPC takes, again after each break."""
    async with wired("a") as wire:
        large = WorkflowSpec(description="x" * SPEC_BYTES_MAX)
        waiting = [
            asyncio.ensure_future(
                wire.line.submit(
                    SubmitRequest(request_id=f"r{n}", workflow=large), Follower(f"r{n}"), WAIT_US
                )
            )
            for n in range(200)
        ]
        await wire.settle()
        assert max(m.ByteSize() for m in wire.link.said) < MESSAGE_BYTES_MAX // 2
        assert wire.link.submits == [f"r{n}" for n in range(200)]
        for task in waiting:
            task.cancel()


async def test_it_says_something_each_second() -> None:
    async with wired("a") as wire:
        before = len(wire.link.said)
        for _ in range(5):
            wire.link.say()
            await wire.pass_us(BEAT_US)
        assert len(wire.links) == 1 and len(wire.link.said) == before + 5


async def test_silence_breaks_the_line_and_the_next_replica_is_tried() -> None:
    async with wired("a", "b") as wire:
        assert wire.line.leader == "a"
        await wire.pass_us(SILENCE_US_MAX + SECOND_US)
        assert wire.links[0].closed
        assert wire.links[1].address == "b" and wire.line.leader == "b"
        assert wire.leaders == ["a", "", "b"]


async def test_a_replica_that_says_nothing_is_left() -> None:
    async with wired("mute", "b", greet=lambda address: address == "b") as wire:
        assert wire.line.leader == ""
        await wire.pass_us(SILENCE_US_MAX + SECOND_US)
        assert wire.line.leader == "b"


async def test_the_leader_that_a_replica_names_is_tried_next() -> None:
    async with wired("a", "b", "c", greet=lambda address: address == "z") as wire:
        wire.link.break_off(leader="z")
        await wire.pass_us(SECOND_US)
        assert [link.address for link in wire.links[:2]] == ["a", "z"]
        assert wire.line.leader == "z"


async def test_replicas_that_refuse_are_not_asked_in_a_tight_loop() -> None:
    async with wired("a", greet=lambda _: False) as wire:
        for _ in range(60):
            wire.link.break_off()
            await wire.pass_us(SECOND_US // 10)
        assert 6 <= len(wire.links) <= 14


async def test_a_new_stream_is_told_everything_again_from_the_cursor_on() -> None:
    async with wired("a") as wire:
        follower, answer = submitting(wire, "r1")
        await wire.settle()
        wire.link.accept(1, "r1")
        await answer
        wire.link.say(telling(step("r1", 5), step("r1", 9)))
        _, open_call = submitting(wire, "r2")
        await wire.settle()
        wire.link.break_off()
        await wire.pass_us(SECOND_US)
        assert len(wire.links) == 2
        assert wire.link.submits == ["r2"], "what has its answer is not submitted again"
        assert wire.link.follows == [("r1", 9)]
        again = wire.link.said[0].submits[0]
        assert again.call == 2 and again.expires_us < WAIT_US
        # What was seen is not seen twice, what is new is seen.
        missed = [step("r1", 9), step("r1", 12)]
        wire.link.say(AttachResponse(followed=[Followed(follower=follower.name, missed=missed)]))
        wire.link.accept(2, "r2")
        await open_call
        assert [(await follower.next()).sequence for _ in range(3)] == [5, 9, 12]


async def test_an_accepted_request_waits_for_control_as_long_as_it_takes() -> None:
    up = True
    async with wired("a", greet=lambda _: up) as wire:
        follower, answer = submitting(wire, "r1")
        await wire.settle()
        wire.link.accept(1, "r1")
        await answer
        waiting = asyncio.ensure_future(follower.next())
        up = False
        await wire.pass_us(3600 * SECOND_US)
        assert wire.line.leader == "" and not waiting.done()
        up = True
        await wire.pass_us(5 * SECOND_US)
        assert wire.link.follows == [("r1", 0)]
        told = Followed(follower=follower.name, missed=[step("r1", 77)])
        wire.link.say(AttachResponse(followed=[told]))
        assert (await waiting).sequence == 77


async def test_waiting_costs_control_nothing() -> None:
    """A queued request is silent for as long as it takes: nobody asks again what became of it."""
    async with wired("a") as wire:
        requests = [f"r{number}" for number in range(50)]
        waiting = []
        for number, request in enumerate(requests, 1):
            follower, answer = submitting(wire, request)
            await wire.settle()
            wire.link.accept(number, request)
            await answer
            waiting.append(asyncio.ensure_future(follower.next()))
        link, said = wire.link, len(wire.link.said)
        for _ in range(120):
            link.say()
            await wire.pass_us(SECOND_US)
        assert wire.link is link and not any(one.done() for one in waiting)
        assert link.submits == requests and link.follows == []
        assert all(not message.ListFields() for message in link.said[said:]), "it says: I live"
        for one in waiting:
            one.cancel()


async def test_a_submit_without_an_answer_expires() -> None:
    async with wired("a", greet=lambda _: False) as wire:
        _, answer = submitting(wire, "r1", wait_us=2 * SECOND_US)
        await wire.pass_us(SECOND_US)
        assert not answer.done()
        await wire.pass_us(2 * SECOND_US)
        with pytest.raises(ControlUnavailable):
            await answer
        assert wire.line.unanswered == 0
        await wire.pass_us(5 * SECOND_US)
        assert wire.link.submits == [], "it is not submitted again"


async def test_a_late_answer_makes_its_follower_leave() -> None:
    """Control admitted it just before it expired; its caller has been told that it was not."""
    async with wired("a") as wire:
        follower, answer = submitting(wire, "r1", wait_us=2 * SECOND_US)
        for _ in range(3):
            wire.link.say()
            await wire.pass_us(SECOND_US)
        with pytest.raises(ControlUnavailable):
            await answer
        await wire.settle()
        assert wire.link.leaves == [(follower.name, True)]
        wire.link.accept(1, "r1")
        await wire.settle()
        assert wire.link.leaves == [(follower.name, True)] * 2
        assert wire.line.followers == 0


async def test_a_caller_that_goes_before_the_submit_was_sent_leaves_no_trace() -> None:
    async with wired("a") as wire:
        wire.link.break_off()
        await wire.settle()
        _, answer = submitting(wire, "r1")
        await wire.settle()
        answer.cancel()
        await wire.pass_us(SECOND_US)
        assert len(wire.links) == 2 and wire.link.submits == [] and wire.link.leaves == []
        assert wire.line.unanswered == 0


async def test_a_follower_that_leaves_while_the_line_is_down_is_not_followed_again() -> None:
    async with wired("a") as wire:
        follower = Follower("r1")
        wire.line.follow(follower)
        await wire.settle()
        wire.link.break_off()
        await wire.settle()
        wire.line.leave(follower, returns=True)
        await wire.pass_us(SECOND_US)
        assert len(wire.links) == 2 and wire.link.follows == [] and wire.link.leaves == []


async def test_leaving_twice_is_told_once() -> None:
    async with wired("a") as wire:
        follower = Follower("r1")
        wire.line.follow(follower)
        await wire.settle()
        wire.line.leave(follower, returns=False)
        wire.line.leave(follower, returns=True)
        emptied = asyncio.ensure_future(wire.line.emptied())
        await wire.settle()
        await emptied
        assert wire.link.leaves == [(follower.name, False)]


async def test_an_answer_that_names_an_earlier_request_moves_the_follower() -> None:
    async with wired("a") as wire:
        follower, answer = submitting(wire, "mine")
        await wire.settle()
        wire.link.accept(1, "earlier")
        missed = [RequestEvent(request_id="earlier", sequence=1, accepted=Accepted())]
        wire.link.say(AttachResponse(followed=[Followed(follower=follower.name, missed=missed)]))
        wire.link.say(telling(step("earlier", 8), step("mine", 9)))
        assert (await answer).request_id == "earlier"
        await wire.settle()
        assert [(await follower.next()).sequence for _ in range(2)] == [1, 8]


async def test_nothing_to_follow_is_said() -> None:
    async with wired("a") as wire:
        follower = Follower("gone")
        wire.line.follow(follower)
        await wire.settle()
        refused = Failure(reason="UNKNOWN_REQUEST")
        wire.link.say(AttachResponse(followed=[Followed(follower=follower.name, refused=refused)]))
        with pytest.raises(UnknownRequest):
            await follower.next()


async def test_of_a_backlog_progress_gives_way_and_nothing_else() -> None:
    follower = Follower("r1")
    follower.put(RequestEvent(sequence=1, accepted=Accepted()))
    for sequence in range(2, 500):
        follower.put(step("r1", sequence))
    follower.put(RequestEvent(sequence=500, failed=Failure(reason="X")))
    seen = [await follower.next() for _ in range(BACKLOG_MAX)]
    assert seen[0].HasField("accepted") and seen[-1].HasField("failed")
    assert seen[-2].sequence == 499 and follower.progress_dropped == 500 - BACKLOG_MAX


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancel_is_not_lost_where_the_link_breaks_too(turns: int) -> None:
    """A task group that was cancelled from outside forgets it when a task of its own failed."""
    async with wired("a") as wire:
        other = wire.another()
        running = asyncio.ensure_future(other.run())
        await wire.settle()
        wire.link.break_off()
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        await wire.settle()
        assert running.cancelled()


def accepted_event(name: str) -> RequestEvent:
    return RequestEvent(request_id=name, sequence=1, accepted=Accepted(request_id=name))


async def test_a_second_follower_is_told_from_the_start() -> None:
    """Events for the first one, on their way before control knew of the second, hid the start."""
    async with wired("a") as wire:
        first, answer = submitting(wire, "r1")
        await wire.settle()
        wire.link.accept(1, "r1")
        await answer
        second = Follower("r1")
        wire.line.follow(second)
        joined, joining = submitting(wire, "r2")
        await wire.settle()
        wire.link.say(telling(step("r1", 1 << 8 | 7)))
        wire.link.accept(2, "r1")
        wire.link.say(telling(step("r1", 1 << 8 | 8)))
        missed = [accepted_event("r1"), step("r1", 1 << 8 | 8)]
        for follower in (second, joined):
            told = Followed(follower=follower.name, missed=missed)
            wire.link.say(AttachResponse(followed=[told]))
        wire.link.say(telling(step("r1", 1 << 8 | 9)))
        await joining
        await wire.settle()
        for follower in (second, joined):
            seen = [(await follower.next()).sequence for _ in range(3)]
            assert seen == [1, 1 << 8 | 8, 1 << 8 | 9]
        assert [(await first.next()).sequence & 15 for _ in range(3)] == [7, 8, 9]


@pytest.mark.parametrize("answered_first", [True, False])
async def test_a_caller_that_goes_in_the_moment_of_its_answer_leaves(answered_first: bool) -> None:
    async with wired("a") as wire:
        follower, answer = submitting(wire, "r1")
        await wire.settle()
        ends = [answer.cancel, lambda: wire.line._answer(1, accepted("r1"))]
        for end in reversed(ends) if answered_first else ends:
            end()
        await wire.settle()
        assert answer.cancelled() and wire.line.followers == 0
        assert wire.link.leaves == [(follower.name, True)]


def accepted(name: str) -> SubmitResponse:
    return SubmitResponse(request_id=name, accepted=Accepted(request_id=name))
