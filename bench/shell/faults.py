"""What goes wrong, when, and for how long: drawn from the seed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc

from hocket.v1 import control_pb2, control_pb2_grpc

from . import roles
from .strangers import impersonate, intrude
from .world import World

SECOND_US = 1_000_000
_BEGIN_WITHIN_US = 4 * SECOND_US
_ALONE_S = 12.0  # longer than all grace: then nobody is left whom a fault could harm
_OF_NOBODY = ("broker stalls", "broker restarts", "broker freezes", "weather", "rogue")
_LASTS_S = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_LASTS_WEIGHTS = (6, 6, 6, 6, 4, 3, 1, 1)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    at_us: int
    kind: str
    target: str
    lasts_us: int
    other: str = ""  # the far end, where two processes are concerned

    def __str__(self) -> str:
        far = f" and {self.other}" if self.other else ""
        seconds = f"{self.at_us / 1e6:.3f} s for {self.lasts_us / 1e6:.3f} s"
        return f"{self.kind} {self.target}{far} at {seconds}"


def draw_faults(
    rng: random.Random, members: list[str], start_us: int, kinds: tuple[str, ...] = ()
) -> list[Fault]:
    """None to five faults; `kinds` restricts them."""
    count = rng.choice((0, 1, 1, 2, 2, 3, 4, 5))
    gateways = [name for name in members if name.startswith("gateway")]
    controls = [name for name in members if name.startswith("control")]
    faults = []
    for _ in range(count):
        kind = rng.choice(kinds or tuple(KINDS))
        target, other = rng.choice(members), ""
        if kind in ("part", "cut"):
            target, other = rng.choice(gateways), rng.choice([*controls, "callers"])
        elif kind.startswith(_OF_NOBODY):
            target = ""
        elif kind == "usurp":
            target = "control"
        elif kind in ("drain", "twin"):
            target = rng.choice([name for name in members if name.startswith("w")])
        elif rng.random() < 0.3:
            target = rng.choice(controls)
        at_us = start_us + rng.randrange(_BEGIN_WITHIN_US)
        lasts_us = round(rng.choices(_LASTS_S, _LASTS_WEIGHTS)[0] * (0.5 + rng.random()) * 1e6)
        faults.append(Fault(at_us, kind, target, lasts_us, other))
    return sorted(faults, key=lambda fault: fault.at_us)


async def inflict(world: World, faults: list[Fault]) -> None:
    """Lets all of them happen, and returns when all are over."""
    async with asyncio.TaskGroup() as tasks:
        for fault in faults:
            tasks.create_task(_happen(world, fault))


async def _happen(world: World, fault: Fault) -> None:
    await asyncio.sleep(max(0, fault.at_us - world.now_us) / 1e6)
    await KINDS[fault.kind](world, fault)


async def _last(world: World, fault: Fault) -> None:
    """Its time; less where every caller has its answer and nothing more can come of it."""
    lasts_s = fault.lasts_us / 1e6
    try:
        async with asyncio.timeout(lasts_s):
            await world.answered.wait()
    except TimeoutError:
        return
    left_s = fault.at_us / 1e6 + lasts_s - world.now_us / 1e6
    await asyncio.sleep(max(0.0, min(left_s, _ALONE_S)))


async def _kill(world: World, fault: Fault) -> None:
    member = world.members[fault.target]
    member.wanted = False
    await world.kill(fault.target)
    await _last(world, fault)
    member.wanted = True
    world.start(fault.target)


async def _terminate(world: World, fault: Fault) -> None:
    member = world.members[fault.target]
    member.wanted = False
    world.terminate(fault.target)
    await world.until(lambda: member.process is None, 30 * SECOND_US)
    await _last(world, fault)
    member.wanted = True
    world.start(fault.target)


async def _stop(world: World, fault: Fault) -> None:
    process = world.members[fault.target].process
    if process is None or process.dead:
        return
    process.stop()
    await _last(world, fault)
    process.resume()


async def _broker_stalls(world: World, fault: Fault) -> None:
    world.broker.stall()
    await _last(world, fault)
    world.broker.go_on()


async def _broker_restarts(world: World, fault: Fault) -> None:
    world.broker.crash()
    await asyncio.sleep(min(fault.lasts_us, 5 * SECOND_US) / 1e6)
    world.broker.start()


async def _broker_freezes_and_dies(world: World, fault: Fault) -> None:
    """What was sent to it while it stood still is lost."""
    world.broker.stall()
    await _last(world, fault)
    world.broker.crash()
    await asyncio.sleep(0.2)
    world.broker.start()


async def _usurp(world: World, fault: Fault) -> None:
    """A further control replica comes, and stays for a while."""
    name = f"control-{len(world.members)}"
    world.add(name, roles.control(len(world.members)))
    await _last(world, fault)
    world.members[name].wanted = False
    world.terminate(name)
    await world.until(lambda: world.members[name].process is None, 10 * SECOND_US)


async def _drain(world: World, fault: Fault) -> None:
    """An operator's wish, which outlives the worker and the leader, until it is taken back."""
    if not await _wish(world, fault.target, undo=False):
        return
    since_us = world.now_us
    await _last(world, fault)
    until_us = world.now_us
    earlier = world.undrained_us.get(fault.target, 0)
    if await _wish(world, fault.target, undo=True) and earlier < since_us:
        world.drained.append((fault.target, since_us, until_us))
    world.undrained_us[fault.target] = world.now_us


