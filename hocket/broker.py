"""nats-server from its wheel: finding it and starting it."""

from __future__ import annotations

import shutil
import socket
import sysconfig
from pathlib import Path

from hocket.errors import MeshStopped


def nats_server_binary() -> Path:
    """The nats-server of this environment, else the one on the PATH."""
    bundled = Path(sysconfig.get_path("scripts")) / "nats-server"
    if bundled.exists():
        return bundled
    found = shutil.which("nats-server")
    if found is None:
        raise MeshStopped("no nats-server: pip install 'hocket[broker]' or give --nats-url")
    return Path(found)


def nats_server_command(store: Path, port: int) -> list[str]:
    """Command line of a broker on the loopback, JetStream on, its files under `store`."""
    binary = str(nats_server_binary())
    return [binary, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(store)]


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
