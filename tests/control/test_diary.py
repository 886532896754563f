"""The diary: what does not fit into one message, and what goes wrong, ends no leader."""

from __future__ import annotations

import asyncio
import logging
import random
from pathlib import Path

import msgspec
import pytest
from nats.js.api import RetentionPolicy, StreamConfig

from bench.replay import JournalIncomplete, entries_from_broker, replay
from control.journal import Journal, joined, pieces, read
from control.latency_store import LATENCIES, LatencyStore
from control.leading.promises import open_stream
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.cells import LatencySnapshot
from control.scheduler.times.latency import LatencyModel
from control.scheduler.times.profile import REQUIRED, CellKey, Profile
from control.scheduler.values import DIT, Layout, Shape
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.stores import LeasedKey, Log
from hocket.v1 import journal_pb2
from tests.brokers import running_broker
from tests.control.made import book_of, promised, taken
from tests.control.replica import asking, beat_for_ever, replica
from tests.mesh.test_latency_store import learned

WAIT_S = 60.0
CELLS, FAMILIES = 1024, 190
ONE = Layout()


def learned_a_lot() -> LatencySnapshot:
    """As much as the model keeps: longer than a message of the broker may be."""
    model = LatencyModel(Profile({}), Settings())
    for i in range(CELLS):
        name = f"model-{i % FAMILIES:03d}" + "-with-a-name-of-its-own" * 9
        key = CellKey(name, "nvidia-h100-80gb-hbm3", DIT, Shape(width=512 + i, height=512), ONE, 1)
        for turn in range(40):
            model.observe(key, round(333_333 * (1 + 0.0101 * turn)), ("w0",))
    return model.snapshot()


def taught(snapshot: LatencySnapshot) -> Scheduler:
    scheduler = Scheduler(Settings(), Profile({}))
    scheduler.restore_latencies(snapshot)
    return scheduler


def started(latencies_json: str = "") -> journal_pb2.LeaderStarted:
    return journal_pb2.LeaderStarted(
        settings_json=msgspec.json.encode(Settings()).decode(),
        profile_csv=",".join(REQUIRED),
        latencies_json=latencies_json,
    )


def test_a_long_start_is_taken_apart_and_joined() -> None:
    short = started()
    assert pieces(short) == [short] and joined([short]) == short
    noise = random.Random(7).randbytes(500_000).hex()
    long = started(noise)
    parts = pieces(long)
    assert len(parts) > 1 and max(part.ByteSize() for part in parts) < 300_000
    assert joined(reversed(parts)) == long
    assert joined(parts[1:]) is None


async def test_a_leader_that_learned_a_lot_starts_and_is_replayed(
    nats_url: str, bus: Bus, subjects: Subjects, tmp_path: Path
) -> None:
    """It never started again: what it had learned did not fit into its first entry."""
    snapshot = learned_a_lot()
    assert len(msgspec.json.encode(snapshot)) > bus.payload_max
    store = await LatencyStore.open(bus, subjects)
    scheduler = taught(snapshot)
    await store.save(scheduler)
    found = await store.load()
    assert found is not None and found == scheduler.latencies()
    beating = asyncio.ensure_future(beat_for_ever(bus, subjects))
    async with (
        asyncio.timeout(WAIT_S),
        replica(nats_url, subjects.cluster, tmp_path) as one,
        asking(await one.leads()) as client,
    ):
        await client.accepted("r1")
        while True:  # the plan for it may not be written yet
            entries = await entries_from_broker(nats_url, subjects.cluster)
            if any(entry.HasField("plan") for entry in entries):
                break
    beating.cancel()
    assert replay(entries).agrees
    with pytest.raises(JournalIncomplete):
        first = next(entry for entry in entries if entry.HasField("leader_started"))
        first.leader_started.pieces += 1
        replay(entries)


async def test_without_room_for_a_diary_control_leads_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subjects = Subjects("small")
    config = tmp_path / "nats.conf"
    config.write_text("jetstream { max_file_store: 40M }\n")
    with running_broker(tmp_path, "-c", str(config)) as broker:
        bus = await Bus.connect(broker.url, "worker")
        beating = asyncio.ensure_future(beat_for_ever(bus, subjects))
        limits = {"promises_bytes_max": 32 << 20}
        async with (
            asyncio.timeout(WAIT_S),
            replica(broker.url, "small", tmp_path / "a", **limits) as one,
            asking(await one.leads()) as client,
        ):
            await client.accepted("r1")
        beating.cancel()
        await bus.close()
    assert "no diary is kept: diary_bytes_max" in caplog.text


