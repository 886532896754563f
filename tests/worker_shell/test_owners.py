"""Everything that a worker runs has an owner, and everything that waits has a bound."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from gpuworker.executor import FAILURE_CHARS_MAX, RunNote
from gpuworker.memory.latents import Shares
from gpuworker.memory.weights import WeightStore
from gpuworker.mesh.outbox import NoteOutbox
from gpuworker.torch_executor import TorchExecutor
from hocket.messaging.bus import Bus, Subjects
from tests.worker_shell.desk import WAIT_S, desk, job

BOUND = 4


async def test_a_thread_that_tells_faster_than_it_is_heard_waits_and_loses_nothing() -> None:
    outbox, put = NoteOutbox(BOUND), 0
    full = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell() -> None:
        nonlocal put
        for sequence in range(1, 101):
            if put == BOUND:
                loop.call_soon_threadsafe(full.set)
            outbox.put(RunNote(assignment=job(sequence, "dit"), behind={}))
            put += 1

    teller = threading.Thread(target=tell)
    teller.start()
    async with asyncio.timeout(WAIT_S):
        await full.wait()
        taken = []
        for _ in range(100):
            assert put <= len(taken) + BOUND + 1
            taken.append(note := await outbox.take())
            outbox.told(note)
    await asyncio.to_thread(teller.join)
    assert [note.assignment.sequence for note in taken] == list(range(1, 101))
    assert outbox.is_empty


async def test_what_is_not_told_yet_counts_as_pending() -> None:
    outbox = NoteOutbox(BOUND)
    note = RunNote(assignment=job(7, "dit"), behind={}, last=True)
    outbox.put(note)
    assert outbox.untold(1) == (7,) and outbox.untold(2) == ()
    await outbox.take()
    assert outbox.untold(1) == (7,), "it is on its way"
    outbox.told(note)
    assert outbox.untold(1) == ()


async def test_a_closed_outbox_holds_up_nobody() -> None:
    outbox = NoteOutbox(1)
    outbox.put(RunNote(assignment=job(1, "dit"), behind={}))
    waiting = threading.Thread(
        target=outbox.put, args=(RunNote(assignment=job(2, "dit"), behind={}),)
    )
    waiting.start()
    outbox.close()
    await asyncio.to_thread(waiting.join, WAIT_S)
    assert not waiting.is_alive()


async def test_the_end_of_the_compute_thread_does_not_go_unnoticed(bus: Bus) -> None:
    executor = TorchExecutor(
        "w0",
        {},
        torch.device("cpu"),
        "cpu",
        bus,
        Subjects("owners"),
        weights=WeightStore(torch.device("cpu")),
        shares=Shares(),
        advertise="127.0.0.1",
        groups_max=4,
    )

    def broken(note: RunNote) -> None:
        raise ValueError(f"no words for {note.assignment.sequence}")

    executor.start(broken)
    executor.accept_term(1)
    executor.submit(job(1, "text"))  # of a model that is not here: it fails, and that is told
    try:
        async with asyncio.timeout(WAIT_S):
            with pytest.raises(ValueError, match="no words for 1"):
                await executor.failed()
    finally:
        await executor.close()


async def test_an_executor_that_fails_ends_the_worker_with_its_error(
    nats_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(nats_url, tmp_path, "broken") as one:

        def broken(*_: object, **__: object) -> object:
            raise ZeroDivisionError("planted")

        monkeypatch.setattr(one.executor, "_note", broken)
        await one.assign(assignments=[job(1, "text")])
        with pytest.raises(ZeroDivisionError, match="planted"):
            await one.playing(one.running)


async def test_a_file_that_breaks_its_upload_is_that_job_s_failure(
    nats_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk(nats_url, tmp_path, "broken-upload") as one:

        async def broken(*_: object) -> None:
            raise ZeroDivisionError("planted" + 50_000 * "x")

        monkeypatch.setattr(one.agent._reports._bucket, "put", broken)
        await one.assign(assignments=[job(1, "text"), job(2, "vae")])
        await one.report()
        failed = await one.report()
        assert (failed.failure.reason, failed.failed_job.request_id) == ("MEDIA_NOT_STORED", "r")
        assert "planted" in failed.failure.message
        assert len(failed.failure.message) <= FAILURE_CHARS_MAX, "control takes no book"
        assert failed.last and not one.running.done()
        assert not one.agent._reports.pending(1)
