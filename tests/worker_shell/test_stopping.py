"""Told to stop, a worker hands over what only it has, and goes; told twice, it goes at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gpuworker.mesh.stopping import StopSignals, run_until
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker_shell.desk import WAIT_S, Desk, desk, job


async def holding(one: Desk) -> None:
    """It has the only latent of `r`."""
    await one.assign(assignments=[job(1, "text")])
    assert (await one.report()).last
    assert [held.request_id for held in one.executor.held()] == ["r"]


async def test_a_worker_that_has_nothing_says_so_and_leaves(nats_url: str, tmp_path: Path) -> None:
    async with desk(nats_url, tmp_path, "stop-idle") as one:
        one.agent.stop()
        async with asyncio.timeout(WAIT_S):
            await one.running
        stopping, leaving = await one.beat(), await one.beat()
        assert (stopping.stopping, stopping.leaving) == (True, False)
        assert leaving.leaving


async def test_a_worker_stays_until_its_latents_have_copies(nats_url: str, tmp_path: Path) -> None:
    async with (
        desk(nats_url, tmp_path, "stop-held") as one,
        desk(
            nats_url, tmp_path, "stop-held", name="w1", clock=one.clock, host=one.executor._host
        ) as other,
    ):
        await holding(one)
        one.agent.stop()
        assert (await one.beat()).stopping
        await one.settle()
        assert not one.running.done()
        # Control sends another worker for it, hears of the copy, and lets this one go.
        holder = types_pb2.LatentHolder(worker="w0", steps_done=0)
        await other.assign(fetches=[mesh_pb2.LatentFetch(request_id="r", holder=holder)])
        await other.settle()
        assert [held.request_id for held in other.executor.held()] == ["r"]
        await one.assign(released=["r"])
        await one.playing(one.running)
        assert (await one.beat()).leaving
        assert [held.request_id for held in other.executor.held()] == ["r"]


async def test_what_is_in_hand_is_finished_first(nats_url: str, tmp_path: Path) -> None:
    async with desk(nats_url, tmp_path, "stop-busy") as one:
        await holding(one)
        await one.assign(assignments=[job(2, "dit", steps=8)])
        await one.settle()
        one.agent.stop()
        reports = [await one.report() for _ in range(8)]
        assert reports[-1].last and not one.running.done()
        # A decode's file is stored before it goes; control releases the finished request.
        await one.assign(assignments=[job(3, "vae", first=8)])
        done = await one.report()
        assert done.last and done.results[0].media.object_name == "r"
        await one.assign(released=["r"])
        await one.playing(one.running)


async def test_nobody_is_waited_for_longer_than_told(nats_url: str, tmp_path: Path) -> None:
    async with desk(nats_url, tmp_path, "stop-late", drain_s=5.0) as one:
        await holding(one)
        before_us = one.clock.now_us()
        one.agent.stop()
        await one.playing(one.running)
        assert one.clock.now_us() - before_us >= 5_000_000


async def test_it_takes_no_copies_of_others_any_more(nats_url: str, tmp_path: Path) -> None:
    async with desk(nats_url, tmp_path, "stop-copies") as one:
        await holding(one)
        one.agent.stop()
        one.executor._host.copies["w9"] = {("s", ""): 3}
        holder = types_pb2.LatentHolder(worker="w9", steps_done=3)
        fetch = mesh_pb2.LatentFetch(request_id="s", steps_done=3, holder=holder)
        await one.assign(fetches=[fetch])
        await one.settle()
        assert [held.request_id for held in one.executor.held()] == ["r"]


async def test_the_second_signal_waits_for_nothing(nats_url: str, tmp_path: Path) -> None:
    async with desk(nats_url, tmp_path, "stop-twice", drain_s=3600.0) as one:
        await holding(one)
        signals = StopSignals()
        still = asyncio.create_task(run_until([_Running(one)], signals))
        signals.told()
        assert (await one.beat()).stopping
        assert not still.done()
        signals.told()
        async with asyncio.timeout(WAIT_S):
            await still
        assert (await one.beat()).leaving


class _Running:
    """An agent that runs already."""

    def __init__(self, one: Desk) -> None:
        self._one = one

    async def run(self) -> None:
        try:
            await self._one.running
        except asyncio.CancelledError:
            self._one.running.cancel()
            await asyncio.gather(self._one.running, return_exceptions=True)
            raise

    def stop(self) -> None:
        self._one.agent.stop()
