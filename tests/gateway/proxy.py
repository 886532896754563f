"""A wire that a test can cut: TCP in the middle, so that both ends see what a crash looks like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Passes connections on until it is cut."""

    target: str
    address: str = ""
    down: bool = False
    passed_bytes: int = 0  # from the target to its callers
    cut_after_bytes: int = 1 << 60
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def cut(self) -> None:
        """Every connection breaks, and new ones are refused until `down` is taken back."""
        self.down = True
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            writer.transport.abort()
            return
        host, _, port = self.target.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        self._writers |= {writer, far_writer}
        for work in (self._pump(reader, far_writer, False), self._pump(far_reader, writer, True)):
            task = asyncio.ensure_future(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counted: bool
    ) -> None:
        try:
            while block := await source.read(1 << 14):
                sink.write(block)
                await sink.drain()
                self.passed_bytes += len(block) if counted else 0
                if self.passed_bytes >= self.cut_after_bytes and not self.down:
                    self.cut()
        except ConnectionError:
            pass
        finally:
            sink.close()
            self._writers.discard(sink)


@asynccontextmanager
async def proxied(target: str) -> AsyncIterator[Proxy]:
    """A proxy on a port of its own."""
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        proxy.cut()
        server.close()
        await asyncio.gather(*proxy._tasks, return_exceptions=True)
