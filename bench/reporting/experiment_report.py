"""Writes the report of one folder: README.md with a picture (curves.png), report.html with all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from . import page
from .analysis import (
    TARGET,
    Carried,
    CellStanding,
    ClassStanding,
    PaperComparison,
    Sweep,
    carried,
    chosen_series,
    class_standings,
    compared,
    standings,
    sweeps,
    telling_cell,
    varying,
)
from .charts import class_bars, curves, dots, latency_cdfs, overview
from .drawing import as_svg, house_style, write_png
from .rows import RecordedExperiment
from .statistics import Interval, PolicyVerdict, mean_interval
from .style import Look, cell_title, in_sentence, looks
from .tables import (
    ReportTable,
    cell_table,
    class_table,
    markdown,
    overview_table,
    paper_table,
    percent,
    sweep_table,
)

PICTURE = "curves"  # of README.md
CLOSE_UPS = ("classes", "cdf")
OPEN_CELLS = 3  # cells whose table is unfolded in HTML
INTERVALS = (
    "± is a 95 % interval of the mean (Student's t over seeds). All policies ran the same traces: "
    "leads and gaps are paired by seed. A verdict is ahead or behind where the interval of the "
    "lead leaves out zero; intervals are not widened for the number of comparisons."
)


@dataclass(frozen=True)
class ExperimentFindings:
    """Everything a report of an experiment shows."""

    experiment: RecordedExperiment
    cells: tuple[CellStanding, ...]
    names: tuple[str, ...]  # of the cell's values that vary
    telling: CellStanding
    classes: dict[str, tuple[ClassStanding, ...]]  # of the telling cell
    chosen: tuple[str, ...]  # series of the close-ups
    sweeps: dict[str, tuple[Sweep, ...]]  # by swept name, the longest first
    carried: tuple[tuple[Sweep, tuple[Carried, ...]], ...]
    paper: tuple[PaperComparison, ...]
    looks: dict[str, Look]

    @property
    def verdicts(self) -> list[PolicyVerdict]:
        """Of the baseline over the best rival, a cell each."""
        rivals = [c.best_rival for c in self.cells]
        return [r.verdict for r in rivals if r is not None and r.verdict is not None]

    @property
    def attainment(self) -> float | None:
        ours = [s.attainment.mean for c in self.cells if (s := c.of(self.experiment.baseline))]
        return sum(ours) / len(ours) if ours else None

    @property
    def gap(self) -> float | None:
        """Mean gap to the bound over the cells that have one."""
        ours = [c.of(self.experiment.baseline) for c in self.cells]
        gaps = [s.gap.mean for s in ours if s is not None and s.gap is not None]
        return sum(gaps) / len(gaps) if gaps else None


def find(e: RecordedExperiment) -> ExperimentFindings:
    """Works out what a report shows."""
    cells = standings(e)
    telling = telling_cell(cells, e.baseline)
    swept: dict[str, list[Sweep]] = {}
    for sweep in sweeps(e):
        swept.setdefault(sweep.name, []).append(sweep)
    longest = sorted(swept, key=lambda n: -max(len(s.xs) for s in swept[n]))
    loads = [s for n in longest for s in swept[n] if s.is_load]
    return ExperimentFindings(
        experiment=e,
        cells=cells,
        names=varying(e),
        telling=telling,
        classes=class_standings(e, telling.cell),
        chosen=chosen_series(e, cells),
        sweeps={n: tuple(swept[n]) for n in longest},
        carried=tuple((s, carried(e, s)) for s in loads),
        paper=compared(e),
        looks=looks(e.series, e.policies, e.baseline),
    )


def write(findings: ExperimentFindings) -> tuple[Path, ...]:
    """Writes all files into the experiment's folder; returns what was written."""
    folder = findings.experiment.folder
    with house_style():
        figures = _figures(findings)
    written = []
    if PICTURE in figures:
        write_png(figures[PICTURE][0], folder / f"{PICTURE}.png")
        written.append(folder / f"{PICTURE}.png")
    readme, web = folder / "README.md", folder / "report.html"
    readme.write_text(_readme(findings, figures))
    web.write_text(_html(findings, figures))
    return (readme, web, *written)


