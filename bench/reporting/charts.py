"""The charts of an experiment: attainment over what was swept, latency CDFs, class bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator, PercentFormatter

from .analysis import TARGET, CellStanding, ClassStanding, Sweep
from .drawing import end_labels, facets
from .statistics import mean_interval
from .style import SOLID, THEME, Look, axis_title, cell_title

CURVE_HEIGHT_IN = (4.6, 3.7)  # of one facet: alone, among several
CDF_POINTS = 300
OTHER_DOT: dict[str, Any] = {"color": THEME["soft"][0], "alpha": 0.3, "ms": 4.5, "mew": 0.0}
BANDS = 4  # policies whose interval is drawn as a band; of the others one sees the mean


def curves(sweeps: Sequence[Sweep], looks: Mapping[str, Look], names: tuple[str, ...]) -> Figure:
    """Attainment over one swept number; a facet for every value of the rest (`names`)."""
    labels = max(len(s.curves) + bool(s.bound) for s in sweeps)
    height_in = max(CURVE_HEIGHT_IN[len(sweeps) > 1], 0.9 + 0.2 * labels)
    figure, axes = facets(len(sweeps), 2, height_in)
    lowest = min(min(_means(c).values()) for s in sweeps for c in s.curves.values())
    floor = max(0.0, (lowest * 100 - 4) // 10 / 10)
    for place, (sweep, one) in enumerate(zip(sweeps, axes, strict=True)):
        one.set_ylim(floor, 1.02)
        one.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        one.yaxis.set_major_locator(MultipleLocator(0.1 if floor > 0.35 else 0.2))
        one.axhline(TARGET, color=THEME["soft"][0], lw=0.7, ls=(0.0, (2, 3)))
        _curves(one, sweep, looks, height_in)
        one.set_xticks(sweep.xs if len(sweep.xs) <= 9 else sweep.xs[:: len(sweep.xs) // 6])
        one.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        one.set_xlabel(axis_title(sweep.name))
        if place % 2 == 0:
            one.set_ylabel("Requests on time")
        if len(sweeps) > 1:
            one.set_title(cell_title(sweep.rest, names))
    return figure


def dots(
    cells: Sequence[CellStanding], looks: Mapping[str, Look], names: tuple[str, ...]
) -> Figure:
    """Attainment with intervals, a facet a cell, where nothing was swept."""
    rows = max(len(c.standings) for c in cells)
    figure, axes = facets(len(cells), 2 if len(cells) > 1 else 1, 0.9 + 0.26 * rows, (True, False))
    for cell, one in zip(cells, axes, strict=True):
        ordered = sorted(cell.standings, key=lambda s: s.attainment.mean)
        for y, standing in enumerate(ordered):
            look, mean = looks[standing.series], standing.attainment
            one.hlines(y, mean.low, min(1.0, mean.high), color=look.colour, lw=4, alpha=0.35)
            one.plot(mean.mean, y, "o", color=look.colour, ms=9 if look.prominent else 6)
        if cell.bound is not None:
            one.axvline(cell.bound.mean, color=THEME["bound"][0], lw=1.2, ls=(0.0, (4, 3)))
            one.annotate(
                "bound",
                (cell.bound.mean, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        _named_rows(one, [s.series for s in ordered], looks)
        one.grid(True, axis="x")
        one.grid(False, axis="y")
        one.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        one.set_xlabel("Requests on time")
        if len(cells) > 1:
            one.set_title(cell_title(cell.cell, names))
    return figure


def overview(
    cells: Sequence[CellStanding],
    baseline: str,
    chosen: Sequence[str],
    looks: Mapping[str, Look],
    names: tuple[str, ...],
) -> Figure:
    """All cells on one page: every policy a dot; the rest of the policies in grey."""
    figure, (one,) = facets(1, 1, 1.3 + 0.32 * len(cells))
    for y, cell in enumerate(cells):
        ours, rival = cell.of(baseline), cell.best_rival
        for s in sorted(cell.standings, key=lambda s: looks[s.series].prominent):
            look, named = looks[s.series], s.series in chosen
            dot = _dot(look) if named else OTHER_DOT
            one.plot(s.attainment.mean, y, "o", zorder=4 if named else 3, **dot)
        if ours is not None and rival is not None:
            ends = (rival.attainment.mean, ours.attainment.mean)
            one.hlines(y, min(ends), max(ends), color=looks[baseline].colour, lw=3, alpha=0.35)
        if cell.bound is not None:
            one.plot(cell.bound.mean, y, "|", color=THEME["bound"][0], ms=13, mew=1.8, zorder=5)
    one.set_yticks(range(len(cells)), [cell_title(c.cell, names) for c in cells])
    one.set_ylim(len(cells) - 0.4, -0.6)
    one.grid(True, axis="x")
    one.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    one.set_xlabel("Requests on time")
    _overview_legend(figure, chosen, looks, any(c.bound is not None for c in cells))
    return figure


def latency_cdfs(
    classes: Mapping[str, Sequence[ClassStanding]],
    chosen: Sequence[str],
    looks: Mapping[str, Look],
) -> Figure:
    """Share of all requests of a class that have finished within a latency; log time."""
    columns = _columns(len(classes))
    figure, axes = facets(len(classes), columns, 3.1)
    for place, ((name, standings), one) in enumerate(zip(classes.items(), axes, strict=True)):
        drawn = [s for s in standings if s.series in chosen and s.latency_s]
        for standing in sorted(drawn, key=lambda s: looks[s.series].prominent):
            look, n = looks[standing.series], standing.requests
            ranks = _ranks(len(standing.latency_s))
            xs = [standing.latency_s[i - 1] for i in ranks]
            one.step(xs, [i / n for i in ranks], where="post", color=look.colour, **_line(look))
        slo_s = next((s.slo_s for s in drawn if s.slo_s), None)
        if slo_s is not None:
            one.axvline(slo_s, color=THEME["soft"][0], lw=0.9, ls=(0.0, (4, 3)))
            one.annotate(
                f"SLO {slo_s:g} s",
                (slo_s, 0.03 if _early(drawn, slo_s) else 0.93),
                xytext=(3, 0),
                textcoords="offset points",
                color=THEME["soft"][0],
                fontsize=8,
            )
        one.set_xscale("log")
        one.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        one.xaxis.set_minor_formatter(FuncFormatter(_minor))
        one.tick_params(axis="x", which="minor", labelsize=7.5, length=2)
        one.set_ylim(0, 1.01)
        one.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        one.set_xlabel("Latency (s)")
        if place % columns == 0:
            one.set_ylabel("Finished, of all requests")
        one.set_title(class_title(name))
    _legend(figure, chosen, looks)
    return figure


def class_bars(
    classes: Mapping[str, Sequence[ClassStanding]],
    chosen: Sequence[str],
    looks: Mapping[str, Look],
) -> Figure:
    """Attainment of each class under the chosen policies: who starves whom."""
    figure, axes = facets(
        len(classes), _columns(len(classes)), 0.9 + 0.27 * len(chosen), (True, False)
    )
    for (name, standings), one in zip(classes.items(), axes, strict=True):
        by_series = {s.series: s for s in standings}
        shown = [s for s in reversed(chosen) if s in by_series]
        for y, series in enumerate(shown):
            mean, look = by_series[series].attainment, looks[series]
            alpha = 1.0 if look.prominent else 0.72
            one.barh(y, mean.mean, height=0.66, color=look.colour, alpha=alpha)
            if mean.half is not None:
                high = min(1.0, mean.high)
                one.hlines(y, max(0.0, mean.low), high, color=THEME["ink"][0], lw=1)
            one.text(1.04, y, f"{mean.mean * 100:.0f} %", va="center", ha="left", fontsize=8.5)
        _named_rows(one, shown, looks)
        one.set_xlim(0, 1.03)
        one.grid(True, axis="x")
        one.grid(False, axis="y")
        one.xaxis.set_major_locator(MultipleLocator(0.25))
        one.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        one.set_xlabel("On time")
        one.set_title(class_title(name))
    return figure


def class_title(name: str) -> str:
    """`model 512x512x1` as people write it."""
    model, _, shape = name.rpartition(" ")
    sides = shape.split("x")
    if len(sides) != 3 or not all(s.isdigit() for s in sides):
        return name
    text = f"{model} {sides[0]}×{sides[1]}"
    return text if sides[2] == "1" else f"{text}, {sides[2]} frames"


def _curves(one: Axes, sweep: Sweep, looks: Mapping[str, Look], height_in: float) -> None:
    ends: list[tuple[str, float, float, str, bool]] = []
    ranked = sorted(sweep.curves, key=lambda s: -sum(_means(sweep.curves[s]).values()))
    banded = {s for s in looks if looks[s].prominent} | set(ranked[:BANDS])
    for series in reversed(ranked):
        look, curve = looks[series], sweep.curves[series]
        xs = sorted(curve)
        intervals = [mean_interval(list(curve[x].values())) for x in xs]
        means = [i.mean for i in intervals]
        style = _line(look)
        one.plot(xs, means, color=look.colour, **style)
        one.plot(
            xs, means, "o", color=look.colour, ms=style["lw"] * 2 + 0.5, zorder=style["zorder"]
        )
        if series in banded:
            lows, highs = [i.low for i in intervals], [min(1.0, i.high) for i in intervals]
            alpha = 0.2 if look.prominent else 0.13
            one.fill_between(xs, lows, highs, color=look.colour, alpha=alpha, lw=0)
        ends.append((series, xs[-1], means[-1], look.colour, look.prominent))
    if sweep.bound:
        bound = _means(sweep.bound)
        xs = sorted(bound)
        colour = THEME["bound"][0]
        one.plot(xs, [bound[x] for x in xs], color=colour, lw=1.3, ls=(0.0, (4, 3)))
        ends.append(("bound", xs[-1], bound[xs[-1]], colour, False))
    first, last = sweep.xs[0], sweep.xs[-1]
    one.set_xlim(first - 0.02 * (last - first), last + 0.05 * (last - first))
    end_labels(one, ends, height_in)


def _means(curve: Mapping[float, Mapping[int, float]]) -> dict[float, float]:
    return {x: sum(s.values()) / len(s) for x, s in curve.items()}


def _dot(look: Look) -> dict[str, Any]:
    """Hollow for the second member of a family."""
    hollow = look.dash != SOLID and not look.prominent
    face = THEME["paper"][0] if hollow else look.colour
    return {"color": look.colour, "mfc": face, "ms": 9.5 if look.prominent else 5.5, "mew": 1.4}


def _columns(classes: int) -> int:
    return 2 if classes in (2, 4) else 3


def _ranks(count: int) -> list[int]:
    """Ranks from 1 to `count`, thinned to what a picture can show."""
    stride = max(1, count // CDF_POINTS)
    ranks = list(range(1, count + 1, stride))
    return ranks if ranks[-1] == count else [*ranks, count]


def _early(drawn: Sequence[ClassStanding], at_s: float) -> bool:
    """Whether most requests finish before: then the room under the curves is free."""
    return 2 * sum(x <= at_s for s in drawn for x in s.latency_s) > sum(s.requests for s in drawn)


def _line(look: Look) -> dict[str, Any]:
    wide = look.prominent
    return {
        "lw": 2.6 if wide else 1.4,
        "zorder": 5.0 if wide else 2.5,
        "ls": SOLID if wide else look.dash,
    }


def _legend(figure: Figure, chosen: Sequence[str], looks: Mapping[str, Look]) -> None:
    handles = [Line2D([], [], color=looks[s].colour, label=s, **_line(looks[s])) for s in chosen]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(6, len(handles)),
        frameon=False,
        fontsize=9,
        handlelength=2.4,
    )


def _overview_legend(
    figure: Figure, chosen: Sequence[str], looks: Mapping[str, Look], bounded: bool
) -> None:
    handles = [Line2D([], [], marker="o", ls="", label=s, **_dot(looks[s])) for s in chosen]
    handles.append(Line2D([], [], marker="o", ls="", label="other policies", **OTHER_DOT))
    if bounded:
        tick: dict[str, Any] = {"color": THEME["bound"][0], "ms": 13.0, "mew": 1.8}
        handles.append(Line2D([], [], marker="|", ls="", label="bound", **tick))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
    )


def _named_rows(one: Axes, names: Sequence[str], looks: Mapping[str, Look]) -> None:
    one.set_yticks(range(len(names)), list(names))
    one.set_ylim(-0.6, len(names) - 0.4)
    for tick, name in zip(one.get_yticklabels(), names, strict=True):
        tick.set_color(looks[name].colour)
        tick.set_fontweight("bold" if looks[name].prominent else "normal")


def _minor(x: float, _: int) -> str:
    """Labels 2 and 5 of a decade only."""
    lead = f"{x:e}"[0]
    return f"{x:g}" if lead in "25" and f"{x:e}"[2:].startswith("000") else ""
