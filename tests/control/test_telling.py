"""Pages of requests fit a message, and a deposed leader's calls are the next one's."""

from __future__ import annotations

from typing import Any

import pytest

from control.entrance.doorway import Doorway
from control.leading.promises import Deposed
from control.requests import refusals, telling
from control.requests.records import Records, ending_event
from hocket.errors import Refused, RequestFailed, status_code
from hocket.v1 import control_pb2, generation_pb2, journal_pb2
from tests.control.stage import submit_of


def test_a_page_of_long_prompts_fits_a_message() -> None:
    records = Records(7)
    for number in range(1000):
        submit = submit_of(f"r{number}")
        submit.request.spec.prompt = submit.request.spec.negative_prompt = "x" * 2000
        record = records.receive(submit, b"")
        accepted = generation_pb2.Accepted(effective_spec=submit.request.spec)
        promise = journal_pb2.Promise(submit=submit, answer=accepted)
        records.promise(record, promise, 1, number + 1)
    asked, seen = control_pb2.ListRequestsRequest(page_size=1000), []
    while True:
        page = telling.page(records, asked)
        assert page.ByteSize() < 3 << 20
        seen += [r.metadata.request_id for r in page.requests]
        asked.page_token = page.next_page_token
        if not asked.page_token:
            break
    assert seen == [f"r{number}" for number in range(999, -1, -1)]


def test_a_repeat_of_a_failed_request_says_that_it_had_ended() -> None:
    records = Records(7)
    record = records.receive(submit_of("a"), b"")
    records.promise(record, journal_pb2.Promise(submit=record.submit), 1, 1)
    ended = journal_pb2.EndedRequest(request_id="a")
    ended.failed.reason = "MODEL_ERROR"
    records.end("a", ending_event(ended))
    answer = refusals.repeat(record)
    assert answer.rejected.metadata["ended"] == "1" and answer.request_id == "a"
    assert record.ended is not None and not record.ended.failed.metadata


@pytest.mark.parametrize(
    ("reason", "code"),
    [("INVALID_REQUEST", "INVALID_ARGUMENT"), ("NOT_ENDED", "FAILED_PRECONDITION")],
)
def test_codes(reason: str, code: str) -> None:
    assert status_code(Refused(reason, "")).name == code
    assert status_code(RequestFailed("MODEL_ERROR", "")).name == "ABORTED"


class _Aborted(Exception):
    """With a status."""


class _Context:
    async def abort_with_status(self, status: Any) -> None:
        raise _Aborted(status.details)


class _Led:
    async def Submit(self, request: Any, context: Any) -> None:
        raise Deposed(1, 2)


async def test_a_deposed_leader_sends_its_callers_to_the_next() -> None:
    doorway, led, context = Doorway(lambda: "b:1"), _Led(), _Context()
    doorway.open(led)  # type: ignore[arg-type]
    with pytest.raises(_Aborted, match="b:1"):
        await doorway.Submit(control_pb2.SubmitRequest(), context)
