"""Each role tries everything on a real broker with the rules that `hocket certs` writes."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

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
    f"$JS.API.STREAM.CREATE.{_MEDIA}": {"control"},
    f"$JS.API.STREAM.UPDATE.{_MEDIA}": {"control"},
    f"$JS.API.STREAM.MSG.DELETE.{_MEDIA}": {"control"},
    f"$JS.API.CONSUMER.CREATE.{_MEDIA}": {"control", "operator"},
    f"$JS.API.DIRECT.GET.{_MEDIA}": {"control", "gateway", "operator"},
    f"$JS.API.STREAM.INFO.{_MEDIA}": {"control", "worker", "gateway", "operator"},
    f"{inbox_of('worker')}.x": {"worker"},  # answers to another worker that asks for a latent
    f"{inbox_of('control')}.x": set(),
    f"{inbox_of('gateway')}.x": set(),
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


# What each role hears, and from whom: None is its own inbox.
HEARS = {
    "control": ("worker", S.heartbeat("w")),
    "worker": ("worker", S.latent("w")),
    "gateway": ("gateway", None),
    "operator": ("worker", S.report("w")),
}


@pytest.mark.parametrize("role", ROLES)
async def test_whoever_gets_a_message_may_not_answer_it_anywhere(
    broker: str, certificates: Path, role: str
) -> None:
    """A foreign subject that is named for the answer gives nobody the right to publish there."""
    sender, subject = HEARS[role]
    async with (
        connected(broker, certificates, role) as (client, told),
        connected(broker, certificates, sender) as (other, _),
    ):
        subject = subject or client.new_inbox()
        messages = await client.subscribe(subject)
        await client.flush()
        targets = [name for name, allowed in MAY_PUBLISH.items() if role not in allowed]
        for target in targets:
            await other.publish(subject, b"", reply=target)
            while role != "gateway":  # whom nobody but the broker can tell anything
                try:
                    await messages.next_msg(1.0)
                    break
                except nats.errors.TimeoutError:  # the client loses what comes with a refusal
                    await other.publish(subject, b"", reply=target)
            await client.publish(target, b"")
            await client.flush()
        assert await denied(client, told) == {target.lower() for target in targets}


async def test_a_worker_asks_a_worker_and_is_answered(broker: str, certificates: Path) -> None:
    async with (
        connected(broker, certificates, "worker") as (one, _),
        connected(broker, certificates, "worker") as (two, _),
    ):

        async def answer(message: Msg) -> None:
            await message.respond(b"here")

        await one.subscribe(S.latent("one"), cb=answer)
        await one.flush()
        assert (await two.request(S.latent("one"), b"", 5.0)).data == b"here"


async def test_a_worker_stores_media_and_reads_none_to_others(
    broker: str, certificates: Path
) -> None:
    """A read that names another's subject for its answer would put any content there."""
    async with (
        connected(broker, certificates, "control") as (control, _),
        connected(broker, certificates, "worker") as (worker, told),
    ):
        await control.jetstream().create_object_store(S.media_bucket)
        store = await worker.jetstream().object_store(S.media_bucket)
        await store.put("file", b"first")
        await store.put("file", b"second")
        assert await denied(worker, told) == set()
        heard = await control.subscribe(S.assign("w"))
        await control.flush()
        chunk = f"$O.{S.media_bucket}.C.forged"
        await worker.publish(chunk, b"forged")
        await worker.publish(f"$JS.API.DIRECT.GET.{_MEDIA}.{chunk}", b"", reply=S.assign("w"))
        last = json.dumps({"last_by_subj": chunk}).encode()
        await worker.publish(f"$JS.API.STREAM.MSG.GET.{_MEDIA}", last, reply=S.assign("w"))
        message = await heard.next_msg(5.0)
        assert message.data.startswith(b"{"), "wrapped by the broker"
        assert len(await denied(worker, told)) == 1


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
