"""Timelines: what is on which track, joined tiles, and files that parse."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from bench.report import timeline_command
from bench.reporting.timeline import Timeline, chrome_trace, timeline_of
from bench.sim.trace import TraceRequest, write_trace
from control.scheduler.schedule_log import read_log


def run(node: str, requests: list[str], gpus: list[int], start: int, end: int, **more: object):
    line = {"kind": "run", "node": node, "requests": requests, "gpus": gpus, "start_us": start}
    line |= {"end_us": end, "first_step": 0, "steps": 1, "batch": len(requests)}
    return {**line, **more}


LOG = "\n".join(
    json.dumps(line)
    for line in (
        {"kind": "header", "workers": ["w0", "w1", "w2", "w3"], "start": 0},
        run("text", ["a"], [0], 0, 200_000),
        run("dit", ["a"], [0, 1, 3], 200_000, 700_000, steps=2),
        run("dit", ["a"], [0, 1, 3], 700_000, 1_200_000, steps=2, first_step=2),
        run("dit", ["b", "c"], [2], 300_000, 1_300_000, first_step=[0, 5]),
        run("dit", ["b"], [2], 1_300_000, 1_400_000, kind="lost"),
        run("vae", ["a"], [0], 1_200_000, 1_500_000),
        {"kind": "done", "request": "a", "finish_us": 1_500_000},
        {"kind": "done", "request": "b", "finish_us": 1_400_000},
        {"kind": "done", "request": "c", "finish_us": 1_300_000},
        {"kind": "rejected", "request": "d", "at_us": 900_000, "reason": "NO_TIME"},
    )
)
TRACE = tuple(
    TraceRequest(
        id=name, arrival_us=0, model="m", workflow="txt2img", width=512, height=512, frames=1,
        steps=4, slo_us=slo, priority=0,
    )
    for name, slo in (("a", 1_400_000), ("b", 1_400_000), ("c", 2_000_000), ("d", 9))
)  # fmt: skip


@pytest.fixture
def timeline() -> Timeline:
    return timeline_of(read_log(LOG), TRACE)


def test_a_run_is_on_every_members_track(timeline: Timeline) -> None:
    events = chrome_trace(timeline)["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    tracks = sorted(e["tid"] for e in slices if e["cat"] == "dit" and "a 512" in e["name"])
    assert tracks == [0, 0, 1, 1, 3, 3]
    (batch,) = [e for e in slices if e["args"]["requests"] == ["b", "c"]]
    assert (batch["tid"], batch["ts"], batch["dur"]) == (2, 300_000, 1_000_000)
    assert batch["args"]["first_step"] == [0, 5] and batch["args"]["batch"] == 2
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == ["w0", "w1", "w2", "w3", "requests"]
    assert {e["cat"] for e in events if e["ph"] == "i"} == {"arrival", "missed", "done", "rejected"}


def test_a_window_keeps_what_touches_it(timeline: Timeline) -> None:
    events = chrome_trace(timeline, 1_250_000, 1_350_000)["traceEvents"]
    cats = [e["cat"] for e in events if e["ph"] == "X"]
    assert sorted(cats) == ["dit", "lost", "vae"]


def test_runs_of_one_group_are_one_tile(timeline: Timeline) -> None:
    joined = [t for t in timeline.joined() if t.node == "dit" and t.requests == ("a",)]
    assert [(t.start_us, t.end_us, t.steps) for t in joined] == [(200_000, 1_200_000, 4)]


def test_late_and_rejected_requests_are_missed(timeline: Timeline) -> None:
    assert [timeline.missed(r) for r in "abcd"] == [True, False, False, True]
    blind = timeline_of(read_log(LOG))
    assert [blind.missed(r) for r in "abcd"] == [False, False, False, True]
    assert blind.fates["a"].missed is None


@pytest.mark.parametrize("window", [[], ["--from-s", "0.5", "--until-s", "1.25"]])
def test_files_are_written_and_parse(tmp_path: Path, window: list[str]) -> None:
    (tmp_path / "log.jsonl").write_text(LOG)
    (tmp_path / "trace.jsonl").write_text(write_trace(TRACE))
    app = Typer()
    app.command()(timeline_command)
    arguments = [str(tmp_path / "log.jsonl"), "--out", str(tmp_path / "out")]
    arguments += ["--trace", str(tmp_path / "trace.jsonl"), *window]
    found = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert json.loads((tmp_path / "out/timeline.json").read_text())["traceEvents"]
    with Image.open(tmp_path / "out/timeline.png") as picture:
        assert picture.width == 1430 and picture.height > 150
    page = (tmp_path / "out/timeline.html").read_text()
    titles = [
        e.text or ""
        for e in ElementTree.fromstring(page).iter()
        if e.tag.endswith("}title") and "svg" in e.tag
    ]
    assert any("a 512² ×3, 4 steps" in t and "late" in t for t in titles)


def test_a_bad_log_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "done"}\n')
    app = Typer()
    app.command()(timeline_command)
    arguments = [str(tmp_path / "log.jsonl"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, arguments).exit_code == 2
