"""Each role tries everything on a real broker with the rules that `hocket certs` writes."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import StreamConfig

from bench.replay import entries_from_broker
from gateway.inputs.store import InputStore
from hocket.clock import SystemClock
from hocket.launching.broker import free_port, nats_server_binary
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.leader import LEADER_KEY, LeaderKey, LeaderWatch
from hocket.messaging.stores import LeasedKey, Log, LogShape
from hocket.messaging.subjects import input_object
from hocket.security.broker_rules import API, configuration, inbox_of
from hocket.security.certificates import make_all
from hocket.security.identity import broker_access
from hocket.v1.journal_pb2 import JournalEntry
from tests.security.conftest import identity

CLUSTER = "matrix"
S = Subjects(CLUSTER)
_MEDIA, _LEADER = f"OBJ_{S.media_bucket}", f"KV_{S.leader_bucket}"
_INPUTS = f"OBJ_{S.input_bucket}"
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
    f"$O.{S.input_bucket}.C.x": {"control", "gateway"},
    f"$O.{S.input_bucket}.M.x": {"control", "gateway"},
    f"$KV.{S.workflow_bucket}.w": {"control"},
    f"$JS.API.STREAM.DELETE.{S.journal_stream}": {"control"},
    f"$JS.API.STREAM.INFO.{_MEDIA}": {"control"},  # what all others call by another name
    f"{API}.STREAM.DELETE.{S.journal_stream}": set(),
    f"{API}.STREAM.PURGE.{_MEDIA}": {"worker"},
    f"{API}.STREAM.CREATE.{_MEDIA}": set(),
    f"{API}.STREAM.PURGE.{_INPUTS}": set(),
    f"{API}.STREAM.CREATE.{_INPUTS}": set(),
    f"{API}.STREAM.MSG.GET.{_INPUTS}": {"worker", "gateway", "operator"},
    f"{API}.DIRECT.GET.{_INPUTS}": {"worker", "gateway", "operator"},
    f"{API}.STREAM.UPDATE.{_MEDIA}": set(),
    f"{API}.STREAM.MSG.DELETE.{_MEDIA}": set(),
    f"{API}.STREAM.PURGE.{S.promises_stream}": set(),
    f"{API}.CONSUMER.CREATE.{_MEDIA}": set(),
    f"{API}.CONSUMER.CREATE.{_LEADER}": set(),
    f"{API}.DIRECT.GET.{_MEDIA}": {"gateway", "operator"},
    f"{API}.STREAM.MSG.GET.{_MEDIA}": {"worker", "gateway", "operator"},
    f"{API}.STREAM.INFO.{_MEDIA}": {"worker", "gateway", "operator"},
    f"{API}.STREAM.MSG.GET.{_LEADER}": {"gateway", "operator"},
    f"{API}.STREAM.MSG.GET.{S.promises_stream}": {"operator"},
    f"{API}.STREAM.UPDATE.{_LEADER}": set(),
    f"{inbox_of('worker')}.x": {"worker"},  # answers to another worker that asks for a latent
    f"{inbox_of('control')}.x": set(),
    f"{inbox_of('gateway')}.x": set(),
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
    with running(certificates, tmp_path_factory.mktemp("store"), {}) as url:
        yield url


@contextmanager
def running(certificates: Path, store: Path, hosts: dict[str, int]) -> Iterator[str]:
    port, folder = free_port(), certificates / "broker"
    file = store / "nats-server.conf"
    file.write_text(configuration(CLUSTER, folder, f"127.0.0.1:{port}", str(store), hosts))
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
        inbox_prefix=inbox_of(role.partition("-")[0]).encode(),
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
        assert (await asked(two, S.latent("one"))).data == b"here"


async def test_a_worker_speaks_and_listens_as_those_of_its_host_alone(
    certificates: Path, tmp_path: Path
) -> None:
    make_all(certificates, [], 2, ["gpu1", "gpu2"])
    with running(certificates, tmp_path, {"gpu1": 2, "gpu2": 1}) as url:
        async with connected(url, certificates, "worker-gpu1") as (client, told):
            for name in ("gpu1-0", "gpu1-1", "gpu1-2", "gpu2-0", "gpu1"):
                await client.publish(S.report(name), b"")
                await client.publish(S.heartbeat(name), b"")
                await client.subscribe(S.assign(name))
                await client.flush()
            await client.publish(S.latent("gpu2-0"), b"")
            refused = await denied(client, told)
        strange = ("gpu1-2", "gpu2-0", "gpu1")
        assert refused == {
            subject for name in strange for subject in (S.report(name), S.heartbeat(name))
        } | {S.assign(name) for name in strange}
        with pytest.raises((nats.errors.Error, OSError)):  # which would speak as anybody
            async with connected(url, certificates, "worker"):
                pass


async def asked(client: Client, subject: str, content: bytes = b"") -> Msg:
    """The answer; a subscription that was made a moment ago may not have been seen yet."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await client.request(subject, content, 5.0)
            except nats.errors.NoRespondersError:
                continue


async def test_a_worker_stores_media_and_a_gateway_reads_them(
    broker: str, certificates: Path
) -> None:
    async with (
        connected(broker, certificates, "control") as (control, _),
        connected(broker, certificates, "worker") as (worker, told),
        connected(broker, certificates, "gateway") as (gateway, refused),
    ):
        await control.jetstream().create_object_store(S.media_bucket)
        store = await worker.jetstream(prefix=API).object_store(S.media_bucket)
        await store.put("file", b"first")
        await store.put("file", b"second")
        seen = (await control.jetstream().stream_info(_MEDIA, subjects_filter=">")).state
        (piece,) = (name for name in seen.subjects or {} if ".C." in name)
        got = await gateway.jetstream(prefix=API).get_msg(_MEDIA, subject=piece, direct=True)
        assert got.data == b"second"
        assert await denied(worker, told) == await denied(gateway, refused) == set()


