"""`python -m bench report` and `python -m bench timeline`: runs and schedule logs made readable.

Both need the `bench` extra (matplotlib); it is loaded when one of them is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.sim.trace import TraceError, read_trace
from control.scheduler.schedule_log import LogError, read_log

RUNS = "runs.jsonl"


def report(folder: Path, baseline: str = "hocket") -> tuple[Path, ...]:
    """Writes the report of a folder with runs, or of each of its subfolders and an index over them.

    Returns: what was written. Raises: ReportError.
    """
    from bench.reporting import experiment_report, index_report, rows  # noqa: PLC0415  see above

    if (folder / RUNS).exists():
        return experiment_report.write(
            experiment_report.find(rows.read_experiment(folder, baseline))
        )
    below = sorted(p.parent for p in folder.glob(f"*/{RUNS}"))
    if not below:
        raise rows.ReportError(f"neither {folder} nor a folder in it has {RUNS}")
    every: list[experiment_report.ExperimentFindings] = []
    written: list[Path] = []
    for one in below:
        findings = experiment_report.find(rows.read_experiment(one, baseline))
        written += experiment_report.write(findings)
        every.append(findings)
    return (*index_report.write_index(folder, every), *written)


def report_command(
    folder: Annotated[
        Path, typer.Argument(help="Folder with runs.jsonl, or a folder of such folders.")
    ],
    baseline: Annotated[
        str, typer.Option(help="Label or policy that the others are compared with.")
    ] = "hocket",
) -> None:
    """Tables, charts and verdicts of benchmark runs, written beside them."""
    from bench.reporting.rows import ReportError  # noqa: PLC0415  see above

    console = Console()
    try:
        written = report(folder, baseline)
    except ReportError as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)


def timeline_command(
    log: Annotated[Path, typer.Argument(help="Schedule log (JSONL).")],
    out: Annotated[Path, typer.Option(help="Folder for timeline.json, .png and .html.")],
    trace: Annotated[
        Path | None, typer.Option(help="Its trace: adds sizes, arrivals and missed deadlines.")
    ] = None,
    from_s: Annotated[float, typer.Option(help="Start of the window, seconds.", min=0)] = 0.0,
    until_s: Annotated[
        float | None, typer.Option(help="End of the window; default: what pictures can show.")
    ] = None,
) -> None:
    """Which GPU ran what and when: a Chrome trace, a picture and a page."""
    from bench.reporting.timeline import timeline_of  # noqa: PLC0415  see above
    from bench.reporting.timeline_chart import write_timeline  # noqa: PLC0415

    console = Console()
    if until_s is not None and until_s <= from_s:
        raise typer.BadParameter("--until-s must come after --from-s")
    try:
        requests = read_trace(trace.read_text()) if trace is not None else ()
        lines = read_log(log.read_text())
    except (LogError, TraceError, OSError) as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    for path in write_timeline(timeline_of(lines, requests), out, from_s, until_s):
        console.print(f"wrote {path}", soft_wrap=True)
