"""Promises of a test, and their stream."""

from __future__ import annotations

from control.leading.promises import Promises
from control.leading.standby import Book
from hocket.clock import SystemClock
from hocket.messaging.bus import Subjects
from hocket.messaging.stores import Log
from hocket.v1 import control_pb2, generation_pb2, journal_pb2, types_pb2

PROMPT = "a fox"


def promised(request: str, model: str = "m", deadline_us: int = 0) -> journal_pb2.Promise:
    """An open one."""
    spec = types_pb2.GenerationSpec(
        model=model, prompt=PROMPT, steps=4, seed=1, shape=types_pb2.Shape(width=64, height=64)
    )
    wish = generation_pb2.GenerateRequest(spec=spec, idempotency_key=f"key-{request}")
    wish.slo.deadline_us = deadline_us
    return journal_pb2.Promise(
        submit=control_pb2.SubmitRequest(request_id=request, request=wish),
        answer=generation_pb2.Accepted(request_id=request, effective_spec=spec),
    )


def ended(request: str) -> journal_pb2.Promise:
    """One that was cancelled."""
    promise = promised(request)
    promise.ended.request_id = request
    promise.ended.cancelled.steps_done = 2
    return promise


async def taken(
    stream: Log, subjects: Subjects, term: int, retention_s: float = 600.0, ended_max: int = 1000
) -> Promises:
    """A new leader's pen."""
    return await Promises.take(
        stream, subjects, term, SystemClock(), retention_s=retention_s, ended_max=ended_max
    )


async def book_of(stream: Log, subjects: Subjects) -> Book:
    """What a stream says."""
    book = Book(subjects)
    async for entry in stream.read(subjects.promises):
        book.take(entry)
    return book
