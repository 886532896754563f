"""Files are made beside the compute thread: bounded, in order; each failure is its job's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from gpuworker.executor import Media, RunNote
from gpuworker.loading import load_card
from gpuworker.memory.weights import WeightStore
from gpuworker.steps import media
from gpuworker.steps.encoding import EncodingThreads, NotesInOrder
from gpuworker.steps.pace import StepPace
from hocket.v1 import mesh_pb2, types_pb2
from tests.worker.test_pace import STEPS, Desk
from tests.worker.tiny_models import Reference
from tests.worker.worker_pool import CPU

WAIT_S = 30.0
MADE = Media(b"file", types_pb2.MediaInfo())


@pytest.fixture
def threads() -> Iterator[EncodingThreads]:
    made = EncodingThreads(threads=1, waiting_max=2, bytes_max=100)
    yield made
    made.close(WAIT_S)


def note(request: str, *, last: bool = False) -> RunNote:
    return RunNote(mesh_pb2.Assignment(), {request: 0}, last=last)


def held_up(threads: EncodingThreads, size_bytes: int) -> threading.Event:
    """Its one thread is at work on something, until the event is set."""
    go_on, at_work = threading.Event(), threading.Event()

    def work() -> None:
        at_work.set()
        go_on.wait(WAIT_S)

    threads.submit(size_bytes, work)
    assert at_work.wait(WAIT_S)
    return go_on


@pytest.mark.parametrize("waiting", [(10, 10), (60,)])
def test_who_brings_more_than_may_wait_waits(
    threads: EncodingThreads, waiting: tuple[int, ...]
) -> None:
    go_on = held_up(threads, 7)
    for size_bytes in waiting:
        threads.submit(size_bytes, lambda: None)
    assert threads.size_bytes == 7 + sum(waiting), "frames in hand count, too"
    came, done = threading.Event(), threading.Event()
    brings = threading.Thread(target=lambda: (threads.submit(60, done.set), came.set()))
    brings.start()
    assert not came.is_set()
    go_on.set()
    assert came.wait(WAIT_S) and done.wait(WAIT_S)
    brings.join(WAIT_S)


def test_one_that_is_larger_than_all_that_may_wait_is_taken_alone(
    threads: EncodingThreads,
) -> None:
    done = threading.Event()
    threads.submit(1 << 40, done.set)
    assert done.wait(WAIT_S)


def test_the_end_lets_go_of_what_waits_and_of_who_waits(threads: EncodingThreads) -> None:
    go_on, run = held_up(threads, 1), threading.Event()
    threads.submit(1, run.set)
    threads.submit(1, run.set)
    waits = threading.Thread(target=threads.submit, args=(1, run.set))
    waits.start()
    threads.stop()
    waits.join(WAIT_S)
    assert not waits.is_alive() and threads.size_bytes == 1
    go_on.set()
    threads.close(WAIT_S)
    assert threads.size_bytes == 0 and not run.is_set()


def test_notes_are_told_in_the_order_of_their_places() -> None:
    told: list[str] = []
    notes = NotesInOrder(lambda n: told.extend(n.behind), lambda: told.append("over"))
    first, second = notes.place(), notes.place()
    notes(note("c"))
    notes.fill(second, [note("b")])
    notes.close()
    assert not told
    notes.fill(first, [])
    assert told == ["b", "c", "over"]


class _Gate:
    """Holds the encoding of files up, or makes it fail."""

    def __init__(self) -> None:
        self.open, self.failing, self.sizes = threading.Event(), False, [0]
        self._encode = media.encode_media

    def __call__(self, *arguments: object) -> object:
        assert self.open.wait(WAIT_S)
        if self.failing:
            raise ValueError("no codec")
        return self._encode(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> _Gate:
    made = _Gate()
    monkeypatch.setattr(media, "encode_media", made)
    return made


@pytest.fixture
def desk(flux: Reference) -> Desk:
    weights = WeightStore(CPU)
    return Desk((load_card(flux.folder, CPU, torch.float32, weights), weights), flux, StepPace())


def run(desk: Desk, gate: _Gate) -> list[RunNote]:
    """A decode, and another job's encode and steps behind it, during which its file waits."""
    desk.give("text", 1)
    desk.give("dit", STEPS)
    desk.give("vae", 1, first_step=STEPS)
    desk.give("text", 1, attempt=1)
    notes: list[RunNote] = []
    pending: list[tuple[int, ...]] = []

    def heard(note: RunNote) -> None:
        notes.append(note)
        if note.assignment.sequence == 4:
            pending.append(desk.inbox.pending())
            gate.open.set()
        if note.assignment.sequence == 3 and note.last:
            desk.inbox.close()

    desk._engine.run(heard)
    assert pending == [(3, 4)], "an assignment is over with its file"
    assert desk.inbox.pending() == ()
    return notes


def test_the_compute_thread_goes_on_while_a_file_is_made(desk: Desk, gate: _Gate) -> None:
    *_, between, last = run(desk, gate)
    assert [note.assignment.sequence for note in (between, last)] == [4, 3]
    assert last.last and last.media["r"].content.startswith(b"\x89PNG")
    assert last.steps[0].duration_us > 0


def test_a_file_that_cannot_be_made_is_its_jobs_failure(desk: Desk, gate: _Gate) -> None:
    gate.failing = True
    *_, last = run(desk, gate)
    assert last.last and last.failure is not None and not last.media
    assert last.failure.reason == "MODEL_ERROR" and "no codec" in last.failure.message
    assert last.failed_job is not None and last.failed_job.request_id == "r"
