"""Whole control replicas on a real nats-server."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hocket.errors import NotLeader
from hocket.launching import endpoints
from hocket.launching.broker import free_port
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.leader import LeaderWatch
from hocket.v1 import mesh_pb2
from tests.brokers import broker_cluster, running_broker
from tests.control.replica import MODEL, asking, beat_for_ever, replica, started
from tests.waiting import alive, until

WAIT_S = 60.0


@pytest.fixture
async def worker(bus: Bus, subjects: Subjects) -> AsyncIterator[None]:
    beating = asyncio.ensure_future(beat_for_ever(bus, subjects))
    yield
    beating.cancel()


async def leader_other_than(watch: LeaderWatch, address: str) -> str:
    while (found := await watch.next()) in ("", address):
        pass
    return found


async def test_a_standby_names_the_leader_and_takes_over_when_it_stops(
    nats_url: str, bus: Bus, subjects: Subjects, worker: None, tmp_path: Path
) -> None:
    watch = LeaderWatch(bus, subjects.cluster)
    cluster = subjects.cluster
    listen = f"127.0.0.1:{free_port()}"
    async with (
        asyncio.timeout(WAIT_S),
        replica(nats_url, cluster, tmp_path / "a") as first,
        asking(await first.leads()) as one,
        replica(nats_url, cluster, tmp_path / "b", listen=listen) as second,
        asking(listen) as two,
    ):
        address = await first.leads()
        await one.accepted("r1")
        told = await one.cluster_with(lambda c: len(c.replicas) == 2)
        assert [(r.address, r.role) for r in told.replicas] == [
            (address, "leader"),
            (listen, "standby"),
        ]
        for answer in (await two.submit("r2"), await two.cancel("r1")):
            assert answer == NotLeader(address)
        assert await watch.next() == address
        await first.stop()
        assert await leader_other_than(watch, address) == listen
        assert await second.leads() == listen
        assert await two.cancel("r1") is True, "it knows what the other one had promised"
        later = await two.cluster_with(lambda c: len(c.models) > 0)
        assert later.term > told.term and [m.name for m in later.models] == [MODEL]
    await watch.close()


async def test_a_leader_that_was_stopped_by_a_signal_comes_back_as_standby(
    nats_url: str, bus: Bus, subjects: Subjects, worker: None, tmp_path: Path
) -> None:
    """SIGSTOP for longer than its key lives: no split promise, no exit, no flapping."""
    watch = LeaderWatch(bus, subjects.cluster)
    listen = f"127.0.0.1:{free_port()}"
    process = started(nats_url, subjects.cluster, tmp_path / "a", listen)
    try:
        async with asyncio.timeout(WAIT_S), asking(listen) as one:
            while await watch.next() != listen:
                pass
            await one.accepted("r1")
            term = (await one.cluster()).term
            async with replica(nats_url, subjects.cluster, tmp_path / "b") as second:
                os.kill(process.pid, signal.SIGSTOP)
                submits = [asyncio.ensure_future(one.submit(f"s{i}")) for i in range(20)]
                address = await leader_other_than(watch, listen)
                os.kill(process.pid, signal.SIGCONT)
                answers = await asyncio.gather(*submits)
                assert all(answer == NotLeader(address) for answer in answers), answers
                async with asking(await second.leads()) as two:
                    assert (await two.cluster()).term > term
                    for name in ("r1", *(f"s{i}" for i in range(20))):
                        assert (await two.cancel(name) is True) == (name == "r1")
                assert alive(process.pid) and watch.address == address
            assert await leader_other_than(watch, address) == listen
            assert (await one.cluster()).term > term + 1
    finally:
        process.kill()
        process.wait(10)
        await watch.close()


async def test_each_replica_announces_itself_with_its_role(
    nats_url: str, bus: Bus, subjects: Subjects, worker: None, tmp_path: Path
) -> None:
    """Two of one state folder: `hocket status` shows both, and who leads when the leader dies."""
    doors = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    processes = []

    def announced() -> dict[str, str]:
        known = endpoints.living(tmp_path, "control", standing_by=True)
        return {one.address: one.role for one in known}

    async def shown() -> str:
        command = [sys.executable, "-m", "hocket.cli", "status", f"--state-dir={tmp_path}"]
        pipe = asyncio.subprocess.PIPE
        asked = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        out, wrong = await asked.communicate()
        return (out + wrong).decode()

    try:
        async with asyncio.timeout(WAIT_S):
            for door in doors:
                processes.append(started(nats_url, subjects.cluster, tmp_path, door))
                await until(lambda door=door: door in announced())
            await until(lambda: "leader" in announced().values())
            (leads,) = (door for door, role in announced().items() if role == "leader")
            (stands_by,) = (door for door, role in announced().items() if role == "standby")
            async with asking(leads) as client:
                await client.cluster_with(lambda c: len(c.replicas) == 2 and len(c.workers) == 1)
            rows = [line.split() for line in (await shown()).splitlines()]
            roles = {row[0]: row[1] for row in rows if row and row[0] in doors}
            assert roles == {leads: "leader", stands_by: "standby"}
            processes[doors.index(leads)].kill()
            processes[doors.index(leads)].wait(10)
            await until(lambda: announced() == {stands_by: "leader"})
            processes[doors.index(stands_by)].terminate()
            await until(lambda: announced() == {})
    finally:
        for process in processes:
            process.kill()
            process.wait(10)


async def test_control_outlasts_a_broker_that_stands_still(tmp_path: Path) -> None:
    """It used to end after ten seconds by a flush that nobody caught."""
    subjects = Subjects("still")
    with running_broker(tmp_path) as broker:
        bus = await Bus.connect(broker.url, "worker")
        beating = asyncio.ensure_future(beat_for_ever(bus, subjects))
        async with (
            asyncio.timeout(WAIT_S),
            replica(broker.url, "still", tmp_path / "a", lease_us=300_000) as one,
            asking(await one.leads()) as client,
        ):
            await client.accepted("r1")
            before = await client.cluster()
            broker.stand_still()
            waiting = asyncio.ensure_future(client.submit("r2"))
            await asyncio.sleep(2.5)  # longer than the key, a lease and a flush last
            assert not one.serving.done() and not waiting.done()
            assert [w.name for w in (await client.cluster()).workers] == ["w0"]
            broker.go_on()
            answer = await waiting
            assert getattr(answer, "request_id", "") == "r2", answer
            assert (await client.cluster()).term == before.term
            assert await client.cancel("r1") is True
            broker.stand_still()
            async with asyncio.timeout(WAIT_S / 4):
                await one.stop()
            broker.go_on()
        beating.cancel()
        await bus.close()


async def test_one_of_three_brokers_may_die(tmp_path: Path) -> None:
    """The one with the promises: another one of the cluster has them too."""
    subjects = Subjects("three")
    with broker_cluster(tmp_path) as brokers:
        url = ",".join(broker.url for broker in brokers)
        bus = await Bus.connect(url, "worker")
        beating = asyncio.ensure_future(beat_for_ever(bus, subjects))
        async with (
            asyncio.timeout(2 * WAIT_S),
            replica(url, "three", tmp_path / "a", stream_replicas=3) as one,
            asking(await one.leads()) as client,
        ):
            await client.accepted("r1")
            info = await bus.jetstream.stream_info(subjects.promises_stream)
            assert info.cluster is not None and info.cluster.leader is not None
            brokers[int(info.cluster.leader.removeprefix("n"))].kill()
            await client.accepted("r2")
            for request in ("r1", "r2"):
                while await client.cancel(request) is not True:
                    pass
        beating.cancel()
        await bus.close()


async def test_a_broker_that_comes_back_without_its_store_is_made_ready_again(
    tmp_path: Path,
) -> None:
    """What was promised is lost with it; the mesh serves on, above the terms that workers know."""
    with running_broker(tmp_path) as broker:
        bus = await Bus.connect(broker.url, "worker")
        beating = asyncio.ensure_future(beat_for_ever(bus, Subjects("lost")))
        async with (
            asyncio.timeout(WAIT_S),
            replica(broker.url, "lost", tmp_path / "a") as one,
            asking(await one.leads()) as client,
            replica(broker.url, "lost", tmp_path / "b"),
        ):
            await client.accepted("r1")
            before = await client.cluster()
            broker.kill()
            broker.lose_store()
            await broker.start_again()
            watch = LeaderWatch(bus, "lost")
            while not (address := await watch.next()):
                pass
            async with asking(address) as other:
                await other.accepted("r2")
                assert (await other.cluster()).term > before.term
            await watch.close()
        beating.cancel()
        await bus.close()


async def test_terms_that_workers_follow(
    nats_url: str, bus: Bus, subjects: Subjects, worker: None, tmp_path: Path
) -> None:
    """A later one ends this term, and the next is above it; an absurd one does nothing."""

    async def claim(term: int) -> None:
        beat = mesh_pb2.Heartbeat(worker="w0", incarnation="1", term=term)
        await bus.publish(subjects.heartbeat("w0"), beat)

    async with (
        asyncio.timeout(WAIT_S),
        replica(nats_url, subjects.cluster, tmp_path / "a") as one,
        asking(await one.leads()) as client,
    ):
        await client.accepted("r1")
        first = (await client.cluster()).term
        await claim(1 << 62)
        await client.accepted("r2")
        assert (await client.cluster()).term == first
        await claim(first + 5000)
        told = await client.cluster_with(lambda c: c.term != first)
        assert told.term == first + 5001
        assert [await client.cancel(name) for name in ("r1", "r2")] == [True, True]
        assert not one.serving.done()


async def test_two_supervisors_do_not_flap(
    nats_url: str, bus: Bus, subjects: Subjects, worker: None, tmp_path: Path
) -> None:
    """Each starts its replica again and again; one leads, and stays."""
    cluster = subjects.cluster
    async with (
        asyncio.timeout(WAIT_S),
        replica(nats_url, cluster, tmp_path / "a") as first,
        asking(await first.leads()) as one,
    ):
        term = (await one.cluster()).term
        for round_ in range(3):
            async with replica(nats_url, cluster, tmp_path / f"b{round_}"):
                await one.accepted(f"r{round_}")
        assert (await one.cluster()).term == term
        await until(lambda: endpoints.find(tmp_path / "a", "control"))
