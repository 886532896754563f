"""Who a worker is: its name, its incarnation, the address that others are told."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gpuworker.config import WorkerSettings
from gpuworker.mesh.claim import claimed
from gpuworker.mesh.naming import NameRefused, advertised_address, host_word, worker_name
from hocket.config import load
from hocket.errors import WrongConfig
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import mesh_pb2
from tests.worker_shell.desk import WAIT_S, desk, job

ROOT = Path(__file__).parents[2]
PROFILE = "model,node,width,height,frames,degree,batch,call_us\nm,text,8,8,1,1,1,1000\n"


def test_two_hosts_started_by_one_command_give_different_names() -> None:
    names = {
        worker_name(WorkerSettings(host=host), index)
        for host in ("gpu1.example.com", "gpu2.example.com", "gpu1.example.org")
        for index in range(8)
    }
    assert len(names) == 24
    assert worker_name(WorkerSettings(host="Node_7.local"), 3) == "node-7-local-3"
    assert worker_name(WorkerSettings(host="gpu1", name_prefix="w"), 0) == "w0"


def test_a_long_host_is_cut_and_still_told_from_another() -> None:
    one, other = (host_word("a" * 60 + end) for end in ("x", "y"))
    assert one != other and len(one) <= 40
    assert host_word("...") == "host"


@pytest.mark.parametrize("prefix", ["gpu.example.com-", "a b", "", "W", "-w", "w*", "w" * 60])
def test_a_prefix_that_the_bus_would_not_carry_is_refused(prefix: str) -> None:
    with pytest.raises(WrongConfig) as refused:
        load(WorkerSettings, {"name_prefix": prefix})
    assert refused.value.key == "--name-prefix" and refused.value.value == prefix
    assert "[a-z0-9-]" in refused.value.allowed


def test_beyond_loopback_others_are_told_an_address_they_can_reach() -> None:
    local = WorkerSettings()
    assert advertised_address(local) == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 4222))
        except OSError:
            pytest.skip("this host has no way out")
        mine = probe.getsockname()[0]
    away = WorkerSettings(nats_url="nats://192.0.2.1:4222")
    assert advertised_address(away) == mine != "127.0.0.1"
    assert advertised_address(WorkerSettings(nats_url=away.nats_url, advertise="gpu1")) == "gpu1"


async def test_of_two_processes_of_one_name_the_one_that_is_meant_runs(
    nats_url: str, tmp_path: Path
) -> None:
    cluster = "two-alike"
    async with (
        desk(nats_url, tmp_path, cluster) as one,
        desk(nats_url, tmp_path, cluster) as other,
    ):
        meant = one.agent.incarnation
        await one.assign(incarnation=meant, assignments=[job(1, "text")])
        report = await one.report()
        assert (report.incarnation, report.last) == (meant, True)
        await other.settle()
        assert other.executor.progress() == (0, 0) and not other.executor.held()
        # A truncation that means one leaves the other's latents alone.
        await other.assign(incarnation=other.agent.incarnation, assignments=[job(2, "text", "s")])
        while (report := await other.report()).incarnation == meant:
            pass
        stop = mesh_pb2.Truncate(
            term=1, request_id="s", release=True, incarnation=one.agent.incarnation
        )
        await one.bus.publish(one.subjects.truncate("w0"), stop)
        await one.settle()
        await other.settle()
        assert [h.request_id for h in other.executor.held()] == ["s"]


async def test_a_refused_process_ends_and_the_other_one_stays(
    nats_url: str, tmp_path: Path
) -> None:
    cluster = "refused"
    async with (
        desk(nats_url, tmp_path, cluster) as one,
        desk(nats_url, tmp_path, cluster) as other,
    ):
        await one.assign(incarnation=other.agent.incarnation, refused="w0 lives on gpu1")
        with pytest.raises(NameRefused, match="w0 lives on gpu1"):
            async with asyncio.timeout(WAIT_S):
                await other.running
        await one.settle()
        assert not one.running.done()
        assert not one.beats.pending or not (await one.beat()).leaving, "no goodbye in its name"


def test_a_second_process_of_a_name_touches_nothing_of_the_first(tmp_path: Path) -> None:
    with claimed(tmp_path, "w0") as folder:
        folder.mkdir()
        with pytest.raises(NameRefused, match="another living process"), claimed(tmp_path, "w0"):
            raise AssertionError
        with claimed(tmp_path, "w1") as other:
            assert other != folder
    with claimed(tmp_path, "w0") as again:
        assert again == folder


async def test_the_command_says_in_one_line_that_its_name_is_refused(
    nats_url: str, tmp_path: Path
) -> None:
    bus, subjects = await Bus.connect(nats_url, "leader"), Subjects("refused-command")
    beats = await bus.follow(subjects.heartbeat("*"), mesh_pb2.Heartbeat)
    (tmp_path / "profile.csv").write_text(PROFILE)
    command = [sys.executable, "-m", "gpuworker", "--executor=emulated", "--host=Gpu1.example"]
    command += [f"--profile={tmp_path / 'profile.csv'}", f"--nats-url={nats_url}"]
    command += [f"--cluster={subjects.cluster}", f"--state-dir={tmp_path}"]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        async with asyncio.timeout(WAIT_S):
            beat = await beats.next()
            assert beat.worker == "gpu1-example-0"
            message = mesh_pb2.Assign(term=1, incarnation=beat.incarnation, refused="taken")
            await bus.publish(subjects.assign(beat.worker), message)
            _, told = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 3
    last = told.strip().splitlines()[-1]
    assert b"taken" in last and b"Traceback" not in told
    await bus.close()
