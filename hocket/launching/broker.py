"""nats-server from its wheel: finding it and starting it, alone or as a cluster."""

from __future__ import annotations

import random
import shutil
import socket
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from hocket.errors import MeshStopped

_PORTS = range(10_000, 32_768)  # the system gives none of these to connections (Linux, macOS)


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


def clustered(command: list[str], name: str, route_ports: Sequence[int], own: int) -> list[str]:
    """The command of one broker of a cluster on the loopback; `own` is its index."""
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in route_ports)
    door = f"nats://127.0.0.1:{route_ports[own]}"
    named = ["-n", f"{name}-{own}", "--cluster_name", name]
    return [*command, *named, "--cluster", door, "--routes", routes]


def free_port() -> int:
    """A port of the loopback that nobody listens on now, and that is nobody's while its owner is
    away: a connection to a port of the system's own range may get that very port as its own.
    """
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
