"""Puts the simulated world under the services' feet: broker client, gRPC, time and chance.

Services are run as they are. What they would open to the outside they open through these libraries'
own names, which stand for simulated ones while a world runs: `nats` connections of
`hocket.messaging.bus`, `grpc.aio` channels and servers, the clocks behind `hocket.clock`, the
numbers that `secrets` draws.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import grpc

from control import config
from control.leading import promises
from hocket import clock
from hocket.messaging import bus

from .loop import SimulatedProcess, current_process
from .messaging.client import Client
from .messaging.jetstream import JetStream
from .rpc.link import WINDOW, Channel
from .rpc.served import Server

if TYPE_CHECKING:
    from .world import World

_LANES = 4  # of promises: each costs every new leader an append, and every standby a message
_UNIX_NS = 1_800_000_000 * 10**9


class _Time:
    """Stands for the module `time` in hocket/clock.py."""

    def __init__(self, world: World) -> None:
        self._world = world

    def time_ns(self) -> int:
        return _UNIX_NS + self._world.loop.now_us * 1000

    def monotonic_ns(self) -> int:
        return self._world.loop.now_us * 1000

    perf_counter_ns = thread_time_ns = monotonic_ns


@contextmanager
def installed(world: World) -> Iterator[None]:
    """Everything that is made inside belongs to the world and to the process that makes it."""
    names = iter(range(1 << 60))
    draw = random.Random(world.seed)

    def client(*_: object, **__: object) -> Client:
        process = here()
        made = Client(world.broker, process, f"{process.name}-{next(names)}")
        made.jetstream_of = JetStream
        world.clients.append(made)
        return made

    def channel(target: str, *_: object, options: Any = (), **__: object) -> Channel:
        return Channel(world.network, here(), target, dict(options or ()).get(WINDOW))

    def server(*_: object, interceptors: Sequence[Any] = (), **__: object) -> Server:
        return Server(world.network, here(), tuple(interceptors or ()))

    async def no_wait(*_: object) -> None:
        """The simulated client waits for its broker by itself."""

    replaced: list[tuple[object, str, object]] = [
        (bus, "Client", client),
        (bus, "_wait_for_port", no_wait),
        (grpc.aio, "insecure_channel", channel),
        (grpc.aio, "secure_channel", lambda target, credentials, **k: channel(target)),
        (grpc.aio, "server", server),
        (clock, "time", _Time(world)),
        (promises, "LANES", _LANES),
        (config, "_ASSETS", world.state_dir),  # its profile alone: reading all takes milliseconds
        (secrets, "token_hex", _hex(draw)),
        (secrets, "token_bytes", lambda size=32: draw.randbytes(size)),
        (secrets, "randbits", draw.getrandbits),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in replaced:
            stack.enter_context(patch.object(owner, name, stand_in))
        yield


def here() -> SimulatedProcess:
    """The process whose code is running."""
    process = current_process()
    assert process is not None, "connections are made inside of processes"
    return process


def _hex(draw: random.Random) -> Callable[[int], str]:
    def token_hex(size: int = 32) -> str:
        return draw.randbytes(size).hex()

    return token_hex
