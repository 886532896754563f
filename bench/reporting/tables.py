"""The tables of a report, as entries that Markdown and HTML both print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from control.scheduler.summary import percentile

from .analysis import Carried, CellStanding, ClassStanding, PaperComparison, PolicyStanding, Sweep
from .charts import class_title
from .statistics import Interval, PolicyVerdict, Ratio, Sustained
from .style import axis_title, cell_title

SIGNS = {
    PolicyVerdict.AHEAD: ("▲ ahead", "good"),
    PolicyVerdict.LEVEL: ("= level", ""),
    PolicyVerdict.BEHIND: ("▼ behind", "bad"),
    PolicyVerdict.UNKNOWN: ("one seed", ""),
}
METRICS = {
    "attainment": "attainment",
    "p50": "p50 latency (s)",
    "p90": "p90 latency (s)",
    "p99": "p99 latency (s)",
    "mean": "mean latency (s)",
}
SHARES = ("attainment", "utilisation")


class TableField(NamedTuple):
    """One field of a table; `tone` is "good", "bad" or nothing."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class ReportTable:
    """Columns whose name ends in a bar "|" hold words (left aligned); all others hold numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[TableField, ...], ...]
    strong: frozenset[int] = frozenset()  # rows that stand out

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(c.rstrip("|") for c in self.columns)

    @property
    def words(self) -> tuple[bool, ...]:
        return tuple(c.endswith("|") for c in self.columns)


def percent(interval: Interval, signed: bool = False) -> str:
    """`92.2 ± 0.8`, in percent or points."""
    mean = f"{interval.mean * 100:{'+' if signed else ''}.1f}"
    return mean if interval.half is None else f"{mean} ± {interval.half * 100:.1f}"


def plain(interval: Interval, signed: bool = False) -> str:
    """`12.3 ± 0.4`, with at most three significant digits and two decimals."""
    digits = max(0, 2 - math.floor(math.log10(abs(interval.mean)))) if interval.mean else 0
    digits = min(digits, 2)
    mean = f"{interval.mean:{'+' if signed else ''}.{digits}f}"
    return mean if interval.half is None else f"{mean} ± {interval.half:.{digits}f}"


def cell_table(cell: CellStanding, baseline: str) -> ReportTable:
    """All policies of one cell, best first."""
    ranked = sorted(cell.standings, key=lambda s: -s.attainment.mean)
    bounded = cell.bound is not None
    columns = ["policy|", "on time (%)", "p50 (s)", "p99 (s)", "preemptions", "degree changes"]
    columns += ["rejected", "utilisation (%)", f"{baseline} leads by (points)", f"{baseline} is|"]
    columns += ["gap to bound (points)"] if bounded else []
    rows = [_standing_row(s, bounded) for s in ranked]
    strong = {i for i, s in enumerate(ranked) if s.series == baseline}
    if cell.bound is not None:
        blank = [TableField("")] * (len(columns) - 2)
        rows.insert(0, (TableField("bound"), TableField(percent(cell.bound)), *blank))
        strong = {i + 1 for i in strong}
    return ReportTable(tuple(columns), tuple(rows), frozenset(strong))


def overview_table(
    cells: Sequence[CellStanding], baseline: str, names: tuple[str, ...]
) -> ReportTable:
    """A line a cell: the baseline, its best rival, what lies between them, the bound."""
    bounded = any(c.bound is not None for c in cells)
    columns = ["cell|", f"{baseline} (%)", "best rival|", "rival (%)", "lead (points)", "verdict|"]
    columns += ["bound (%)", "gap to bound (points)"] if bounded else []
    rows = []
    for cell in cells:
        ours, rival = cell.of(baseline), cell.best_rival
        row = [TableField(cell_title(cell.cell, names))]
        row.append(TableField(percent(ours.attainment) if ours else "–"))
        row.append(TableField(rival.series if rival else "–"))
        row.append(TableField(percent(rival.attainment) if rival else "–"))
        difference = rival.difference if rival else None
        row.append(TableField(percent(difference, signed=True) if difference else "–"))
        row.append(_verdict(rival))
        if bounded:
            row.append(TableField(percent(cell.bound) if cell.bound else "–"))
            row.append(TableField(percent(ours.gap) if ours and ours.gap else "–"))
        rows.append(tuple(row))
    return ReportTable(tuple(columns), tuple(rows))


def class_table(classes: Mapping[str, Sequence[ClassStanding]], baseline: str) -> ReportTable:
    """Attainment and p99 of each class: a row a policy."""
    names = list(classes)
    columns = ["policy|"]
    for name in names:
        columns += [f"{class_title(name)}: on time (%)", "p99 (s)"]
    series = dict.fromkeys(s.series for standings in classes.values() for s in standings)
    rows = []
    for one in series:
        row = [TableField(one)]
        for name in names:
            found = next((s for s in classes[name] if s.series == one), None)
            row.append(TableField(percent(found.attainment) if found else "–"))
            latency_s = found.latency_s if found else ()
            row.append(TableField(f"{percentile(latency_s, 99):.1f}" if latency_s else "–"))
        rows.append(tuple(row))
    strong = frozenset(i for i, one in enumerate(series) if one == baseline)
    return ReportTable(tuple(columns), tuple(rows), strong)


def sweep_table(
    sweep: Sweep, found: Sequence[Carried], baseline: str, names: tuple[str, ...]
) -> ReportTable:
    """The load that each policy sustains, and how much more the baseline does."""
    what = axis_title(sweep.name)
    where = cell_title(sweep.rest, names) if set(dict(sweep.rest)) & set(names) else ""
    first = f"policy ({where})|" if where else "policy|"
    order = sorted(found, key=lambda c: (c.load.edge != "≥", -c.load.value))
    rows = [
        (TableField(c.series), TableField(_sustained(c.load)), TableField(_ratio(c.ratio)))
        for c in order
    ]
    strong = frozenset(i for i, c in enumerate(order) if c.series == baseline)
    return ReportTable((first, what, f"{baseline} over it (×)"), tuple(rows), strong)


def paper_table(found: Sequence[PaperComparison], names: tuple[str, ...]) -> ReportTable:
    """Published numbers beside ours."""
    columns = ("policy|", "cell|", "metric|", "paper", "ours", "difference", "source and remark|")
    rows = []
    for one in found:
        paper = one.paper
        cell = cell_title(one.cell if one.cell is not None else tuple(paper.cell.items()), names)
        share = paper.metric in SHARES or paper.metric.startswith("class:")
        share = share and not paper.over
        metric = METRICS.get(paper.metric, paper.metric.removeprefix("class:").replace("_", " "))
        if share:
            metric += " (%)"
        if paper.over:
            metric += f", ratio to {paper.over}'s"
        remark = ". ".join(t.rstrip(".") for t in (paper.source, paper.remark) if t)
        theirs = f"{paper.value * 100:.1f}" if share else f"{paper.value:g}"
        ours, away = "not run", "–"
        if one.ours is not None:
            lead = one.ours.mean - paper.value
            ours = percent(one.ours) if share else plain(one.ours)
            away = f"{lead * 100:+.1f}" if share else plain(Interval(lead, None, 1), signed=True)
        fields = (paper.policy, cell, metric, theirs, ours, away, remark)
        rows.append(tuple(TableField(f) for f in fields))
    return ReportTable(columns, tuple(rows))


def markdown(table: ReportTable) -> str:
    """A GitHub table."""

    def line(fields: Sequence[str]) -> str:
        return "| " + " | ".join(f.replace("|", "\\|") for f in fields) + " |"

    rules = [":---" if w else "---:" for w in table.words]
    lines = [line(table.heads), line(rules)]
    for place, row in enumerate(table.rows):
        bold = place in table.strong
        lines.append(line([f"**{e.text}**" if bold and e.text else e.text for e in row]))
    return "\n".join(lines) + "\n"


def _standing_row(s: PolicyStanding, bounded: bool) -> tuple[TableField, ...]:
    row = [
        TableField(s.series),
        TableField(percent(s.attainment)),
        TableField(plain(s.p50_s)),
        TableField(plain(s.p99_s)),
        TableField(f"{s.preemptions:.0f}"),
        TableField(f"{s.degree_changes:.0f}"),
        TableField(f"{s.rejected:.0f}"),
        TableField(f"{s.utilisation * 100:.0f}"),
        TableField(percent(s.difference, signed=True) if s.difference else ""),
        _verdict(s),
    ]
    if bounded:
        row.append(TableField(percent(s.gap) if s.gap else "–"))
    return tuple(row)


def _verdict(standing: PolicyStanding | None) -> TableField:
    if standing is None or standing.verdict is None:
        return TableField("")
    return TableField(*SIGNS[standing.verdict])


def _sustained(load: Sustained) -> str:
    return f"{load.edge} {load.value:.3g}".strip()


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio.edge} {ratio.value:.2f}".strip()
    return text if math.isnan(ratio.low) else f"{text} ({ratio.low:.2f} … {ratio.high:.2f})"