def headline(f: ExperimentFindings) -> tuple[tuple[str, str], ...]:
    """The report in a few numbers: (number, what it is)."""
    baseline = f.experiment.baseline
    found: list[tuple[str, str]] = []
    if f.attainment is not None:
        found.append((f"{f.attainment * 100:.1f} %", f"{baseline}'s requests on time, mean"))
    verdicts = f.verdicts
    if verdicts:
        counts = [
            sum(v is kind for v in verdicts) for kind in (PolicyVerdict.AHEAD, PolicyVerdict.LEVEL)
        ]
        behind = sum(v is PolicyVerdict.BEHIND for v in verdicts)
        what = f"cells ahead of / level with / behind the best rival, of {len(verdicts)}"
        found.append((f"{counts[0]} / {counts[1]} / {behind}", what))
    if f.gap is not None:
        found.append((f"{f.gap * 100:.1f}", "points under the clairvoyant bound, mean"))
    for sweep, policies in f.carried[:1]:
        rivals = [c for c in policies if c.series in f.experiment.rivals and c.ratio is not None]
        best = min(rivals, key=lambda c: c.ratio.value if c.ratio else 0.0, default=None)
        if best is not None and best.ratio is not None:
            what = f"{in_sentence(sweep.name)} at {TARGET:.0%} on time, over {best.series}"
            found.append((f"{best.ratio.edge}{best.ratio.value:.2f} ×", what))
    return tuple(found)


def _figures(f: ExperimentFindings) -> dict[str, tuple[Figure, str]]:
    """By file name: the figure and its caption. `curves` and `cdf` are always there."""
    found: dict[str, tuple[Figure, str]] = {}
    bound = " Dashed: the clairvoyant bound." if any(c.bound for c in f.cells) else ""
    for place, (name, swept) in enumerate(f.sweeps.items()):
        caption = (
            f"Requests on time over {in_sentence(name)}; bands are 95 % intervals, for "
            f"{f.experiment.baseline} and the best policies.{bound}"
        )
        key = f"curves-{name}" if place else "curves"
        found[key] = (curves(swept, f.looks, f.names), caption)
    if len(f.cells) > 1:
        caption = (
            f"Every cell: each dot a policy's requests on time, the bar {f.experiment.baseline} "
            f"against its best rival{', the tick the clairvoyant bound' if bound else ''}."
        )
        base = f.experiment.baseline
        found["cells"] = (overview(f.cells, base, f.chosen, f.looks, f.names), caption)
    if "curves" not in found:
        caption = f"Requests on time, mean and 95 % interval, best on top.{bound}"
        found["curves"] = (dots(f.cells, f.looks, f.names), caption)
    where = cell_title(f.telling.cell)
    if f.classes:
        caption = f"Latency by class, all seeds pooled ({where}). What never finishes stays below."
        found["cdf"] = (latency_cdfs(f.classes, f.chosen, f.looks), caption)
        caption = f"Requests on time by class ({where}); lines are 95 % intervals."
        found["classes"] = (class_bars(f.classes, f.chosen, f.looks), caption)
    return found


def _sections(f: ExperimentFindings) -> list[tuple[str, str, list[ReportTable]]]:
    """Tables after the first figure: (title, note, tables)."""
    baseline = f.experiment.baseline
    found = [
        (
            f"{baseline} and the best rival of each cell",
            INTERVALS,
            [overview_table(f.cells, baseline, f.names)],
        )
    ]
    if f.paper:
        note = "The published number beside ours; the cell is ours, where several match."
        found.append(("The paper's numbers and ours", note, [paper_table(f.paper, f.names)]))
    if f.carried:
        note = (
            f"Highest load up to which {TARGET:.0%} of the requests are on time, interpolated. "
            "≥: over the whole sweep; <: nowhere in it. Ratios with a paired bootstrap interval; "
            "empty where neither load is known."
        )
        tables = [sweep_table(s, c, baseline, f.names) for s, c in f.carried]
        found.append((f"Load carried at {TARGET:.0%}", note, tables))
    return found


