"""The page over a folder of experiments: a line each, with its curves."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from . import page
from .experiment_report import ExperimentFindings, headline, mean_lead, share
from .statistics import PolicyVerdict
from .tables import ReportTable, TableField, markdown, percent

TITLE = "Scheduling benchmarks"


def write_index(folder: Path, every: Sequence[ExperimentFindings]) -> tuple[Path, ...]:
    """README.md and report.html over reports that lie in subfolders."""
    readme, web = folder / "README.md", folder / "report.html"
    table = _table(every)
    parts = [f"# {TITLE}\n", markdown(table)]
    body = [page.heading(1, TITLE), page.tabled(table)]
    for f in every:
        at = f.experiment.folder.relative_to(folder).as_posix()
        said = "; ".join(f"{number} {what}" for number, what in headline(f))
        parts.append(f"## [{f.experiment.title}]({at}/README.md)\n\n{said}\n")
        parts.append(f"![{f.experiment.title}]({at}/curves.png)\n")
        link = html.escape(f"{at}/report.html")
        title = html.escape(f.experiment.title, quote=False)
        body.append(f'<h2><a href="{link}">{title}</a></h2>')
        body.append(page.tiles(headline(f)))
    readme.write_text("\n".join(parts))
    web.write_text(page.page(TITLE, body))
    return (readme, web)


def _table(every: Sequence[ExperimentFindings]) -> ReportTable:
    columns = ["experiment|", "cells", "seeds", "on time (%)", "lead over best rival (points)"]
    columns += ["ahead", "level", "behind", "gap to bound (points)"]
    rows = []
    for f in every:
        lead, kinds = mean_lead(f), f.verdicts
        behind = sum(v is PolicyVerdict.BEHIND for v in kinds)
        rows.append(
            (
                TableField(f.experiment.title),
                TableField(str(len(f.cells))),
                TableField(str(len(f.experiment.seeds))),
                TableField("–" if f.attainment is None else share(f.attainment)),
                TableField("–" if lead is None else percent(lead, signed=True)),
                TableField(str(sum(v is PolicyVerdict.AHEAD for v in kinds))),
                TableField(str(sum(v is PolicyVerdict.LEVEL for v in kinds))),
                TableField(str(behind), "bad" if behind else ""),
                TableField("–" if f.gap is None else share(f.gap)),
            )
        )
    return ReportTable(tuple(columns), tuple(rows))
