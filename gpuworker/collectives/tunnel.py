"""Mutual TLS around the stores in which workers meet and offer latents.

torch's TCPStore knows neither encryption nor callers. With an identity, the store listens on the
loopback only; this puts a listener in front of it that lets in certificates of the cluster's CA
whose name is a worker's, and carries calls to other workers' stores the same way.

    store ◀─ loopback ─ expose ◀═══ TLS, both sides checked ═══ reach ◀─ loopback ─ a store's client

It runs an event loop on a thread of its own; bytes never pass the compute thread or the agent's.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
from collections import OrderedDict
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from hocket.security.certificates import common_name
from hocket.security.identity import Identity

log = logging.getLogger(__name__)
T = TypeVar("T")

_CONNECT_S = 10.0
_CALL_S = 30.0
_PIECE_BYTES = 256 << 10
_REACHED_MAX = 1024  # other workers' stores; those asked for longest ago are forgotten
_WORKER = common_name("worker")
_LOOPBACK = "127.0.0.1"


class Tunnel:
    """One process's listeners. Thread-safe."""

    def __init__(self, identity: Identity) -> None:
        self._listening = identity.ssl_context(server=True)
        self._calling = identity.ssl_context()
        self._loop = asyncio.new_event_loop()
        self._reached: OrderedDict[str, asyncio.Server] = OrderedDict()
        self._servers: list[asyncio.Server] = []
        self._pipes: set[asyncio.Task[None]] = set()
        self.refused = 0  # callers without a worker's certificate
        self._thread = threading.Thread(target=self._loop.run_forever, name="tunnel", daemon=True)
        self._thread.start()

    def expose(self, host: str, port: int) -> int:
        """Listens on `host` and carries what comes to the loopback's `port`; returns its own port.

        Raises OSError.
        """
        return self._do(self._expose(host, port))

    def reach(self, address: str) -> str:
        """A loopback address that leads to the worker's store at `address` ("host:port")."""
        return self._do(self._reach(address))

    def close(self) -> None:
        """Ends every connection."""
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)

    async def _expose(self, host: str, port: int) -> int:
        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not _is_worker(writer):
                self.refused += 1
                log.warning("refused a caller without a worker's certificate")
                writer.close()
                return
            await self._splice(reader, writer, _LOOPBACK, port, None)

        server = await asyncio.start_server(carry, host, 0, ssl=self._listening)
        self._servers.append(server)
        found: int = server.sockets[0].getsockname()[1]
        return found

    async def _reach(self, address: str) -> str:
        server = self._reached.get(address)
        if server is None:
            host, _, port = address.rpartition(":")

            async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await self._splice(reader, writer, host, int(port), self._calling)

            server = self._reached[address] = await asyncio.start_server(carry, _LOOPBACK, 0)
            while len(self._reached) > _REACHED_MAX:
                _, old = self._reached.popitem(last=False)
                old.close()
        self._reached.move_to_end(address)
        return f"{_LOOPBACK}:{server.sockets[0].getsockname()[1]}"

    async def _splice(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
    ) -> None:
        """Joins a connection to a new one, until either side ends."""
        task = asyncio.current_task()
        assert task is not None, "a stream's handler runs in a task"
        self._pipes.add(task)
        ends = [writer]
        try:
            async with asyncio.timeout(_CONNECT_S):
                named = _WORKER if tls is not None else None
                there, back = await asyncio.open_connection(
                    host, port, ssl=tls, server_hostname=named
                )
            ends.append(back)
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, back))
                both.create_task(_pump(there, writer))
        except (OSError, TimeoutError, ssl.SSLError) as error:
            log.debug("no way to %s:%d: %s", host, port, error)
        except asyncio.CancelledError:
            log.debug("a connection to %s:%d ends with the tunnel", host, port)
        finally:
            self._pipes.discard(task)
            for end in ends:
                end.close()

    async def _close(self) -> None:
        for server in (*self._servers, *self._reached.values()):
            server.close()
        for pipe in tuple(self._pipes):
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError, ssl.SSLError):
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
    with suppress(OSError, RuntimeError):
        writer.close()


def _is_worker(writer: asyncio.StreamWriter) -> bool:
    shown = writer.get_extra_info("peercert") or {}
    names = [value for kind, value in shown.get("subjectAltName", ()) if kind == "DNS"]
    return _WORKER in names
