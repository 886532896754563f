"""Payloads that cannot be meant: a worker lets them go, and serves on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpuworker.mesh.door import TERM_RISE_MAX, Door
from hocket.messaging.bus import Bus, Subjects
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker_shell.desk import WAIT_S, Desk, desk, job
from tests.worker_shell.test_identity import PROFILE, ROOT

WILD_TERM = 1 << 60


async def serves(one: Desk, sequence: int = 1, term: int = 1) -> None:
    """The leader's next assignment is run."""
    await one.assign(term=term, assignments=[job(sequence, "text", term=term)])
    report = await one.report()
    assert (report.sequence, report.last) == (sequence, True)


async def test_a_wild_term_makes_nobody_deaf(nats_url: str, tmp_path: Path) -> None:
    async with desk(nats_url, tmp_path, "wild-term") as one:
        await one.assign(term=WILD_TERM, assignments=[job(1, "text", term=WILD_TERM)])
        wild = mesh_pb2.Truncate(term=WILD_TERM, request_id="r")
        await one.bus.publish(one.subjects.truncate("w0"), wild)
        await serves(one)
        await serves(one, term=2)
        await serves(one, term=2 + TERM_RISE_MAX)
        await one.assign(term=1, assignments=[job(7, "text")])  # of a deposed leader
        await one.settle()
        assert one.executor.progress() == (2 + TERM_RISE_MAX, 1)


def spoiled(**fields: object) -> mesh_pb2.Assignment:
    made = job(1, "dit")
    for name, value in fields.items():
        if isinstance(value, list):
            made.ClearField(name)  # type: ignore[arg-type]
            getattr(made, name).extend(value)
        else:
            setattr(made, name, value)
    return made


def named(request: str) -> mesh_pb2.Assignment:
    return job(1, "dit", request)


def called(**fields: object) -> mesh_pb2.Assignment:
    """A call of a workflow's, spoiled."""
    made = job(1, "two")
    call = mesh_pb2.NodeCall(op="decode", outputs=["two.image"])
    call.inputs.add(port="latents", artifact="one.latents")
    for name, value in fields.items():
        if isinstance(value, list):
            call.ClearField(name)  # type: ignore[arg-type]
            getattr(call, name).extend(value)
        elif isinstance(value, str):
            setattr(call, name, value)
        else:
            call.shape.CopyFrom(value)  # type: ignore[arg-type]
    made.batch[0].call.CopyFrom(call)
    return made


def mixed() -> mesh_pb2.Assignment:
    """A plain chain's job beside a workflow's."""
    made = called()
    made.batch.add().CopyFrom(job(1, "dit", "s").batch[0])
    return made


def shared() -> mesh_pb2.Assignment:
    """A call that is made once, on two workers."""
    made = called()
    made.group.members.append("w1")
    return made


def wide(side: int) -> mesh_pb2.Assignment:
    made = job(1, "dit")
    made.batch[0].spec.shape.width = side
    return made


@pytest.mark.parametrize(
    "assignment",
    [
        spoiled(batch=[]),
        spoiled(batch=list(job(1, "dit", "r").batch) * 2),
        spoiled(batch=list(job(1, "dit", *map(str, range(40))).batch)),
        spoiled(steps=0),
        spoiled(steps=1 << 31),
        spoiled(node="rm"),
        spoiled(term=2),
        spoiled(sequence=0),
        spoiled(collective_timeout_us=1 << 62),
        job(1, "dit", workers=("w1",)),
        job(1, "dit", workers=("w0", "w0")),
        job(1, "dit", workers=("w0", "a b")),
        named("a b"),
        named("\x00"),
        named("x" * 5000),
        wide(1 << 31),
        called(op="rm"),
        called(outputs=[]),
        called(outputs=["a b"]),
        called(inputs=[mesh_pb2.NodeInput(port="rm", artifact="one.latents")]),
        called(inputs=[mesh_pb2.NodeInput(port="latents", artifact="x" * 5000)]),
        called(inputs=[mesh_pb2.NodeInput(port="latents", object_name="a\x00b")]),
        called(inputs=[mesh_pb2.NodeInput(port="latents", artifact="a.b")] * 40),
        called(shape=types_pb2.Shape(width=1 << 31)),
        mixed(),
        shared(),
    ],
)
async def test_an_assignment_that_cannot_be_meant_is_let_go(
    assignment: mesh_pb2.Assignment, nats_url: str, tmp_path: Path
) -> None:
    async with desk(nats_url, tmp_path, "spoiled") as one:
        await one.assign(assignments=[assignment])
        await one.settle()
        assert one.executor.progress() == (0, 0)
        await serves(one)


def test_what_is_let_go_is_counted() -> None:
    door = Door("w0", "here")
    assert door.takes_assign(mesh_pb2.Assign(term=1, assignments=[job(1, "text")]), 0)
    assert not door.takes_assign(mesh_pb2.Assign(term=WILD_TERM), 0)
    assert not door.takes_assign(mesh_pb2.Assign(term=1, incarnation="there"), 0)
    assert door.takes_assign(mesh_pb2.Assign(term=1, assignments=[called()]), 0)
    assert not door.takes_request(mesh_pb2.LatentRequest(request_id="r", wait_us=1 << 50))
    assert (door.refused, door.astray) == (2, 1)


async def test_rogue_requests_for_latents_are_answered_or_dropped_without_a_trace(
    nats_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with desk(nats_url, tmp_path, "rogue") as one:
        subject = one.subjects.latent("w0")
        for asked in (
            mesh_pb2.LatentRequest(request_id="r", wait_us=(1 << 64) - 1),
            mesh_pb2.LatentRequest(request_id=""),
            mesh_pb2.LatentRequest(request_id="\n" * 200),
        ):
            reply = await one.bus.request(subject, asked, mesh_pb2.LatentReply, 5_000_000)
            assert reply.failure.reason == "INVALID_REQUEST"
        await serves(one)
    assert not [record for record in caplog.records if record.exc_info]


async def test_sigterm_works_after_whatever_was_said(nats_url: str, tmp_path: Path) -> None:
    bus, subjects = await Bus.connect(nats_url, "rogue"), Subjects("wild-process")
    beats = await bus.follow(subjects.heartbeat("*"), mesh_pb2.Heartbeat)
    (tmp_path / "profile.csv").write_text(PROFILE)
    command = [sys.executable, "-m", "gpuworker", "--executor=emulated", "--name-prefix=w"]
    command += [f"--profile={tmp_path / 'profile.csv'}", f"--nats-url={nats_url}"]
    command += [f"--cluster={subjects.cluster}", f"--state-dir={tmp_path}"]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        async with asyncio.timeout(WAIT_S):
            await beats.next()
            for term in (WILD_TERM, (1 << 64) - 1):
                message = mesh_pb2.Assign(term=term, assignments=[job(1, "text", term=term)])
                await bus.publish(subjects.assign("w0"), message)
            await bus.flush()
            assert (await beats.next()).term == 0
            process.send_signal(signal.SIGTERM)
            _, told = await process.communicate()
            while not (beat := await beats.next()).leaving:
                pass
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0 and b"Traceback" not in told
    assert beat.stopping
    await bus.close()
