"""Latents that others fetch: what is lent is counted, and goes; what is lost is asked for again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuworker.collectives.rendezvous import Rendezvous
from gpuworker.memory.latents import CalledOff, LatentMissing, Shares
from gpuworker.memory.weights import WeightStore
from gpuworker.mesh.copies import Copies
from gpuworker.state import LatentState
from gpuworker.steps.fetching import Fetcher
from gpuworker.steps.inbox import Inbox, StopMark
from gpuworker.steps.run import Run
from gpuworker.steps.sources import Sources
from gpuworker.torch_executor import TorchExecutor
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker.holders import (
    LATENT_BYTES,
    Asking,
    Holder,
    gone_address,
    start_of,
    state,
    wanting,
)
from tests.worker.worker_pool import CPU

WAIT_S = 30.0


def asked(steps_done: int, attempt: int = 0) -> mesh_pb2.LatentRequest:
    return mesh_pb2.LatentRequest(request_id="r", steps_done=steps_done, attempt=attempt)


def test_a_job_that_moves_often_leaves_one_copy_at_most() -> None:
    holder, other = Holder("w0"), Rendezvous()
    for step in range(50):
        holder.shelf.put("r", state(step))
        reply = holder.shelf.offer(asked(step))
        assert holder.shelf.offered_bytes == reply.size_bytes
        assert sum(key.startswith("blob/") for key in holder.keys) == 2, "a head and a chunk"
    blob = other.fetch(holder.rendezvous.address, reply.key, WAIT_S)
    assert LatentState.from_bytes(blob).steps_done == 49
    holder.shelf.tidy()
    assert holder.shelf.offered_bytes == 0 and not holder.keys


def test_a_copy_stays_until_all_who_asked_have_it() -> None:
    holder, other = Holder("w0"), Rendezvous()
    holder.shelf.put("r", state(3))
    key = holder.shelf.offer(asked(3)).key
    assert holder.shelf.offer(asked(3)).key == key
    for left in (1, 0):
        other.fetch(holder.rendezvous.address, key, WAIT_S)
        holder.shelf.tidy()
        assert bool(holder.shelf.offered_bytes) == bool(left)
    holder.shelf.offer(asked(3))
    holder.shelf.release("r")
    assert not holder.keys


def test_what_is_lent_counts_in_the_share_of_latents(tmp_path: Path) -> None:
    holder = Holder("w0", Shares(3 * LATENT_BYTES, 0, tmp_path / "spilled"))
    spilled = threading.Event()
    for name in ("a", "b", "r"):
        holder.shelf.put(name, state(1, LATENT_BYTES // 2))
    assert not any(held.spilled for held in holder.shelf.held())
    holder.shelf.put("s", state(1, LATENT_BYTES))
    holder.shelf.offer(mesh_pb2.LatentRequest(request_id="s", steps_done=1))
    for _ in range(3000):
        if any(held.spilled for held in holder.shelf.held()):
            spilled.set()
            break
        spilled.wait(0.01)
    assert spilled.is_set(), "three and a half shares are taken"
    holder.shelf.close()


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    made = Inbox()
    made.accept_term(1)
    yield made


def test_behind_a_lost_blob_the_next_holder_is_asked(inbox: Inbox) -> None:
    me, alive = Holder("me"), Holder("alive")
    alive.shelf.put("r", state(0))
    dead = types_pb2.LatentHolder(worker="dead", store_address=gone_address())
    ask = Asking(
        {
            "dead": lambda _: mesh_pb2.LatentReply(key="latent/r/0/0"),
            "alive": alive.shelf.offer,
        }
    )
    order = wanting(dead, alive.known)
    sources = Sources("me", inbox, me.shelf, Fetcher("me", me.rendezvous, ask))
    got = sources.obtain(Run(order), *start_of(order))
    assert got.steps_done == 0 and ask.seen == ["dead", "alive"]
    assert me.shelf.steps_done("r") == 0
    lone = wanting(dead)
    me.shelf.release("r")
    with pytest.raises(LatentMissing) as missing:
        sources.obtain(Run(lone), *start_of(lone))
    assert missing.value.tried == ("dead",)


def test_a_job_that_is_called_off_meanwhile_blames_nobody(inbox: Inbox) -> None:
    me = Holder("me")

    def off(_: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        inbox.truncate("r", StopMark(0, 0))
        return mesh_pb2.LatentReply(failure=types_pb2.Failure(message="called off"))

    order = wanting(types_pb2.LatentHolder(worker="w1"), types_pb2.LatentHolder(worker="w2"))
    ask = Asking({"w1": off})
    with pytest.raises(CalledOff):
        Sources("me", inbox, me.shelf, Fetcher("me", me.rendezvous, ask)).obtain(
            Run(order), *start_of(order)
        )
    assert ask.seen == ["w1"]


async def test_asking_a_silent_holder_is_called_off_at_once(bus: Bus, subjects: Subjects) -> None:
    heard = asyncio.Event()

    async def never(_: mesh_pb2.LatentRequest) -> mesh_pb2.LatentReply:
        heard.set()
        await asyncio.Event().wait()
        raise AssertionError

    await bus.serve(subjects.latent("silent"), mesh_pb2.LatentRequest, never)
    executor = TorchExecutor(
        "me",
        {},
        CPU,
        "cpu",
        bus,
        subjects,
        weights=WeightStore(CPU),
        shares=Shares(),
        advertise="127.0.0.1",
        groups_max=4,
    )
    off = threading.Event()
    wanted = mesh_pb2.LatentRequest(request_id="r", wait_us=3_600_000_000)
    answer = asyncio.create_task(asyncio.to_thread(executor._ask, "silent", wanted, off))
    try:
        async with asyncio.timeout(WAIT_S):
            await heard.wait()
            off.set()
            assert (await answer).failure.reason == "CANCELLED"
    finally:
        await executor.close()


def test_a_latent_is_copied_beside_the_steps(inbox: Inbox) -> None:
    me, holder = Holder("me"), Holder("w1")
    holder.shelf.put("r", state(7))
    ask = Asking({"w1": holder.shelf.offer})
    copies = Copies("me", me.shelf, me.rendezvous, ask)
    wanted = mesh_pb2.LatentFetch(request_id="r", steps_done=7, holder=holder.known)
    for _ in range(3):  # control says it again until it hears of the copy
        copies.want(wanted)
    _until(lambda: not copies.under_way)
    assert me.shelf.steps_done("r") == 7 and ask.seen == ["w1"]
    copies.want(wanted)
    assert not copies.under_way, "it is here"
    # A copy that comes late replaces nothing newer, and brings back nothing that has ended.
    me.shelf.put("r", state(9))
    assert not me.shelf.add("r", state(8)) and me.shelf.steps_done("r") == 9
    me.shelf.release("r")
    assert not me.shelf.add("r", state(9)) and me.shelf.steps_done("r") is None
    copies.close()


def _until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it does not come")
