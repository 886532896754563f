"""A broker that stands still or is away ends no worker, and loses no report."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpuworker.agent import Agent
from hocket.launching.broker import nats_server_binary
from hocket.messaging.bus import Bus
from hocket.v1 import mesh_pb2
from tests.waiting import until
from tests.worker_shell.desk import WAIT_S, Desk, desk, job

STEPS = 200
Start = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start(port: int, tmp_path: Path) -> Iterator[Start]:
    """Starts a broker of the test's own, again and again on one port."""
    started: list[subprocess.Popen[bytes]] = []
    command = [str(nats_server_binary()), "-a", "127.0.0.1", "-p", str(port), "-js"]
    command += ["-sd", str(tmp_path / "store"), "-l", str(tmp_path / "log")]

    def again() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(command))
        return started[-1]

    yield again
    for server in started:
        server.kill()
        server.wait()


async def run_on(one: Desk) -> None:
    """The steps that were given go on, whatever the broker does."""
    async with asyncio.timeout(WAIT_S):
        while one.executor.pending():
            wake_us = one.clock.next_wake_us()
            if wake_us is not None and wake_us < 1 << 39:
                one.clock.advance_to(wake_us)
            await asyncio.sleep(0)


async def hear(one: Desk, reports: list[mesh_pb2.StepReport]) -> None:
    """Every report up to the last one."""
    while not reports or not reports[-1].last:
        reports.append(await one.report())


@pytest.mark.parametrize("how", ["stands still", "is started again"])
async def test_steps_go_on_and_reports_come_after(
    how: str, port: int, start: Start, tmp_path: Path
) -> None:
    server, url = start(), f"nats://127.0.0.1:{port}"
    async with desk(url, tmp_path, "away") as one:
        await one.assign(assignments=[job(1, "text"), job(2, "dit", steps=STEPS)])
        assert (await one.report()).sequence == 1
        await one.settle()
        if how == "stands still":
            server.send_signal(signal.SIGSTOP)
        else:
            server.kill()
            server.wait()
            await until(lambda: not one.bus._client.is_connected)  # what is on its way may be lost
        before = one.executor.pending()
        await run_on(one)
        assert before == (2,) and not one.running.done()
        if how == "stands still":
            server.send_signal(signal.SIGCONT)
        else:
            start()
        reports: list[mesh_pb2.StepReport] = []
        async with asyncio.timeout(WAIT_S):
            await hear(one, reports)
        assert [r.results[0].steps_done for r in reports] == list(range(1, STEPS + 1))
        assert [r.report_sequence for r in reports] == list(range(2, STEPS + 2))
        assert one.agent._reports.is_idle


async def test_a_full_buffer_holds_reports_up_and_loses_none(
    nats_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each third message finds no room: in order they come all the same, and the steps wait."""
    publish, count = Bus.publish, 0

    async def crowded(bus: Bus, subject: str, message: object) -> None:
        nonlocal count
        count += 1
        if ".report." in subject and count % 3:
            bus.drops += 1
        else:
            await publish(bus, subject, message)  # type: ignore[arg-type]

    monkeypatch.setattr(Bus, "publish", crowded)
    async with desk(nats_url, tmp_path, "crowded") as one:
        await one.assign(assignments=[job(1, "text"), job(2, "dit", steps=STEPS)])
        reports = [await one.report()]
        assert reports.pop().sequence == 1
        async with asyncio.timeout(WAIT_S):
            await hear(one, reports)
        assert [r.results[0].steps_done for r in reports] == list(range(1, STEPS + 1))


async def test_goodbye_to_a_broker_that_stands_still_has_an_end(
    port: int, start: Start, tmp_path: Path
) -> None:
    server, url = start(), f"nats://127.0.0.1:{port}"
    async with desk(url, tmp_path, "goodbye") as one:
        server.send_signal(signal.SIGSTOP)
        one.agent.stop()
        async with asyncio.timeout(WAIT_S):
            await one.running
        assert isinstance(one.agent, Agent)
        server.send_signal(signal.SIGCONT)