def _facts(e: RecordedExperiment) -> str:
    seeds = list(e.seeds)
    whole = seeds == list(range(seeds[0], seeds[-1] + 1)) and len(seeds) > 1
    named = f"{seeds[0]}–{seeds[-1]}" if whole else ", ".join(map(str, seeds))
    gpus = "/".join(map(str, sorted({r.gpus for r in e.rows})))
    above = sum(r.bound is not None and r.summary.attainment > r.bound + 1e-9 for r in e.rows)
    doubt = f" {above} runs exceed their bound: one of the two is wrong." if above else ""
    return (
        f"{len(e.rows)} runs: {len(e.series)} policies, {len(e.cells)} cells, "
        f"{'seeds' if len(seeds) > 1 else 'seed'} {named}, {gpus} GPUs.{doubt}"
    )


def _readme(f: ExperimentFindings, figures: Mapping[str, tuple[Figure, str]]) -> str:
    e = f.experiment
    parts = [f"# {e.title}", _facts(e)]
    if e.description:
        parts.append(e.description.strip())
    parts += [f"- **{number}** {what}" for number, what in headline(f)]
    if e.command:
        parts.append(f"```text\n{e.command}\n```")
    if PICTURE in figures:
        caption = figures[PICTURE][1]
        parts.append(f"![{caption}]({PICTURE}.png)\n\n{caption}")
    for title, note, tables in _sections(f):
        parts.append(f"## {title}\n\n{note}")
        parts += [markdown(t) for t in tables]
    if f.classes:
        where = cell_title(f.telling.cell)
        parts.append(f"## By class ({where})\n\n{markdown(class_table(f.classes, e.baseline))}")
    parts.append("## Every cell")
    for cell in f.cells:
        title = cell_title(cell.cell)
        table = markdown(cell_table(cell, e.baseline))
        parts.append(f"<details><summary>{title}</summary>\n\n{table}\n</details>")
    parts.append("`report.html`, written beside this, has the same with all charts.")
    return _joined(parts)


def _html(f: ExperimentFindings, figures: Mapping[str, tuple[Figure, str]]) -> str:
    e = f.experiment
    body = [page.heading(1, e.title), page.paragraph(_facts(e), "lead")]
    body += [page.paragraph(e.description.strip())] if e.description else []
    body.append(page.tiles(headline(f)))
    svgs = {k: page.drawn(as_svg(fig, k), text) for k, (fig, text) in figures.items()}
    body += [svg for name, svg in svgs.items() if name not in CLOSE_UPS]
    for title, note, tables in _sections(f):
        body += [page.heading(2, title), page.paragraph(note, "note")]
        body += [page.tabled(t) for t in tables]
    if f.classes:
        body.append(page.heading(2, f"Classes: {cell_title(f.telling.cell)}"))
        body += [svgs["classes"], svgs["cdf"]]
        body.append(page.tabled(class_table(f.classes, e.baseline)))
    body.append(page.heading(2, "Every cell"))
    for place, cell in enumerate(f.cells):
        table = page.tabled(cell_table(cell, e.baseline))
        body.append(page.folded(cell_title(cell.cell), table, place < OPEN_CELLS))
    if e.command:
        body += [page.heading(2, "How to run it again"), page.code(e.command)]
    return page.page(e.title, body)


def _joined(parts: Sequence[str]) -> str:
    """Paragraphs, list items kept together."""
    text = ""
    for before, part in zip(("", *parts), parts, strict=False):
        listed = before.startswith("- ") and part.startswith("- ")
        text += ("\n" if listed else "\n\n") + part.strip("\n")
    return text.strip() + "\n"


def share(value: float) -> str:
    """A share as percent, for the index."""
    return percent(Interval(value, None, 1))


def mean_lead(f: ExperimentFindings) -> Interval | None:
    """Mean lead over the best rival, over the cells."""
    leads = [c.best_rival.difference for c in f.cells if c.best_rival is not None]
    means = [x.mean for x in leads if x is not None]
    return Interval(mean_interval(means).mean, None, len(means)) if means else None
