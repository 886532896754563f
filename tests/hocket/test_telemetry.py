"""Spans reach the local file, whole and soon; trace context survives its text form."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Tracer

from hocket.tracing import telemetry
from hocket.tracing.file_spans import FileTracer
from hocket.tracing.span_file import SpanFile, read_spans


def test_a_span_is_written_with_everything_it_knows(tmp_path: Path) -> None:
    told = telemetry.setup("control", "7", tmp_path)
    with told.tracer.start_as_current_span("outer", attributes={"n": 3}) as outer:
        with told.tracer.start_as_current_span("inner", attributes={"who": ["w0", "w1"]}):
            pass
        outer.add_event("woke", {"why": "arrival"})
    told.close()
    by_name = {span.name: span for span in read_spans(tmp_path / "traces")}
    outer_span, inner = by_name["outer"], by_name["inner"]
    assert inner.parent_id == outer_span.span_id and inner.trace_id == outer_span.trace_id
    assert outer_span.parent_id == "" and outer_span.attributes == {"n": 3}
    assert inner.attributes == {"who": ["w0", "w1"]}
    assert (inner.service, inner.instance) == ("control", "7")
    assert outer_span.events[0].name == "woke"
    assert outer_span.start_unix_ns <= inner.start_unix_ns <= inner.end_unix_ns
    assert (tmp_path / "traces" / "control-7.jsonl").exists()


def test_a_late_span_keeps_its_times_and_its_parent(tmp_path: Path) -> None:
    told = telemetry.setup("gpuworker", "w0", tmp_path)
    with told.tracer.start_as_current_span("request"):
        parent = telemetry.traceparent()
    child = telemetry.record_span(
        told.tracer, "step", start_ns=1000, end_ns=3000, parent=parent, error="lost"
    )
    told.close()
    span = next(s for s in read_spans(tmp_path / "traces") if s.name == "step")
    assert (span.start_unix_ns, span.end_unix_ns) == (1000, 3000)
    assert span.trace_id == telemetry.trace_id(parent) == telemetry.trace_id(child)
    assert span.parent_id == parent.split("-")[2] and span.span_id == child.split("-")[2]
    assert span.status == "error: lost"


def test_an_unsampled_caller_is_recorded_all_the_same(tmp_path: Path) -> None:
    told = telemetry.setup("gateway", "0", tmp_path)
    parent = f"00-{'a' * 32}-{'b' * 16}-00"
    telemetry.record_span(told.tracer, "step", start_ns=1, end_ns=2, parent=parent)
    told.close()
    assert [s.trace_id for s in read_spans(tmp_path / "traces")] == ["a" * 32]


@pytest.mark.parametrize("text", ["", "nonsense", "00-zz-zz-01"])
def test_a_malformed_traceparent_names_nothing(text: str) -> None:
    assert telemetry.traceparent(telemetry.context_from(text)) == ""
    assert telemetry.trace_id(text) == ""


def test_a_flush_waits_for_the_disk(tmp_path: Path) -> None:
    told = telemetry.setup("gateway", "0", tmp_path)
    telemetry.record_span(told.tracer, "step", start_ns=1, end_ns=2)
    assert told.file.force_flush(5000)
    assert len(read_spans(tmp_path / "traces")) == 1
    told.close()
    told.close()  # twice is no error


def test_a_torn_line_is_skipped_and_a_full_file_rotates(tmp_path: Path) -> None:
    told = telemetry.setup("gateway", "0", tmp_path)
    small = SpanFile(tmp_path / "traces" / "other-0.jsonl", "other", "0", bytes_max=200)
    rotated = FileTracer(small)
    for _ in range(4):
        for tracer in (told.tracer, rotated):
            telemetry.record_span(tracer, "step", start_ns=1, end_ns=2)
        assert small.force_flush(5000)
    small.shutdown()
    told.close()
    folder = tmp_path / "traces"
    assert (folder / "other-0.1.jsonl").exists()
    with (folder / "gateway-0.jsonl").open("ab") as file:
        file.write(b'{"trace_id": "torn')
    assert len([s for s in read_spans(folder) if s.service == "gateway"]) == 4


def _spoken(tracer: Tracer) -> None:
    """A span with everything that is ever said of one."""
    parent = telemetry.context_from(f"00-{'a' * 32}-{'b' * 16}-00")
    with tracer.start_as_current_span("call", parent, attributes={"n": 1, "of": ("a", 2)}) as span:
        span.update_name("renamed")
        span.set_attributes({"x": 1.5, "yes": True})
        span.add_event("woke", {"why": "arrival"})
    with suppress(ValueError), tracer.start_as_current_span("failing", parent):
        raise ValueError("no")
    span.set_attribute("late", 1)
    span.add_event("late")
    span.end()
    telemetry.record_span(tracer, "over", start_ns=1, end_ns=2, parent=parent, error="lost")
    telemetry.record_span(
        tracer, "alone", start_ns=1, end_ns=2, parent=f"00-{'0' * 32}-{'0' * 16}-01"
    )


def test_the_file_says_the_same_with_and_without_an_exporter(tmp_path: Path) -> None:
    folders = tmp_path / "sdk", tmp_path / "own"
    files = [SpanFile(folder / "control-0.jsonl", "control", "0") for folder in folders]
    provider = TracerProvider(sampler=ALWAYS_ON)
    provider.add_span_processor(files[0])
    _spoken(provider.get_tracer("hocket"))
    _spoken(FileTracer(files[1]))
    told: list[list[object]] = []
    for file, folder in zip(files, folders, strict=True):
        file.shutdown()
        read = sorted(read_spans(folder), key=lambda span: span.name)
        assert len({span.span_id for span in read}) == len(read) == 4
        alone = next(span for span in read if span.name == "alone")
        assert int(alone.trace_id, 16) and not alone.parent_id
        told.append([(span.name, span.status, span.parent_id, span.attributes) for span in read])
        events = [[(e.name, e.attributes.keys()) for e in span.events] for span in read]
        told[-1].append(events)
    assert told[0] == told[1]


def test_an_unwritable_file_costs_spans_and_nothing_else(tmp_path: Path) -> None:
    told = telemetry.setup("gateway", "0", tmp_path)
    (tmp_path / "traces" / "gateway-0.jsonl").mkdir()
    telemetry.record_span(told.tracer, "step", start_ns=1, end_ns=2)
    assert told.file.force_flush(5000)
    assert told.file.drops == 1
    told.close()


def test_forked_processes_draw_different_ids(tmp_path: Path) -> None:
    read, write = os.pipe()
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            told = telemetry.setup("gpuworker", f"w{os.getpid()}", tmp_path)
            named = telemetry.record_span(told.tracer, "step", start_ns=1, end_ns=2)
            os.write(write, f"{named}\n".encode())
            told.close()
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        names = pipe.read().split()
    assert len(set(names)) == 2
    assert len(read_spans(tmp_path / "traces")) == 2


def test_a_log_line_names_its_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = telemetry.setup("gateway", "0", tmp_path, "info")
    with told.tracer.start_as_current_span("call"):
        named = telemetry.traceparent()
        logging.getLogger("gateway.test").info("hello %s", "there")
    told.close()
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert line["message"] == "hello there" and line["level"] == "info"
    assert (line["service"], line["trace_id"]) == ("gateway", telemetry.trace_id(named))
