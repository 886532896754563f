"""`python -m bench`: benchmarks, replay, simulator, reports."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from bench.admission.command import admission_command
from bench.bound import bound_command
from bench.chaos.command import chaos_command
from bench.chaos.losses import losses_command
from bench.chaos.three_hosts import hosts_command
from bench.digests import digests_command
from bench.gpu.command import gpu_command
from bench.latency.command import latency_command
from bench.live.command import live_command
from bench.mesh import change_cost, parking_cost, request_cost
from bench.pools.command import pools_command
from bench.replay import JournalIncomplete, entries_from_broker, load, replay, save
from bench.report import report_command, timeline_command
from bench.shell.command import shell_command
from bench.sim_command import sim_command, solver_command, trace_command
from bench.soak_command import soak_command
from hocket.errors import HocketError

app = typer.Typer(
    help="Benchmarks, simulator, replay and reports of Hocket.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 150)


@app.command()
def mesh(
    rounds: Annotated[int, typer.Option(help="Starts of mesh and plain loop.", min=1)] = 3,
    pairs: Annotated[
        int, typer.Option(help="Requests of each size in a round, at least.", min=1)
    ] = 4,
    seconds: Annotated[float, typer.Option(help="Time for each size; 60 pairs at most.")] = 10.0,
    admissions: Annotated[int, typer.Option(help="Calls timed until accepted.")] = 200,
    policy: Annotated[str, typer.Option(help="Planning policy.")] = "hocket",
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "bench/results/mesh.json"
    ),
) -> None:
    """Measures the mesh against the plain diffusers loop, and groups, transfers, admission."""
    # No spinner: what it costs would be measured too.
    console.print(f"measuring for about {2 * rounds + 1} minutes: pairs, admissions, groups")
    plan = request_cost.MeshBenchPlan(policy, rounds, pairs, seconds, admissions)
    found = asyncio.run(request_cost.measure(plan, console.print))
    command = f"python -m bench mesh --rounds {rounds} --pairs {pairs} --seconds {seconds:g}"
    command += f" --admissions {admissions} --policy {policy}"
    request_cost.write(found, out, command)
    _show(found)
    console.print(f"written to {out}")


@app.command()
def overheads(
    turns: Annotated[int, typer.Option(help="Runs of each kind, at least.", min=1)] = 8,
    seconds: Annotated[float, typer.Option(help="Time for each size; 40 runs at most.")] = 30.0,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "bench/results/overheads.json"
    ),
) -> None:
    """Measures what pausing, moving and resizing a job costs, in its own steps."""
    with Progress(console=console, transient=True) as progress:
        found = asyncio.run(change_cost.measure(turns, seconds, progress))
    command = f"python -m bench overheads --turns {turns} --seconds {seconds:g}"
    request_cost.write(found, out, command)
    _show(found)
    console.print(f"written to {out}")


def _show(found: request_cost.MeshFindings) -> None:
    table = Table(
        Column("figure", no_wrap=True),
        *("unit", "n", "p50", "from", "to", "p99", "min", "max"),
        *("aim", "verdict"),
    )
    for figure in found.figures:
        table.add_row(*(str(cell) for cell in figure.row().values()))
    console.print(table)


@app.command()
def memory(
    rounds: Annotated[int, typer.Option(help="Repetitions of what is timed.", min=1)] = 20,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "bench/results/memory.json"
    ),
) -> None:
    """Memory of parked jobs by shape, spilling, loading and evicting weights."""
    found = asyncio.run(parking_cost.measure(rounds))
    request_cost.write(found, out, f"python -m bench memory --rounds {rounds}")
    table = Table(
        Column("figure", no_wrap=True), "unit", "n", "p50", "from", "to", "p99", "min", "max"
    )
    for figure in found.figures:
        table.add_row(*(str(cell) for cell in list(figure.row().values())[:9]))
    console.print(table)
    console.print(f"written to {out}")


@app.command("replay")
def replay_command(
    nats_url: Annotated[str, typer.Option(help="Broker that holds the journal.")] = "",
    tls_dir: Annotated[
        Path | None, typer.Option(help="An operator's folder of `hocket certs`.")
    ] = None,
    journal: Annotated[Path | None, typer.Option(help="Saved journal, instead.")] = None,
    cluster: Annotated[str, typer.Option(help="Name of the cluster.")] = "local",
    term: Annotated[int | None, typer.Option(help="Term to replay; default: the newest.")] = None,
    save_to: Annotated[Path | None, typer.Option("--save", help="Save the journal here.")] = None,
    schedule_log: Annotated[Path | None, typer.Option(help="Write the schedule log.")] = None,
) -> None:
    """Replays a live journal and compares plan digests; exits 1 where they differ."""
    if not nats_url and journal is None:
        raise typer.BadParameter("name a broker (--nats-url) or a saved journal (--journal)")
    try:
        entries = (
            load(journal)
            if journal
            else asyncio.run(entries_from_broker(nats_url, cluster, tls_dir))
        )
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
app.command("live")(live_command)
app.command("solver")(solver_command)
app.command("trace")(trace_command)
app.command("digests")(digests_command)
app.command("soak")(soak_command)
app.command("pools")(pools_command)
app.command("shell")(shell_command)
app.command("latency")(latency_command)
app.command("report")(report_command)
app.command("timeline")(timeline_command)
app.command("bound")(bound_command)
app.command("gpu")(gpu_command)
app.command("admission")(admission_command)
app.command("chaos")(chaos_command)
app.command("hosts")(hosts_command)
app.command("losses")(losses_command)


if __name__ == "__main__":
    app()
