"""A whole mesh with certificates, roles and API keys makes pictures, and lets nobody else in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gpuworker.collectives.rendezvous import BlobLost, Rendezvous
from hocket.client import HocketClient
from hocket.errors import AccessDenied, CallFailed, HocketError, UnknownRequest
from hocket.launching import endpoints
from hocket.launching.broker import free_port, nats_server_binary
from hocket.rpc.channels import CHANNEL_OPTIONS
from hocket.security import api_keys
from hocket.security.broker_rules import configuration
from hocket.security.certificates import make_all
from hocket.security.identity import Identity, open_channel
from hocket.v1.control_pb2 import WatchClusterRequest
from hocket.v1.control_pb2_grpc import ControlServiceStub
from tests.gateway.test_pictures import red, saved
from tests.security.conftest import identity
from tests.waiting import WAIT_S, until

CLUSTER = "secure"
ON_CPU = ("--device=cpu",)


@pytest.fixture(scope="module")
def mesh(
    certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """Address of the gateway, the state folder, a key for each of two tenants."""
    state, port, door = tmp_path_factory.mktemp("mesh"), free_port(), free_port()
    conf = certificates / "broker" / "secure.conf"
    conf.write_text(
        configuration(
            CLUSTER, certificates / "broker", f"127.0.0.1:{port}", str(state / "nats"), {"gpu": 2}
        )
    )
    make_all(certificates, [], 2, ["gpu"])
    keys = state / "keys.json"
    secrets = {tenant: api_keys.add(keys, tenant)[1] for tenant in ("acme", "other")}

    def service(module: str, role: str, *options: str) -> list[str]:
        return [
            *(sys.executable, "-m", module, f"--cluster={CLUSTER}", f"--state-dir={state}"),
            *(f"--nats-url=nats://127.0.0.1:{port}", f"--tls-dir={certificates / role}", *options),
        ]

    with ExitStack() as stack:

        def start(command: list[str]) -> None:
            name = f"{command[0].rpartition('/')[2]}-{len(command)}-{command[-1][-12:]}"
            log = (state / f"{name.replace('/', '_')}.log").open("wb")
            process = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)

        start([str(nats_server_binary()), "-c", str(conf)])
        start(service("control", "control", "--policy=fixed-2"))
        start(service("gpuworker", "worker-gpu", "--count=2", "--name-prefix=gpu-", *ON_CPU))
        start(service("gateway", "gateway", f"--listen=127.0.0.1:{door}", f"--api-keys={keys}"))
        yield f"127.0.0.1:{door}", state, secrets


@pytest.fixture
async def acme(
    mesh: tuple[str, Path, dict[str, str]], certificates: Path
) -> AsyncIterator[HocketClient]:
    address, _, secrets = mesh
    ca = certificates / "client" / "ca.pem"
    async with HocketClient(address, api_key=secrets["acme"], tls_ca=ca) as client:
        yield client


async def both_workers_alive(state: Path, operator: Identity) -> None:
    """Asks control, as an operator does."""
    await until(lambda: endpoints.find(state, "control"))
    found = endpoints.find(state, "control")
    assert found is not None
    async with open_channel(found.address, CHANNEL_OPTIONS, operator, "control") as channel:
        watch = ControlServiceStub(channel).WatchCluster(WatchClusterRequest(), timeout=WAIT_S)
        async for cluster in watch:
            if len(cluster.workers) == 2:
                return


async def test_a_group_makes_a_picture_and_its_tenant_alone_sees_it(
    acme: HocketClient, mesh: tuple[str, Path, dict[str, str]], certificates: Path
) -> None:
    address, state, secrets = mesh
    await both_workers_alive(state, identity(certificates, "operator"))
    degrees = set()
    request = ""
    async for event in acme.generate("a red apple", wait_for_ready=True, timeout_s=120):
        if hasattr(event, "degree"):
            degrees.add(event.degree)
        request = request or getattr(event, "request_id", "")
    assert 2 in degrees  # the two workers met in a store behind TLS
    assert (await acme.get(request)).request_id == request

    ca = certificates / "client" / "ca.pem"
    async with HocketClient(address, api_key=secrets["other"], tls_ca=ca) as other:
        for attempt in (other.get(request), other.cancel(request), other.result(request)):
            with pytest.raises(UnknownRequest):
                await attempt
        with pytest.raises(AccessDenied):
            await other.create("a red apple", tenant="acme")
        assert [made async for made in other.list()] == []

    stored = await acme.put_input(saved(red(), "PNG"))
    assert (await acme.put_input(saved(red(), "PNG"))).name == stored.name
    assert "img2img" in [spec.name for spec in await acme.workflows()]
    wish = {"workflow": "img2img", "inputs": {"image": stored.name}, "model": "hocket-emoji"}
    content, _ = await acme.generate_media("a red apple", **wish)
    assert content.startswith(b"\x89PNG")

    worker = endpoints.find(state, "gpu-0")
    assert worker is not None
    stranger = Rendezvous()
    with pytest.raises(BlobLost):
        stranger.fetch(worker.address, "anything", 1.0)


async def test_without_a_key_or_a_certificate_nobody_gets_in(
    acme: HocketClient, mesh: tuple[str, Path, dict[str, str]], certificates: Path, strangers: Path
) -> None:
    address, _, secrets = mesh
    await acme.models()
    ca = certificates / "client" / "ca.pem"
    for wrong in (
        HocketClient(address, tls_ca=ca, patience_s=0.1),
        HocketClient(address, tls_ca=ca, api_key="hk_guess", patience_s=0.1),
        HocketClient(address, api_key=secrets["acme"], patience_s=0.1),
        HocketClient(
            address, api_key=secrets["acme"], tls_ca=strangers / "ca" / "ca.pem", patience_s=0.1
        ),
    ):
        async with wrong:
            with pytest.raises(HocketError) as refused:
                await wrong.models()
            assert not isinstance(refused.value, CallFailed) or refused.value.code in (
                "UNAUTHENTICATED",
                "UNAVAILABLE",
            )
