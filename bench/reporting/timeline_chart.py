"""The picture of a timeline: workers as rows, time in strips, a colour a request.

A tile spans the rows of its group, so one sees the packing. Text encoding and decoding are hatched,
what belongs to a request that missed its deadline has a red outline and a cross in its label.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from control.scheduler.values import DIT

from . import page
from .drawing import WIDTH_IN, as_svg, facets, house_style, write_png
from .style import THEME
from .timeline import Tile, Timeline, chrome_trace, label, short

STRIP_S = 10.0
STRIPS_MAX = 6
LETTER_PT = 4.6  # mean width at LABEL_PT
LABEL_PT = 7.5
# Mid-light, so that the same dark text reads on all of them, on a light page and a dark one.
FILLS = (
    "#8db9e8", "#f2b56b", "#9ad29a", "#d6a3dd", "#e9d36c", "#7fd0cf", "#f0a1a8", "#b7b0ee",
    "#c4cf74", "#e3b899", "#8ecae6", "#cbb8c9",
)  # fmt: skip
TILE_INK = "#15171b"
LOST = "#9aa0ac"
HATCHES = {"text": "////", "vae": "....."}


@dataclass
class _Drawn:
    """What is drawn so far: hover texts by gid, fills by request."""

    timeline: Timeline
    fills: dict[str, str]
    titles: dict[str, str] = field(default_factory=dict)


def write_timeline(
    timeline: Timeline, out: Path, from_s: float = 0.0, until_s: float | None = None
) -> tuple[Path, ...]:
    """Writes timeline.json (the whole log, or the window where one is named), .png and .html."""
    out.mkdir(parents=True, exist_ok=True)
    trace, picture, web = (out / f"timeline.{kind}" for kind in ("json", "png", "html"))
    until_us = None if until_s is None else round(until_s * 1e6)
    events = chrome_trace(timeline, round(from_s * 1e6), until_us)
    trace.write_text(json.dumps(events, separators=(",", ":")) + "\n")
    end_s = max(timeline.end_us / 1e6, from_s + 0.001)
    shown_s = min(end_s, from_s + STRIP_S * STRIPS_MAX) if until_s is None else until_s
    with house_style():
        figure, titles = draw(timeline, from_s, shown_s)
    write_png(figure, picture)
    svg = as_svg(figure, "timeline", titles)
    web.write_text(_page(timeline, svg, from_s, shown_s, end_s))
    return (trace, picture, web)


def draw(timeline: Timeline, from_s: float, until_s: float) -> tuple[Figure, dict[str, str]]:
    """The strips of a window, and the hover text of each tile by its gid."""
    window_s = until_s - from_s
    strips = min(STRIPS_MAX, max(1, math.ceil(window_s / STRIP_S - 1e-9)))
    strip_s = window_s / strips
    rows = len(timeline.workers)
    row_in = 0.3 if rows <= 16 else max(0.06, 5.0 / rows)
    figure, axes = facets(strips, 1, 0.55 + row_in * (rows + 0.9), (False, True))
    order = dict.fromkeys(r for t in timeline.tiles for r in t.requests)
    fills = dict(zip(order, itertools.cycle(FILLS), strict=False))
    drawn = _Drawn(timeline, fills)
    joined = timeline.joined()
    for strip, one in enumerate(axes):
        begin_s = from_s + strip * strip_s
        _strip(one, drawn, joined, begin_s, begin_s + strip_s, row_in)
    axes[-1].set_xlabel("Time from the trace's start (s)")
    _legend(figure, timeline)
    return figure, drawn.titles


def _strip(
    one: Axes, drawn: _Drawn, tiles: Iterable[Tile], begin_s: float, end_s: float, row_in: float
) -> None:
    rows = len(drawn.timeline.workers)
    one.set_xlim(begin_s, end_s)
    one.set_ylim(rows - 0.5, -1.3)
    every = max(1, math.ceil(rows / 16)) if row_in < 0.15 else 1
    one.set_yticks(range(0, rows, every), list(drawn.timeline.workers[::every]))
    one.tick_params(axis="y", labelsize=7.5)
    one.grid(True, axis="x")
    one.grid(False, axis="y")
    one.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    points_a_second = (WIDTH_IN - 0.8) * 72 / (end_s - begin_s)
    for tile in tiles:
        if tile.end_us / 1e6 > begin_s and tile.start_us / 1e6 < end_s:
            _tile(one, drawn, tile, (begin_s, end_s), points_a_second, row_in)
    _happenings(one, drawn, begin_s, end_s)


def _tile(
    one: Axes,
    drawn: _Drawn,
    tile: Tile,
    window_s: tuple[float, float],
    points_a_second: float,
    row_in: float,
) -> None:
    timeline = drawn.timeline
    left_s = max(tile.start_us / 1e6, window_s[0])
    width_s = min(tile.end_us / 1e6, window_s[1]) - left_s
    missed = any(timeline.missed(r) for r in tile.requests)
    edge = THEME["bad"][0] if missed else THEME["paper"][0]
    fill = LOST if tile.lost else drawn.fills[tile.requests[0]]
    hatch = "xxxx" if tile.lost else HATCHES.get(tile.node[:4].rstrip("-"), "")
    if tile.node != DIT and not hatch:
        hatch = "\\\\\\\\"
    bands = _bands(tile.gpus)
    for top, height in bands:
        gid = f"tile-{len(drawn.titles)}"
        drawn.titles[gid] = _title(timeline, tile)
        corner = (left_s, top - 0.46)
        size = (width_s, height - 0.08)
        one.add_patch(
            Rectangle(
                corner,
                *size,
                facecolor=fill,
                edgecolor=edge,
                linewidth=1.3 if missed else 0.5,
                zorder=4 if missed else 3,
                gid=gid,
            )
        )
        if hatch:
            _hatched(one, corner, size, hatch)
    top, height = max(bands, key=lambda b: b[1])
    width_pt, height_pt = width_s * points_a_second, row_in * 72 * height
    upright = height_pt > 2 * width_pt
    text = _fitting(timeline, tile, height_pt if upright else width_pt, missed)
    if text and min(width_pt, height_pt) > LABEL_PT * 1.2:
        one.text(
            left_s + width_s / 2,
            top - 0.5 + height / 2,
            text,
            ha="center",
            va="center",
            fontsize=LABEL_PT,
            color=TILE_INK,
            rotation=90 if upright else 0,
            zorder=6,
            clip_on=True,
        )


def _hatched(one: Axes, corner: tuple[float, float], size: tuple[float, float], hatch: str) -> None:
    patch = Rectangle(corner, *size, fill=False, edgecolor=TILE_INK, linewidth=0, hatch=hatch)
    patch.set(alpha=0.55, zorder=3.5)
    one.add_patch(patch)


def _fitting(timeline: Timeline, tile: Tile, room_pt: float, missed: bool) -> str:
    """The longest of some labels that fits, or nothing."""
    cross = " ✕" if missed else ""
    degree = f" ×{len(tile.gpus)}" if len(tile.gpus) > 1 else ""
    first = short(tile.requests[0])
    for text in (
        label(timeline, tile) + cross,
        first + degree + cross,
        first + cross,
        first,
    ):
        if len(text) * LETTER_PT + 4 <= room_pt:
            return text
    return ""


def _happenings(one: Axes, drawn: _Drawn, begin_s: float, end_s: float) -> None:
    """Over the workers: arrivals, and requests that were turned away, cancelled or failed."""
    for r in drawn.timeline.requests.values():
        at_s = r.arrival_us / 1e6
        if begin_s <= at_s < end_s:
            colour = drawn.fills.get(r.id, LOST)
            one.plot(at_s, -0.85, marker="v", ms=5.5, color=colour, zorder=5)
    for fate in drawn.timeline.fates.values():
        at_s = fate.at_us / 1e6
        if fate.kind != "done" and begin_s <= at_s < end_s:
            one.plot(at_s, -0.85, marker="x", ms=5, mew=1.6, color=THEME["bad"][0], zorder=6)


def _legend(figure: Figure, timeline: Timeline) -> None:
    ink, bad, soft = TILE_INK, THEME["bad"][0], FILLS[0]
    handles: list[Patch] = [Patch(facecolor=soft, label="denoising (a colour a request)")]
    for name, hatch in (("text encoding", HATCHES["text"]), ("decoding", HATCHES["vae"])):
        handles.append(Patch(facecolor=soft, edgecolor=ink, lw=0, hatch=hatch, label=name))
    if any(f.missed for f in timeline.fates.values()):
        handles.append(Patch(facecolor=soft, edgecolor=bad, lw=1.5, label="missed its deadline"))
    if any(t.lost for t in timeline.tiles):
        handles.append(Patch(facecolor=LOST, edgecolor=ink, lw=0, hatch="xxxx", label="lost"))
    words = "▾ arrival   ✕ turned away" if timeline.requests else "✕ turned away"
    handles.append(Patch(alpha=0, label=words))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8
    )


def _bands(gpus: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal rows of neighbours: (first, count)."""
    found: list[tuple[int, int]] = []
    for gpu in sorted(gpus):
        if found and sum(found[-1]) == gpu:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((gpu, 1))
    return found


