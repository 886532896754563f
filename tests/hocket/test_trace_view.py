"""What `hocket trace` and `hocket timeline` make of literal span files."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from hocket.tracing.span_file import SpanRecord, read_spans
from hocket.tracing.trace_view import chrome_trace, latest_request, spans_of, timeline

MS = 1_000_000
GATEWAY = """
{"trace_id":"t1","span_id":"a","parent_id":"","name":"Generate","start_unix_ns":1000000000,\
"end_unix_ns":1100000000,"service":"gateway","instance":"0","attributes":\
{"hocket.request_id":"r1","hocket.outcome":"finished"}}
{"trace_id":"t2","span_id":"z","parent_id":"","name":"Generate","start_unix_ns":1500000000,\
"end_unix_ns":1600000000,"service":"gateway","instance":"0","attributes":\
{"hocket.request_id":"r2"}}
"""
WORKER = """
{"trace_id":"t1","span_id":"c","parent_id":"b","name":"step","start_unix_ns":1040000000,\
"end_unix_ns":1060000000,"service":"gpuworker","instance":"w0","attributes":\
{"hocket.request_id":"r1","hocket.node":"dit","hocket.step":1,"hocket.steps":2,"hocket.degree":1,\
"hocket.workers":["w0"],"hocket.worker":"w0","hocket.predicted_us":10000}}
{"trace_id":"t1","span_id":"e","parent_id":"b","name":"transfer","start_unix_ns":1060000000,\
"end_unix_ns":1062000000,"service":"gpuworker","instance":"w1","attributes":\
{"hocket.request_id":"r1","hocket.worker":"w1","hocket.bytes":2048}}
{"trace_id":"t1","span_id":"d","parent_id":"b","name":"step","start_unix_ns":1062000000,\
"end_unix_ns":1072000000,"service":"gpuworker","instance":"w0","attributes":\
{"hocket.request_id":"r1","hocket.node":"dit","hocket.step":2,"hocket.steps":2,"hocket.degree":2,\
"hocket.workers":["w0","w1"],"hocket.worker":"w0","hocket.predicted_us":10000,\
"hocket.members_us":[3000,9500]}}
"""
CONTROL = """
{"trace_id":"t1","span_id":"b","parent_id":"a","name":"admit","start_unix_ns":1010000000,\
"end_unix_ns":1020000000,"service":"control","instance":"0","attributes":\
{"hocket.request_id":"r1"}}
"""


@pytest.fixture
def spans(tmp_path: Path) -> list[SpanRecord]:
    texts = {"gateway-0": GATEWAY, "control-0": CONTROL, "gpuworker-w0": WORKER}
    for name, text in texts.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    return read_spans(tmp_path)


def test_the_files_are_joined_by_trace(spans: list[SpanRecord]) -> None:
    assert [s.span_id for s in spans_of("r1", spans)] == ["a", "b", "c", "e", "d"]
    assert spans_of("nobody", spans) == []
    assert latest_request(spans) == "r2" and latest_request([]) == ""


def test_the_timeline_is_a_tree_with_times_from_the_start(spans: list[SpanRecord]) -> None:
    lines = timeline(spans_of("r1", spans))
    shown = [" ".join(line.replace("█", "").split()) for line in lines[1:]]
    assert shown == [
        "gateway-0: Generate 0.0 100.0 finished",
        "control-0: admit 10.0 10.0",
        "gpuworker-w0: step 40.0 20.0 dit 1/2 x1 [w0] predicted 10.0 ms (+100%)",
        "gpuworker-w1: transfer 60.0 2.0 2 KiB",
        "gpuworker-w0: step 62.0 10.0 dit 2/2 x2 [w0 w1] predicted 10.0 ms (+0%)"
        " waited 6.5 ms for w1",
    ]
    depths = [len(line) - len(line.lstrip()) for line in lines[1:]]
    assert depths == [0, 2, 4, 4, 4]


def test_bars_lie_where_the_spans_lie(spans: list[SpanRecord]) -> None:
    lines = timeline(spans_of("r1", spans))
    bars = [line[55:85] for line in lines[1:]]
    assert bars[0].startswith("█" * 29)
    assert bars[2].index("█") == 12 and bars[2].count("█") == 6


def test_a_span_whose_parent_is_unknown_is_not_lost(spans: list[SpanRecord]) -> None:
    orphans = [span for span in spans_of("r1", spans) if span.name == "step"]
    assert len(timeline(orphans)) == 3
    assert timeline([]) == []


def test_the_chrome_trace_has_a_track_for_each_worker(spans: list[SpanRecord]) -> None:
    document = json.loads(msgspec.json.encode(chrome_trace(spans)))
    events = document["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {0: "w0", 1: "w1"}
    slices = [e for e in events if e["ph"] == "X"]
    wide = [e for e in slices if e["args"].get("degree") == 2]
    assert [e["tid"] for e in wide] == [0, 1], "a step stands on every member's track"
    assert wide[0]["ts"] == 22_000.0 and wide[0]["dur"] == 10_000.0
    assert wide[0]["args"] == {
        "request": "r1",
        "step": 2,
        "degree": 2,
        "predicted_us": 10_000,
        "own_us": 3_000,
        "trace": "t1",
    }
    assert wide[0]["name"] == "dit 2"
    assert [e["tid"] for e in slices if e["name"] == "transfer"] == [1]


def test_tracks_are_in_the_order_of_the_workers_numbers() -> None:
    spans = [
        SpanRecord(
            trace_id="t",
            span_id=name,
            parent_id="",
            name="step",
            start_unix_ns=0,
            end_unix_ns=MS,
            service="gpuworker",
            instance=name,
        )
        for name in ("w10", "w2", "w1")
    ]
    events = chrome_trace(spans)["traceEvents"]
    assert isinstance(events, list)
    tracks = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert tracks == ["w1", "w2", "w10"]
