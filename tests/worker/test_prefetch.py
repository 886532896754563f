"""Inputs of the next assignments come while the one in hand computes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from gpuworker.memory.latents import CalledOff, LatentMissing
from gpuworker.state import LatentState
from gpuworker.steps.fetching import Fetcher
from gpuworker.steps.inbox import Inbox, StopMark
from gpuworker.steps.prefetch import Ahead, Prefetch
from gpuworker.steps.run import Run
from gpuworker.steps.sources import Sources
from hocket.v1 import mesh_pb2, types_pb2
from tests.waiting import until
from tests.worker.holders import (
    LATENT_BYTES,
    Asking,
    Holder,
    gone_address,
    start_of,
    state,
    wanting,
)


class Worker:
    """One that wants what others hold."""

    def __init__(self, ask: Asking, ahead: Ahead) -> None:
        self.me, self.inbox, self.ask = Holder("me"), Inbox(), ask
        self.inbox.accept_term(1)
        fetcher = Fetcher("me", self.me.rendezvous, ask)
        self.ahead = Prefetch("me", self.inbox, self.me.shelf, fetcher, ahead)
        self.sources = Sources("me", self.inbox, self.me.shelf, fetcher, self.ahead)

    def want(self, *orders: mesh_pb2.Assignment) -> None:
        for order in orders:
            self.ahead.want(order)
            self.inbox.put(order)

    def obtain(self, order: mesh_pb2.Assignment) -> LatentState:
        return self.sources.obtain(Run(order), *start_of(order))


@pytest.fixture
def other() -> Holder:
    holder = Holder("other")
    for number in range(1, 6):
        holder.shelf.put(f"r{number}", state(0))
    return holder


@pytest.fixture
def worker(other: Holder) -> Iterator[Worker]:
    made = Worker(Asking({"other": other.shelf.offer}), Ahead(2, 3 * LATENT_BYTES))
    yield made
    made.ahead.close()


def order(number: int, *holders: types_pb2.LatentHolder, request: str = "") -> mesh_pb2.Assignment:
    made = wanting(*holders)
    made.sequence, made.batch[0].request_id = number, request or f"r{number}"
    return made


async def test_inputs_are_here_before_their_turn_and_nobody_is_asked_again(
    worker: Worker, other: Holder
) -> None:
    orders = [order(number, other.known) for number in (1, 2, 3, 4)]
    worker.want(*orders, orders[0])
    await until(lambda: worker.ahead.size_bytes > 2 * LATENT_BYTES)
    assert worker.ask.seen == ["other"] * 2, "two assignments ahead"
    assert worker.me.shelf.held() == (), "a copy that nobody has worked with is no news"
    with worker.sources.in_hand(orders[0]):
        assert worker.obtain(orders[0]).steps_done == 0
        await until(lambda: len(worker.ask.seen) == 3)
        assert worker.me.shelf.steps_done("r1") == 0
    for each in orders[1:]:
        with worker.sources.in_hand(each):
            await until(lambda: len(worker.ask.seen) == len(orders))
            await until(lambda: worker.ahead.size_bytes > 0)
            worker.obtain(each)
    assert (worker.ahead.size_bytes, worker.ahead.taken) == (0, 4)
    assert len(worker.ask.seen) == 4


async def test_an_input_of_two_assignments_comes_once(worker: Worker, other: Holder) -> None:
    orders = [order(number, other.known, request="r1") for number in (1, 2)]
    worker.want(*orders)
    for each in orders:
        with worker.sources.in_hand(each):
            worker.obtain(each)
    assert worker.ask.seen == ["other"]


async def test_what_arrives_is_bounded_and_whoever_is_waited_for_has_room(other: Holder) -> None:
    worker = Worker(Asking({"other": other.shelf.offer}), Ahead(3, LATENT_BYTES))
    orders = [order(number, other.known) for number in (1, 2, 3)]
    worker.want(*orders)
    await until(lambda: len(worker.ask.seen) == 3 and worker.ahead.size_bytes > 0)
    assert worker.ahead.size_bytes < 2 * LATENT_BYTES, "one may be more, alone"
    for each in reversed(orders):  # the one that has room is waited for last
        worker.obtain(each)
    assert worker.ahead.size_bytes == 0
    worker.ahead.close()


async def test_a_lost_holder_is_passed_over_and_a_lost_artifact_is_told_in_its_turn(
    worker: Worker, other: Holder
) -> None:
    worker.ask.answers["dead"] = lambda _: mesh_pb2.LatentReply(key="latent/r1/0/0")
    dead = types_pb2.LatentHolder(worker="dead", store_address=gone_address())
    first, second = order(1, dead, other.known), order(2, dead)
    worker.want(first, second)
    assert worker.obtain(first).steps_done == 0 and worker.ask.seen.count("other") == 1
    with pytest.raises(LatentMissing) as missing:
        worker.obtain(second)
    assert missing.value.tried == ("dead",) and worker.ahead.taken == 1


@pytest.mark.parametrize("how", ["truncated", "a newer term", "over"])
async def test_a_fetch_is_called_off_with_its_assignment(other: Holder, how: str) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def late(wanted: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        asked.set()
        go_on.wait(30)
        return other.shelf.offer(wanted)

    worker = Worker(Asking({"other": late}), Ahead(2, LATENT_BYTES))
    first = order(1, other.known)
    worker.want(first)
    assert asked.wait(30)
    end = {
        "truncated": partial(worker.inbox.truncate, "r1", StopMark(0, 0)),
        "a newer term": partial(worker.ahead.forget_before, 2),
        "over": partial(worker.ahead.over, first),
    }
    end[how]()
    go_on.set()
    if how == "truncated":
        with pytest.raises(CalledOff):
            worker.obtain(first)
    worker.ahead.close()
    worker.ahead._threads.shutdown(wait=True)
    assert worker.ahead.size_bytes == 0