def _title(timeline: Timeline, tile: Tile) -> str:
    steps = f", {tile.steps} steps from {tile.first_step[0]}" if tile.node == DIT else ""
    words = [f"{'lost ' if tile.lost else ''}{tile.node} {label(timeline, tile)}{steps}"]
    words.append(f"{tile.start_us / 1e6:.3f} to {tile.end_us / 1e6:.3f} s")
    for request in tile.requests:
        fate = timeline.fates.get(request)
        if fate is not None:
            late = " late" if fate.kind == "done" and fate.missed else ""
            words.append(f"{request} {fate.kind}{late} at {fate.at_us / 1e6:.3f} s")
    return "\n".join(words)


def _page(timeline: Timeline, svg: str, from_s: float, shown_s: float, end_s: float) -> str:
    known = bool(timeline.requests)
    missed = sum(bool(f.missed) for f in timeline.fates.values())
    busy_us = sum((t.end_us - t.start_us) * len(t.gpus) for t in timeline.tiles)
    room_us = max(1, timeline.end_us) * max(1, len(timeline.workers))
    facts = [
        (str(len(timeline.workers)), "workers"),
        (str(len(timeline.fates)), "requests that ended"),
        (str(missed), "missed" if known else "turned away, cancelled or failed"),
        (f"{busy_us / room_us:.0%}", "of the workers' time in use"),
    ]
    caption = (
        f"{from_s:g} to {shown_s:.4g} s of {end_s:.4g} s. Hover over a tile for its steps and its "
        "requests' ends. timeline.json opens in Perfetto or chrome://tracing."
    )
    if not known:
        caption += " Without the trace, deadlines are not known: late requests are not marked."
    body = [page.heading(1, "GPU timeline"), page.tiles(facts), page.drawn(svg, caption)]
    return page.page("GPU timeline", body)
