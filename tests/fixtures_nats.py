"""A real nats-server for tests: one a session, with JetStream in a temporary folder."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hocket.launching.broker import nats_server_binary
from hocket.messaging.bus import Bus, Subjects


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running broker."""
    folder: Path = tmp_path_factory.mktemp("nats")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(nats_server_binary()), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, str(folder / "store")], stdout=log, stderr=log)
    try:
        yield f"nats://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
async def bus(nats_url: str) -> AsyncIterator[Bus]:
    """A connection of the test's own."""
    connection = await Bus.connect(nats_url, "test")
    yield connection
    await connection.close()


@pytest.fixture
def subjects(request: pytest.FixtureRequest) -> Subjects:
    """Subjects of a cluster of the test's own, so that tests do not hear each other."""
    return Subjects(f"t{abs(hash(request.node.nodeid)) % 10**9}")
