"""A nats-server of a test's own, which it may stop, let stand still, kill and start again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hocket.launching.broker import free_port, nats_server_command
from tests.waiting import until


class Broker:
    """One process at a time, on one port and one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self, *options: str) -> None:
        assert self.process is None
        command = [*nats_server_command(self.folder / "store", self.port), *options]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def stand_still(self) -> None:
        """SIGSTOP; returns once it stands."""
        self._send(signal.SIGSTOP)
        assert self.process is not None
        os.waitpid(self.process.pid, os.WUNTRACED)

    def go_on(self) -> None:
        """SIGCONT."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        self._send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(10)
        self.process = None

    def lose_store(self) -> None:
        """As a broker does whose disk is gone."""
        assert self.process is None
        shutil.rmtree(self.folder / "store")

    async def start_again(self) -> None:
        """Tries until the port is free: a client's own try to connect may have it for a moment."""

        def serves() -> bool:
            if self.process is None or self.process.poll() is not None:
                self.process = None
                self.start()
            return b"Server is ready" in (self.folder / "log").read_bytes()[seen:]

        seen = (self.folder / "log").stat().st_size
        await until(serves)

    def _send(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)


@contextmanager
def broker_cluster(folder: Path, size: int = 3) -> Iterator[list[Broker]]:
    """Brokers that are one cluster, each with a store of its own."""
    brokers = [Broker(folder / f"n{i}") for i in range(size)]
    ports = [free_port() for _ in brokers]
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
    try:
        for number, (broker, port) in enumerate(zip(brokers, ports, strict=True)):
            broker.folder.mkdir()
            own = ("-n", f"n{number}", "-cluster", f"nats://127.0.0.1:{port}")
            broker.start(*own, "-cluster_name", "test", "-routes", routes)
        yield brokers
    finally:
        for broker in brokers:
            if broker.process is not None:
                broker.process.kill()
                broker.process.wait(10)


@contextmanager
def running_broker(folder: Path, *options: str) -> Iterator[Broker]:
    """A running one; whatever its state, it is gone at the end."""
    broker = Broker(folder)
    broker.start(*options)
    try:
        yield broker
    finally:
        if broker.process is not None:
            broker.process.kill()
            broker.process.wait(10)
