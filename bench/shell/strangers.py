"""Who should not be there: a sender of payloads that no door may take, a second worker of one name.

What a stranger says must be refused and counted, and cost nobody else anything.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from hocket.messaging.bus import Subjects
from hocket.v1 import (
    control_pb2,
    control_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    mesh_pb2,
    types_pb2,
)

from . import roles
from .messaging.client import Client
from .toy_model import CLUSTER, MODEL, emulated_host
from .world import World

SECOND_US = 1_000_000
_PAYLOADS = 6  # of one stranger
_HIGH = 1 << 62  # a term that was never held
_LONG = "x" * 5_000
_SUBJECTS = Subjects(CLUSTER)
STRANGER = "stranger"  # an incarnation
GARBAGE = b"\xff\xff\xff\xff"  # no protobuf


def _beat(**fields: Any) -> mesh_pb2.Heartbeat:
    sound: dict[str, Any] = {"worker": "w0", "incarnation": STRANGER, "term": 0, "sequence": 1}
    return mesh_pb2.Heartbeat(**(sound | fields))


def _report(**fields: Any) -> mesh_pb2.StepReport:
    sound: dict[str, Any] = {
        "worker": "w0",
        "incarnation": STRANGER,
        "term": 1,
        "sequence": 1,
        "node": "dit",
    }
    return mesh_pb2.StepReport(**(sound | fields))


def _assign(**fields: Any) -> mesh_pb2.Assign:
    return mesh_pb2.Assign(term=fields.pop("term", 1), **fields)


# What comes over the broker, by the role that it is for.
TO_CONTROL: tuple[tuple[str, Message | bytes], ...] = (
    (_SUBJECTS.heartbeat("w0"), _beat(worker="a b")),
    (_SUBJECTS.heartbeat("w0"), _beat(worker=_LONG)),
    (_SUBJECTS.heartbeat("w0"), _beat(term=_HIGH)),
    (_SUBJECTS.heartbeat("w0"), _beat(incarnation="")),
    (_SUBJECTS.heartbeat("w0"), _beat(sequence=_HIGH + 1)),
    (_SUBJECTS.heartbeat("w0"), b""),
    (_SUBJECTS.heartbeat("w0"), GARBAGE),
    (_SUBJECTS.report("w0"), _report(worker="a.*")),
    (_SUBJECTS.report("w0"), _report(term=_HIGH)),
    (_SUBJECTS.report("w0"), _report(node="no node")),
    (_SUBJECTS.report("w0"), _report(members=["a b"])),
    (_SUBJECTS.report("w0"), _report(step_time_us=[_HIGH])),
    (_SUBJECTS.report("w0"), _report(results=[mesh_pb2.StepResult(request_id=_LONG)])),
    (_SUBJECTS.report("w0"), GARBAGE),
)
TO_WORKERS: tuple[tuple[str, Message | bytes], ...] = (
    (_SUBJECTS.assign("w0"), _assign(term=1 << 60)),
    (_SUBJECTS.assign("w0"), _assign(released=["a b"])),
    (_SUBJECTS.assign("w0"), _assign(assignments=[mesh_pb2.Assignment(term=1, sequence=1)])),
    (_SUBJECTS.assign("w0"), GARBAGE),
    (_SUBJECTS.truncate("w0"), mesh_pb2.Truncate(term=1 << 60, request_id="r")),
    (_SUBJECTS.truncate("w0"), mesh_pb2.Truncate(term=1, request_id="")),
    (_SUBJECTS.latent("w0"), mesh_pb2.LatentRequest(request_id=_LONG)),
    (_SUBJECTS.latent("w0"), GARBAGE),
)


def _submit(name: str = "stranger", **fields: Any) -> control_pb2.SubmitRequest:
    return control_pb2.SubmitRequest(request_id=name, request=_wish(**fields))


def _wish(width: int = 64, key: str = "", **fields: Any) -> generation_pb2.GenerateRequest:
    shape = types_pb2.Shape(width=width, height=64)
    sound: dict[str, Any] = {"model": MODEL, "prompt": "a fox", "steps": 2, "shape": shape}
    spec = types_pb2.GenerationSpec(**(sound | fields))
    return generation_pb2.GenerateRequest(spec=spec, idempotency_key=key)


# What comes by a call: the leader's, and a gateway's.
SUBMITS = (
    _submit(steps=0),
    _submit(width=0),
    _submit(guidance_scale=math.nan),
    _submit(name=""),
    _submit(name=_LONG),
    _submit(model="a b"),
)
WISHES = (
    _wish(steps=1 << 30),
    _wish(width=63),
    _wish(guidance_scale=math.inf),
    _wish(key=_LONG),
    _wish(prompt="a\0fox"),
)


async def intrude(world: World, at_us: int, lasts_us: int) -> None:
    """Says some of it, at moments within `lasts_us`; what and when is drawn by `at_us`."""
    process = world.loop.process("stranger")
    rng = random.Random(f"{world.seed} {at_us}")
    pause_us = min(lasts_us, 4 * SECOND_US) // _PAYLOADS

    async def say() -> None:
        client = Client(world.broker, process, f"stranger-{at_us}")
        await client.connect()
        for _ in range(_PAYLOADS):
            deed: Callable[[], Any] = rng.choice(
                (
                    lambda: _publish(world, client, rng.choice(TO_CONTROL)),
                    lambda: _publish(world, client, rng.choice(TO_WORKERS)),
                    lambda: _call_control(world, rng.choice(SUBMITS)),
                    lambda: _call_gateway(world, rng.choice(WISHES)),
                )
            )
            await deed()
            await asyncio.sleep(rng.random() * 2 * pause_us / 1e6)

    try:
        await process.start(say())
    finally:
        await process.kill()


async def _publish(world: World, client: Client, what: tuple[str, Message | bytes]) -> None:
    subject, payload = what
    if subject.endswith(".w0"):
        workers = [n for n in world.members if n.startswith("w") and " " not in n]
        subject = subject.removesuffix("w0") + world.rng.choice(workers)
    data = payload if isinstance(payload, bytes) else payload.SerializeToString()
    world.tally.heard += what in TO_CONTROL
    await client.publish(subject, data)


async def _call_control(world: World, submit: control_pb2.SubmitRequest) -> None:
    address = world.leader_address()
    if not address:
        return
    channel = grpc.aio.insecure_channel(address)
    stub = control_pb2_grpc.ControlServiceStub(channel)
    code = await _status(stub.Submit(submit, timeout=5.0))
    await channel.close()
    if code is not grpc.StatusCode.FAILED_PRECONDITION:  # another one leads by now
        world.tally.note_status("Submit", code)


async def _call_gateway(world: World, wish: generation_pb2.GenerateRequest) -> None:
    channel = grpc.aio.insecure_channel(roles.gateway_address(world.rng.randrange(2)))
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.CreateGenerationRequest(request=wish)
    code = await _status(stub.CreateGeneration(request, timeout=5.0))
    await channel.close()
    world.tally.note_status("CreateGeneration", code)


async def _status(call: Any) -> grpc.StatusCode | None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return None


async def troubles(world: World) -> dict[str, int]:
    """What the leader has counted, as it tells whoever watches the cluster; {}: nobody leads."""
    process = world.loop.process("onlooker")

    async def look() -> dict[str, int]:
        channel = grpc.aio.insecure_channel(world.leader_address() or "nowhere:1")
        stub = control_pb2_grpc.ControlServiceStub(channel)
        try:
            async for state in stub.WatchCluster(control_pb2.WatchClusterRequest()):
                return dict(state.troubles)
        except grpc.aio.AioRpcError:
            pass  # then it has counted nothing
        finally:
            await channel.close()
        return {}

    try:
        return await process.start(look())
    finally:
        await process.kill()


async def impersonate(world: World, worker: str, lasts_us: int) -> None:
    """A second worker of that name comes, on another host, and stays as long as it may."""
    name = f"{worker} again"
    if name in world.members:
        return
    host = emulated_host(world.loop)
    member = world.add(name, roles.worker(int(worker[1:]), host, key=name), wanted=False)
    await world.until(lambda: member.process is None, max(lasts_us, 6 * SECOND_US))
    world.terminate(name)
    await world.until(lambda: member.process is None, 10 * SECOND_US)
    await world.kill(name)
