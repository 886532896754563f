"""What the latency model has learned outlives control, in a real broker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from bench.replay import replay
from control import service
from control.config import ControlSettings
from control.journal import Journal
from control.latency_store import LATENCIES, SAVE_EVERY_US, VERSION, LatencyStore
from control.scheduler.core import Scheduler
from control.scheduler.settings import Settings
from control.scheduler.times.cells import LatencySnapshot
from control.scheduler.times.latency import SNAPSHOT_CELLS_MAX, LatencyModel
from control.scheduler.times.profile import REQUIRED, CellKey, Profile
from control.scheduler.values import (
    DIT,
    Arrived,
    JobProgress,
    Layout,
    ModelFacts,
    Request,
    Shape,
    StepsEnded,
    WorkerUp,
)
from hocket.clock import ManualClock, SystemClock
from hocket.messaging.bus import Bus, Subjects
from hocket.messaging.stores import LeasedKey, Log
from hocket.tracing import telemetry
from hocket.v1 import journal_pb2
from tests.waiting import until

T = TypeVar("T")
PAYLOAD_MAX = 1 << 20  # of a NATS message


def learned(ratio: float = 2.0, cells: int = 3, times: int = 9) -> LatencySnapshot:
    """What a model has learned that found some cells slower than they were believed to be."""
    model = LatencyModel(Profile({}), Settings())
    for i in range(cells):
        key = CellKey("m", "cpu", DIT, Shape(width=8 + i, height=8), Layout(), 1)
        for turn in range(times):
            model.observe(key, round(1_000_000 * ratio * (1 + 0.01 * turn)), ("w0",))
    return model.snapshot()


def taught(snapshot: LatencySnapshot) -> Scheduler:
    scheduler = Scheduler(Settings(), Profile({}))
    scheduler.restore_latencies(snapshot)
    return scheduler


def cell(bus: Bus, subjects: Subjects) -> LeasedKey:
    return LeasedKey(bus, subjects.latency_bucket, LATENCIES)


async def test_a_new_scheduler_predicts_as_the_old_one(bus: Bus, subjects: Subjects) -> None:
    store = await LatencyStore.open(bus, subjects)
    assert await store.load() is None
    old = taught(learned())
    await store.save(old)
    found = await (await LatencyStore.open(bus, subjects)).load()
    assert found is not None and found.cells and found == old.latencies()
    assert taught(found).latencies() == old.latencies()


async def test_it_is_written_while_something_is_learned_and_only_then(
    bus: Bus, subjects: Subjects
) -> None:
    store, clock = await LatencyStore.open(bus, subjects), ManualClock()
    values = cell(bus, subjects)
    scheduler = taught(learned())
    watch = await values.watch()
    assert await watch.next() is None  # nothing so far

    async def ask(question: Callable[[Scheduler], T]) -> T:
        return question(scheduler)

    keeping = asyncio.ensure_future(store.keep(ask, clock))
    await asyncio.sleep(0)
    clock.advance_to(SAVE_EVERY_US)
    assert await watch.next() is not None
    await until(lambda: clock.next_wake_us() == 2 * SAVE_EVERY_US)  # it sleeps again
    await store.save(scheduler)
    found = await values.get()
    assert found is not None and found[1] == 1
    keeping.cancel()
    await watch.close()


@pytest.mark.parametrize(
    "content",
    [
        b"not JSON",
        b'{"version": 0, "snapshot": {}}',
        b'{"version": %d, "snapshot": {"cells": [{"model": 1}]}}' % VERSION,
    ],
)
async def test_what_cannot_be_read_is_left_out_with_a_warning(
    bus: Bus, subjects: Subjects, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = await LatencyStore.open(bus, subjects)
    await cell(bus, subjects).create(content)
    with caplog.at_level(logging.WARNING):
        assert await store.load() is None
    assert "left out" in caplog.text
    await store.save(taught(learned()))
    assert await store.load() is not None


def test_a_snapshot_fits_into_a_message() -> None:
    snapshot = learned(ratio=1 / 3, cells=SNAPSHOT_CELLS_MAX + 100, times=17)
    assert len(snapshot.cells) == SNAPSHOT_CELLS_MAX
    assert len(msgspec.json.encode(snapshot)) < 0.8 * PAYLOAD_MAX


async def test_control_starts_with_what_was_learned_and_its_journal_says_so(
    bus: Bus, subjects: Subjects, nats_url: str, tmp_path: Path
) -> None:
    snapshot = learned()
    await (await LatencyStore.open(bus, subjects)).save(taught(snapshot))
    settings = ControlSettings(cluster=subjects.cluster, nats_url=nats_url, state_dir=tmp_path)
    stop = asyncio.Event()
    told = telemetry.setup("control", "test", tmp_path, "warning")
    await Journal.open(bus, subjects)
    feed = await Log(bus, subjects.journal_stream).follow(0)
    serving = asyncio.ensure_future(service.serve(settings, SystemClock(), told, stop))
    async with asyncio.timeout(60):
        message = await feed.next()
    stop.set()
    await serving
    told.close()
    started = journal_pb2.JournalEntry.FromString(message.data).leader_started
    assert msgspec.json.decode(started.latencies_json, type=LatencySnapshot) == snapshot


def test_a_term_that_began_with_restored_latencies_replays() -> None:
    """With them, the same plans; without them, others."""
    up = WorkerUp(at_us=0, worker="w0", incarnation="1", gpu="cpu", models=(ModelFacts(name="m"),))
    request = Request(id="r", model="m", shape=Shape(width=8, height=8), steps=4)
    facts, scheduler = (up, Arrived(at_us=0, request=request)), taught(learned())
    entries = [
        journal_pb2.JournalEntry(
            leader_started=journal_pb2.LeaderStarted(
                settings_json=msgspec.json.encode(Settings()).decode(),
                profile_csv=",".join(REQUIRED),
                latencies_json=msgspec.json.encode(learned()).decode(),
            )
        )
    ]
    for fact in facts:
        scheduler.observe(fact)
        text = msgspec.json.encode(fact).decode()
        entries.append(journal_pb2.JournalEntry(observed_json=text))
    for now_us in (0, 10_000_000):
        plan = scheduler.plan(now_us)
        record = journal_pb2.PlanRecord(now_us=now_us, digest=plan.digest)
        entries.append(journal_pb2.JournalEntry(plan=record))
        for assignment in plan.assignments:
            over = StepsEnded(
                at_us=9_000_000,
                sequence=assignment.sequence,
                jobs=(JobProgress(request="r", attempt=0, steps_done=0),),
                step_time_us=(1000,),
                last=True,
            )
            scheduler.observe(over)
            text = msgspec.json.encode(over).decode()
            entries.append(journal_pb2.JournalEntry(observed_json=text))
    for number, entry in enumerate(entries, 1):
        entry.term, entry.sequence = 1, number
    assert replay(entries).agrees and replay(entries).plans == 2
    entries[0].leader_started.latencies_json = ""
    assert replay(entries).differing