async def test_the_diary_loses_its_oldest_entries(
    nats_url: str, bus: Bus, subjects: Subjects
) -> None:
    diary = await Journal.open(bus, subjects, term=7, bytes_max=20_000)
    for number in range(500):
        await diary.note(journal_pb2.JournalEntry(stamped_us=number, observed_json="x" * 100))
    stream = Log(bus, subjects.journal_stream)
    async with asyncio.timeout(WAIT_S):
        while await stream.last_sequence() < 500:  # noqa: ASYNC110  the disk is not waited for
            await asyncio.sleep(0.01)
    entries = await entries_from_broker(nats_url, subjects.cluster)
    assert entries and entries[0].sequence > 1 and entries[-1].sequence == 500
    assert {entry.term for entry in entries} == {7}


async def test_a_diary_that_overflows_takes_no_promise_along(
    nats_url: str, bus: Bus, subjects: Subjects
) -> None:
    """They were one stream: after so many facts the oldest promise was gone, and with it what a new
    leader would have taken up.
    """
    stream = await open_stream(bus, subjects, bytes_max=1 << 20)
    promises = await taken(stream, subjects, 1)
    await promises.append(promised("long-video"))
    diary = await Journal.open(bus, subjects, term=1, bytes_max=20_000)
    for number in range(500):
        await diary.note(journal_pb2.JournalEntry(stamped_us=number, observed_json="x" * 100))
    journal = Log(bus, subjects.journal_stream)
    async with asyncio.timeout(WAIT_S):
        while await journal.last_sequence() < 500:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await entries_from_broker(nats_url, subjects.cluster))[0].sequence > 1
    await taken(stream, subjects, 2)
    assert set((await book_of(stream, subjects)).open) == {"long-video"}


async def test_an_entry_that_no_broker_takes_is_dropped_with_a_line(
    bus: Bus, subjects: Subjects, caplog: pytest.LogCaptureFixture
) -> None:
    diary = await Journal.open(bus, subjects)
    with caplog.at_level(logging.WARNING):
        await diary.note(journal_pb2.JournalEntry(observed_json="x" * (bus.payload_max + 1)))
    assert bus.drops == 1 and "dropped" in caplog.text


async def test_latencies_of_an_older_version_are_read(bus: Bus, subjects: Subjects) -> None:
    """A bucket that nats-py had made, and content that was not compressed."""
    old = await bus.jetstream.create_key_value(bucket=subjects.latency_bucket)
    content = b'{"version":1,"snapshot":%s}' % msgspec.json.encode(learned())
    await old.put(LATENCIES, content)
    store = await LatencyStore.open(bus, subjects)
    assert await store.load() == learned()
    await store.save(taught(learned()))
    kept = await LeasedKey(bus, subjects.latency_bucket, LATENCIES).get()
    assert kept is not None and not kept[0].startswith(b"{") and await store.load() is not None


async def test_a_journal_of_an_older_version_goes_on(bus: Bus, subjects: Subjects) -> None:
    """Its promises are read where they stand, and take up nothing."""
    old = StreamConfig(
        name=subjects.journal_stream,
        subjects=[subjects.journal("*")],
        retention=RetentionPolicy.LIMITS,
        max_bytes=1 << 20,
    )
    await bus.jetstream.add_stream(old)
    entry = journal_pb2.JournalEntry(term=3, sequence=1)
    entry.accepted.submit.request_id = "r1"
    await bus.jetstream.publish(subjects.journal("accepted"), entry.SerializeToString())
    diary = await Journal.open(bus, subjects, term=4)
    assert await Log(bus, subjects.journal_stream).bytes_max() == 1 << 20
    await diary.note(journal_pb2.JournalEntry(observed_json="{}"))
    async with asyncio.timeout(WAIT_S):
        while len(found := [s.entry async for s in read(bus, subjects)]) < 2:
            pass
    assert [(e.term, e.WhichOneof("entry")) for e in found] == [
        (3, "accepted"),
        (4, "observed_json"),
    ]
    assert [s.entry async for s in read(bus, subjects, "accepted")] == found[:1]
