"""Each role tries everything on a real broker with the rules that `hocket certs` writes."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.aio.client import Client

from hocket.broker import free_port, nats_server_binary
from hocket.bus import Subjects
from hocket.security.broker_rules import configuration, inbox_of
from tests.security.conftest import identity

CLUSTER = "matrix"
S = Subjects(CLUSTER)
_MEDIA, _LEADER = f"OBJ_{S.media_bucket}", f"KV_{S.leader_bucket}"
# Who may publish what; everybody else must not.
MAY_PUBLISH = {
    S.assign("w"): {"control"},
    S.truncate("w"): {"control"},
    S.heartbeat("w"): {"control", "worker"},
    S.report("w"): {"control", "worker"},
    S.latent("w"): {"control", "worker"},
    f"hocket.v1.{CLUSTER}.promise.request.r": {"control"},
    S.journal("observed_json"): {"control"},
    f"$KV.{S.leader_bucket}.leader": {"control"},
    f"$O.{S.media_bucket}.C.x": {"control", "worker"},
    f"$JS.API.STREAM.DELETE.{S.journal_stream}": {"control"},
    f"$JS.API.STREAM.PURGE.{_MEDIA}": {"control", "worker"},
    f"$JS.API.STREAM.INFO.{_MEDIA}": {"control", "worker", "gateway", "operator"},
    f"$JS.API.DIRECT.GET.{_LEADER}": {"control", "gateway", "operator"},
    f"$JS.API.STREAM.UPDATE.{_LEADER}": {"control"},
}
MAY_SUBSCRIBE = {
    S.assign("w"): {"control", "worker", "operator"},
    S.report("w"): {"control", "operator"},
    f"hocket.v1.{CLUSTER}.>": {"control", "operator"},
    f"{inbox_of('control')}.x": {"control"},
    f"{inbox_of('gateway')}.x": {"gateway"},
    f"{inbox_of('worker')}.x": {"worker"},
    ">": set(),
}
ROLES = ("control", "worker", "gateway", "operator")


@pytest.fixture(scope="module")
def broker(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, store = free_port(), tmp_path_factory.mktemp("store")
    file = certificates / "broker" / "nats-server.conf"
    file.write_text(
        configuration(CLUSTER, certificates / "broker", f"127.0.0.1:{port}", str(store))
    )
    process = subprocess.Popen(
        [str(nats_server_binary()), "-c", str(file)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "Server is ready" in line:
            break
    yield f"tls://127.0.0.1:{port}"
    process.kill()
    process.wait()


@asynccontextmanager
async def connected(url: str, folder: Path, role: str) -> AsyncIterator[tuple[Client, list[str]]]:
    told: list[str] = []

    async def on_error(error: Exception) -> None:
        told.append(str(error).lower())

    client = Client()
    await client.connect(
        url,
        tls=identity(folder, role).ssl_context(),
        tls_hostname="hocket-broker",
        inbox_prefix=inbox_of(role).encode(),
        error_cb=on_error,
        allow_reconnect=False,
    )
    try:
        yield client, told
    finally:
        await client.close()


async def denied(client: Client, told: list[str]) -> set[str]:
    """Subjects that the broker has refused so far; it names them in lower case here."""
    await client.flush()  # a refusal comes before the answer to this
    for _ in range(10):  # the client tells of it in a task
        await asyncio.sleep(0)
    return {line.split('"')[1] for line in told if "permissions violation" in line}


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_tries_to_publish_everything(
    broker: str, certificates: Path, role: str
) -> None:
    async with connected(broker, certificates, role) as (client, told):
        for subject in MAY_PUBLISH:
            await client.publish(subject, b"", reply=client.new_inbox())
            await client.flush()  # one refusal at a time: of several at once the client loses some
        refused = await denied(client, told)
    found = {subject: subject.lower() not in refused for subject in MAY_PUBLISH}
    assert found == {subject: role in allowed for subject, allowed in MAY_PUBLISH.items()}


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_tries_to_hear_everything(
    broker: str, certificates: Path, role: str
) -> None:
    async with connected(broker, certificates, role) as (client, told):
        for subject in MAY_SUBSCRIBE:
            await client.subscribe(subject)
            await client.flush()
        refused = await denied(client, told)
    found = {subject: subject.lower() not in refused for subject in MAY_SUBSCRIBE}
    assert found == {subject: role in allowed for subject, allowed in MAY_SUBSCRIBE.items()}


async def test_nobody_gets_in_without_the_clusters_certificate(
    broker: str, certificates: Path, strangers: Path
) -> None:
    with pytest.raises((nats.errors.Error, OSError)):
        async with connected(broker, strangers, "control"):
            pass
    with pytest.raises((nats.errors.Error, OSError)):  # it has no user: a caller's certificate
        async with connected(broker, certificates, "client"):
            pass
