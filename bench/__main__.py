"""`python -m bench`: benchmarks, replay, simulator, reports."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from bench import mesh_bench, profile_bench
from bench.bound import bound_command
from bench.replay import JournalIncomplete, entries_from_broker, load, replay, save
from bench.report import report_command, timeline_command
from bench.sim_command import sim_command, solver_command, trace_command
from bench.soak_command import soak_command
from hocket.errors import HocketError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(width=None if sys.stdout.isatty() else 150)


@app.command()
def mesh(
    pairs: Annotated[int, typer.Option(help="Requests compared with the plain loop.")] = 12,
    admissions: Annotated[int, typer.Option(help="Calls timed until accepted.")] = 200,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "bench/results/mesh.json"
    ),
) -> None:
    """The mesh against the plain diffusers loop, groups, transfers, admission."""
    # No spinner: what it costs would be measured too.
    console.print("measuring for about a minute: pairs of requests, admissions, groups of 2 and 4")
    found = asyncio.run(mesh_bench.measure(pairs, admissions))
    mesh_bench.write(found, out, f"python -m bench mesh --pairs {pairs} --admissions {admissions}")
    table = Table(
        Column("figure", no_wrap=True), "unit", "n", "p50", "p99", "min", "max", "aim", "verdict"
    )
    for figure in found.figures:
        table.add_row(*(str(cell) for cell in figure.row().values()))
    console.print(table)
    console.print(f"written to {out}")


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="CSV to write.")] = Path(
        "control/assets/profiles/hocket-emoji_cpu.csv"
    ),
    repeats: Annotated[int, typer.Option(help="Requests a cell.")] = 3,
    busy: Annotated[int, typer.Option(help="Workers that compute at once.")] = 2,
    model: Annotated[
        list[str] | None, typer.Option(help="Folder; repeatable. None: the embedded models.")
    ] = None,
) -> None:
    """Measures step times of the embedded models through the mesh, as a profile."""
    models = tuple(model or ())
    out.write_text(asyncio.run(profile_bench.measure(repeats, busy, models, console)))
    console.print(f"written to {out}")


@app.command("replay")
def replay_command(
    nats_url: Annotated[str, typer.Option(help="Broker that holds the journal.")] = "",
    journal: Annotated[Path | None, typer.Option(help="Saved journal instead.")] = None,
    cluster: Annotated[str, typer.Option(help="Name of the cluster.")] = "local",
    term: Annotated[int | None, typer.Option(help="Term to replay; default: the newest.")] = None,
    save_to: Annotated[Path | None, typer.Option("--save", help="Save the journal here.")] = None,
    schedule_log: Annotated[Path | None, typer.Option(help="Write the schedule log.")] = None,
) -> None:
    """Replays a live journal and compares plan digests; exits 1 where they differ."""
    if not nats_url and journal is None:
        raise typer.BadParameter("name a broker (--nats-url) or a saved journal (--journal)")
    try:
        entries = load(journal) if journal else asyncio.run(entries_from_broker(nats_url, cluster))
        found = replay(entries, term)
    except (JournalIncomplete, HocketError, OSError) as error:
        console.print(f"[red]{error}")
        raise typer.Exit(2) from error
    if save_to is not None:
        save(entries, save_to)
    if schedule_log is not None and found.log is not None:
        schedule_log.write_text(found.log.text())
    console.print(
        f"term {found.term}: {found.facts} facts, {found.plans} plans, "
        f"{len(found.differing)} with another digest"
    )
    if not found.agrees:
        raise typer.Exit(1)


app.command("sim")(sim_command)
app.command("solver")(solver_command)
app.command("trace")(trace_command)
app.command("soak")(soak_command)
app.command("report")(report_command)
app.command("timeline")(timeline_command)
app.command("bound")(bound_command)


if __name__ == "__main__":
    app()
