"""Who gave way to whom, read off recorded steps; and the chart of it."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from hocket.tracing import gantt, spans
from hocket.tracing.interruptions import InterruptionKind, Stretch, interruptions, stretches
from hocket.tracing.span_file import SpanRecord

MS = 1_000_000


def step(
    request: str,
    number: int,
    start_ms: float,
    took_ms: float,
    *workers: str,
    node: str = "dit",
    op: str = "",
) -> SpanRecord:
    return SpanRecord(
        trace_id="t" * 32,
        span_id=f"{request}{number}{node}",
        parent_id="",
        name=spans.STEP,
        start_unix_ns=round(start_ms * MS),
        end_unix_ns=round((start_ms + took_ms) * MS),
        service="gpuworker",
        instance=workers[0],
        attributes={
            spans.REQUEST: request,
            spans.NODE: node,
            spans.OPERATION: op or node,
            spans.STEP_INDEX: number,
            spans.WORKERS: list(workers),
        },
    )


def steps(
    request: str, first: int, count: int, start_ms: float, took_ms: float, *workers: str
) -> list[SpanRecord]:
    return [
        step(request, first + i, start_ms + i * took_ms, took_ms, *workers) for i in range(count)
    ]


def overtaken() -> list[SpanRecord]:
    """The video runs on w0 w1, pauses for an apple and a fox, and goes on alone, then wide."""
    return [
        *steps("video", 1, 3, 0, 100, "w0", "w1"),
        *steps("apple", 1, 4, 305, 100, "w0"),
        *steps("fox", 1, 6, 305, 100, "w1"),
        *steps("video", 4, 2, 710, 180, "w0"),
        *steps("video", 6, 2, 1075, 100, "w0", "w1"),
        step("video", 1, 1280, 50, "w1", node="vae"),
    ]


def test_steps_on_the_same_workers_are_one_stretch() -> None:
    found = stretches(overtaken())
    video = [s for s in found if s.request == "video"]
    assert [(s.first_step, s.last_step, s.workers) for s in video] == [
        (1, 3, ("w0", "w1")),
        (4, 5, ("w0",)),
        (6, 7, ("w0", "w1")),
        (1, 1, ("w1",)),
    ]
    assert video[0].step_ns == 100 * MS


def test_a_pause_names_who_overtook() -> None:
    paused, widened = interruptions(stretches(overtaken()))
    assert (paused.kind, paused.request, paused.gap_ns) == (
        InterruptionKind.PAUSED,
        "video",
        410 * MS,
    )
    assert paused.overtakers == ("apple", "fox")
    assert (widened.kind, widened.overtakers) == (InterruptionKind.WIDENED, ())


def test_a_gap_shorter_than_a_step_is_no_pause() -> None:
    found = stretches([*steps("a", 1, 2, 0, 100, "w0"), *steps("a", 3, 2, 290, 100, "w0")])
    assert len(found) == 1 and interruptions(found) == []


def test_who_loses_one_of_two_workers_is_narrowed_for_the_newcomer() -> None:
    spans_ = [
        *steps("a", 1, 2, 0, 100, "w0", "w1"),
        *steps("a", 3, 2, 205, 180, "w0"),
        *steps("b", 1, 3, 210, 100, "w1"),
    ]
    (narrowed,) = interruptions(stretches(spans_))
    assert (narrowed.kind, narrowed.overtakers) == (InterruptionKind.NARROWED, ("b",))


def test_who_goes_on_elsewhere_has_moved() -> None:
    spans_ = [*steps("a", 1, 2, 0, 100, "w0"), *steps("a", 3, 2, 210, 100, "w1")]
    (moved,) = interruptions(stretches(spans_))
    assert (moved.kind, moved.overtakers) == (InterruptionKind.MOVED, ())


def test_repeated_steps_after_a_loss_are_no_interruption() -> None:
    spans_ = [*steps("a", 1, 3, 0, 100, "w0"), *steps("a", 1, 3, 900, 100, "w1")]
    assert interruptions(stretches(spans_)) == []


def test_members_in_another_order_go_on() -> None:
    spans_ = [step("a", 1, 0, 100, "w0", "w1"), step("a", 2, 110, 100, "w1", "w0")]
    assert len(stretches(spans_)) == 1


def test_the_chart_has_a_row_a_worker() -> None:
    w0, w1, ruler = (line.plain for line in gantt.chart(stretches(overtaken()), 26))
    assert w0 == "    w0 AAAAAABBBBBBBBAAAAAAAAAAA·"
    assert w1.startswith("    w1 AAAAAACCCCCCCCCCCC") and w1.endswith("AA")
    assert ruler.endswith("1.3 s")
    assert gantt.chart([], 10) == []


def test_a_sentence_names_both_sides() -> None:
    found = stretches(overtaken())
    sentence = gantt.told(interruptions(found)[0], {"video": "the video"}, 0)
    assert sentence == (
        "  0.3 s  the video paused after step 3 [w0 w1] for apple, fox; went on at 0.7 s x1 [w0]"
    )


def test_the_page_is_well_formed_and_escapes() -> None:
    found = stretches(overtaken())
    page = gantt.page("a < b", found, interruptions(found), {"video": "<b>a film</b>"})
    svg = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert len([e for e in svg.iter() if e.tag.endswith("rect")]) == sum(
        len(s.workers) for s in found
    )
    assert "&lt;b&gt;a film" in page and "a &lt; b" in page and "<b>a film" not in page


def test_each_pass_of_a_workflow_has_interruptions_of_its_own() -> None:
    found = stretches(
        [
            *(step("r", n, 100 * n, 100, "w0", node="first", op="denoise") for n in (1, 2)),
            step("r", 1, 300, 20, "w0", node="sketch", op="decode"),
            *(step("r", n, 1000 + 100 * n, 100, "w0", node="second", op="denoise") for n in (1, 2)),
            *(step("r", n, 2000 + 100 * n, 100, "w1", node="second", op="denoise") for n in (3, 4)),
        ]
    )
    (only,) = interruptions(found)
    assert (only.kind, only.before.node) == (InterruptionKind.PAUSED, "second")
    told = "paused after step 2 of second [w0]; went on at 2.2 s x1 [w1]"
    assert gantt.told(only, {}, found[0].start_ns).endswith(told)
    opaque = gantt.page("passes", found, [only], {}).count('fill-opacity="1.0"')
    assert opaque == 3 and len(found) == 4, "what has no steps is pale"


def test_letters_repeat_when_they_run_out() -> None:
    known = gantt.letters([str(i) for i in range(70)])
    assert known["0"] == known["62"] == "A"


def test_a_stretch_without_neighbours_tells_its_step_time() -> None:
    assert Stretch("r", "dit", "dit", ("w0",), 1, 4, 0, 400 * MS).step_ns == 100 * MS