async def _wish(world: World, worker: str, *, undo: bool) -> bool:
    """Tells control, as `hocket drain` does; whether it said yes."""
    process = world.loop.process("operator")
    request = control_pb2.DrainWorkerRequest(worker=worker, undo=undo)

    async def tell() -> bool:
        for _ in range(60):
            channel = grpc.aio.insecure_channel(world.leader_address() or "nowhere:1")
            try:
                stub = control_pb2_grpc.ControlServiceStub(channel)
                await stub.DrainWorker(request, timeout=5.0)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND and not undo:
                    return False
                await asyncio.sleep(0.5)
            else:
                return True
            finally:
                await channel.close()
        return False

    try:
        return await process.start(tell())
    finally:
        await process.kill()


async def _broker_cut(world: World, fault: Fault) -> None:
    clients = world.clients_of(fault.target)
    for client in clients:
        client.barred = True
        client.cut()
    await _last(world, fault)
    for client in clients:
        client.barred = False


async def _broker_held(world: World, fault: Fault) -> None:
    connections = [c.connection for c in world.clients_of(fault.target)]
    for connection in connections:
        if connection is not None:
            connection.hold()
    await _last(world, fault)
    for connection in connections:
        if connection is not None:
            connection.release()


async def _part(world: World, fault: Fault) -> None:
    world.network.part(fault.target, fault.other)
    await _last(world, fault)
    world.network.join(fault.target, fault.other)


async def _cut(world: World, fault: Fault) -> None:
    world.network.cut(fault.target, fault.other)


def _weather(**bad: float) -> Callable[[World, Fault], Coroutine[Any, Any, None]]:
    async def happen(world: World, fault: Fault) -> None:
        for name, value in bad.items():
            setattr(world.weather, name, value)
        await _last(world, fault)
        for name in bad:
            setattr(world.weather, name, 0)

    return happen


async def _rogue(world: World, fault: Fault) -> None:
    await intrude(world, fault.at_us, fault.lasts_us)


async def _twin(world: World, fault: Fault) -> None:
    await impersonate(world, fault.target, fault.lasts_us)


STRANGE = ("rogue", "twin")  # kinds that cost nobody anything
KINDS: dict[str, Callable[[World, Fault], Coroutine[Any, Any, None]]] = {
    "kill": _kill,
    "terminate": _terminate,
    "stop": _stop,
    "broker stalls": _broker_stalls,
    "broker restarts": _broker_restarts,
    "broker freezes and dies": _broker_freezes_and_dies,
    "usurp": _usurp,
    "drain": _drain,
    "broker cut from": _broker_cut,
    "broker held from": _broker_held,
    "part": _part,
    "cut": _cut,
    "rogue": _rogue,
    "twin": _twin,
    "weather drops": _weather(drop=0.05),
    "weather doubles": _weather(duplicate=0.05),
    "weather is slow": _weather(slow=0.1, slow_us=800_000),
    "weather loses answers": _weather(lost_answer=0.3),
}