async def test_a_gateway_stores_inputs_and_a_worker_reads_them(
    broker: str, certificates: Path
) -> None:
    access = broker_access(identity(certificates, "gateway"), "gateway")
    bus = await Bus.connect(broker, "gateway", access=access)
    async with (
        connected(broker, certificates, "control") as (control, _),
        connected(broker, certificates, "worker") as (worker, told),
    ):
        await control.jetstream().create_object_store(S.input_bucket)
        store = InputStore(bus, S, SystemClock())
        name, _ = await store.put("acme", b"a picture")
        assert await store.absent("acme", [name, "none"]) == {"none"}
        assert await store.absent("other", [name]) == {name}
        kept = await control.jetstream().object_store(S.input_bucket)
        assert (await kept.get(input_object("acme", name))).data == b"a picture"
        api = worker.jetstream(prefix=API)
        piece = f"$O.{S.input_bucket}.C.>"
        got = await api.get_msg(_INPUTS, seq=1, subject=piece, direct=True, next=True)
        assert got.data == b"a picture"
        assert await denied(worker, told) == set()
    await bus.close()


PROMISE = f"hocket.v1.{CLUSTER}.promise.request.r"
LEADER = f"$KV.{S.leader_bucket}.leader"
PIECE, INPUT = f"$O.{S.media_bucket}.C.x", f"$O.{S.input_bucket}.C.x"
# What each role may ask JetStream for, by the entry that it wants.
ASKS = {
    "worker": {
        f"STREAM.INFO.{_MEDIA}": "",
        f"STREAM.MSG.GET.{_MEDIA}": PIECE,
        f"DIRECT.GET.{_INPUTS}": INPUT,
    },
    "gateway": {
        f"STREAM.INFO.{_MEDIA}": "",
        f"STREAM.MSG.GET.{_MEDIA}": PIECE,
        f"DIRECT.GET.{_MEDIA}": PIECE,
        f"STREAM.MSG.GET.{_LEADER}": LEADER,
        f"STREAM.MSG.GET.{_INPUTS}": INPUT,
        f"DIRECT.GET.{_INPUTS}": INPUT,
    },
    "operator": {
        f"STREAM.INFO.{S.promises_stream}": "",
        f"STREAM.MSG.GET.{S.promises_stream}": PROMISE,
        f"DIRECT.GET.{S.promises_stream}": PROMISE,
    },
}


@pytest.mark.parametrize("role", ASKS)
async def test_what_the_broker_answers_gets_nowhere_but_to_the_asker(
    broker: str, certificates: Path, role: str
) -> None:
    """It would overwrite a promise, or come to a worker as an assignment: the broker answers as
    itself, whatever the asker may publish.
    """
    async with (
        connected(broker, certificates, "control") as (control, _),
        connected(broker, certificates, role) as (client, told),
    ):
        jetstream = control.jetstream()
        for bucket in (S.media_bucket, S.input_bucket):
            await jetstream.create_object_store(bucket)
        await jetstream.create_key_value(bucket=S.leader_bucket)
        config = StreamConfig(S.promises_stream, subjects=[S.promises], allow_direct=True)
        await jetstream.add_stream(config)
        await jetstream.publish(PROMISE, b"promised")
        await jetstream.publish(LEADER, b"who leads")
        await jetstream.publish(PIECE, b"a piece")
        await jetstream.publish(INPUT, b"a piece")
        heard = await control.subscribe(f"hocket.v1.{CLUSTER}.>")
        await control.flush()
        for call, entry in ASKS[role].items():
            content = json.dumps({"last_by_subj": entry}).encode() if entry else b""
            for target in (PROMISE, S.assign("w"), S.heartbeat("w"), S.report("w")):
                await client.publish(f"{API}.{call}", content, reply=target)
            answer = await client.request(f"{API}.{call}", content, 5.0)
            assert b"error" not in answer.data, answer
        assert await denied(client, told) == set()
        await control.publish(S.assign("last"), b"")
        assert (await heard.next_msg(5.0)).subject == S.assign("last")
        newest = await jetstream.get_last_msg(S.promises_stream, PROMISE)
        assert newest.data == b"promised"


async def test_who_has_no_consumers_reads_and_watches_all_the_same(
    broker: str, certificates: Path
) -> None:
    """An operator reads the diary; a gateway hears who leads, and who leads then."""

    async def connected_as(role: str) -> Bus:
        access = broker_access(identity(certificates, role), role)
        return await Bus.connect(broker, role, access=access)

    control, gateway = await connected_as("control"), await connected_as("gateway")
    shape = LogShape(S.journal_stream, (S.journal("*"),))
    diary = await Log.open(control, shape)
    for number in range(5):
        entry = JournalEntry(term=1, sequence=number + 1, observed_json="{}")
        await diary.append(S.journal("observed_json"), entry.SerializeToString())
    found = await entries_from_broker(broker, CLUSTER, certificates / "operator")
    assert [entry.sequence for entry in found] == [1, 2, 3, 4, 5]
    cell = await LeasedKey.open(control, S.leader_bucket, LEADER_KEY)
    watch = LeaderWatch(gateway, CLUSTER)
    async with asyncio.timeout(30):
        known = await cell.get()
        revision = known[1] if known is not None else 0
        for address in ("h:1", "h:2"):
            key = msgspec.json.encode(LeaderKey(address=address, term=1))
            revision = await cell.update(key, revision) or 0
            while await watch.next() != address:
                pass
    await watch.close()
    for bus in (control, gateway):
        await bus.close()


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
