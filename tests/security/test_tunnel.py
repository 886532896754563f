"""Workers' stores behind TLS: peers get through, strangers do not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from gpuworker.collectives.rendezvous import BlobLost, Rendezvous
from gpuworker.collectives.tunnel import Tunnel
from tests.security.conftest import identity


@pytest.fixture
def peer(certificates: Path) -> Iterator[Rendezvous]:
    rendezvous = Rendezvous("127.0.0.1", Tunnel(identity(certificates, "worker")))
    yield rendezvous
    rendezvous.close()


def test_a_worker_fetches_through_the_tunnel(peer: Rendezvous, certificates: Path) -> None:
    blob = bytes(range(256)) * (20 << 10)  # 5 MiB: more than one chunk
    peer.put("latent", blob)
    own = Rendezvous("127.0.0.1", Tunnel(identity(certificates, "worker")))
    try:
        assert own.fetch(peer.address, "latent", 10.0) == blob
    finally:
        own.close()


@pytest.mark.parametrize("stranger", ["plain", "other authority", "other role"])
def test_strangers_are_refused(
    peer: Rendezvous, certificates: Path, strangers: Path, stranger: str
) -> None:
    peer.put("latent", b"secret")
    tunnels = {
        "plain": lambda: None,
        "other authority": lambda: Tunnel(identity(strangers, "worker")),
        "other role": lambda: Tunnel(identity(certificates, "client")),
    }
    own = Rendezvous("127.0.0.1", tunnels[stranger]())
    try:
        with pytest.raises(BlobLost):
            own.fetch(peer.address, "latent", 1.0)
    finally:
        own.close()


def test_the_store_itself_listens_on_the_loopback_only(peer: Rendezvous) -> None:
    """Without a tunnel it listens on the address that it is known by, and on no other."""
    plain = Rendezvous("127.0.0.1")
    host, port = plain.address.split(":")
    TCPStore(host, int(port), None, False, timedelta(seconds=5), False).set("a", "b")
    others = [a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    for other in set(others) - {"127.0.0.1"}:
        for address in (plain.address, peer.address):
            with pytest.raises(OSError):
                socket.create_connection((other, int(address.split(":")[1])), 1.0)
    plain.close()
