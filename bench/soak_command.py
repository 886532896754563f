"""`python -m bench soak`: simulated days of one scheduler, hour by hour."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.sim.costs import Costs
from bench.sim.experiment import settings_of
from bench.sim.soak import Hour, soak, soak_case
from bench.sim_command import explained, read_pairs
from control.scheduler.settings import Settings
from hocket.clock import steady_ns
from hocket.launching.machine import machine_kind

console = Console(width=None if sys.stdout.isatty() else 110)
COLUMNS = ("hour", "ended", "on time", "open", "objects held", "plan p50 ms", "plan p99 ms")


@explained
def soak_command(
    hours: Annotated[int, typer.Option(help="Simulated hours.", min=1)] = 24,
    rate: Annotated[float, typer.Option(help="Requests a minute.", min=0.1)] = 16.0,
    gpus: Annotated[int, typer.Option(help="Workers.", min=1)] = 8,
    policy: Annotated[str, typer.Option(help="Policy.")] = "hocket",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the requests.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write hourly figures as JSON.")] = None,
) -> None:
    """Simulates days while workers come and go: does state, or the cost of a plan, grow?"""
    settings = settings_of(policy, read_pairs(set_ or []), Settings(), Costs())
    case = soak_case(hours, rate, gpus, settings, seed)
    found: list[Hour] = []
    with console.status(f"hour 1 of {hours}") as status:
        for hour in soak(case, steady_ns):
            found.append(hour)
            status.update(f"hour {hour.number + 1} of {hours}: {hour.ended} requests in the last")
    table = Table(*COLUMNS)
    for hour in found:
        table.add_row(
            str(hour.number),
            str(hour.ended),
            f"{hour.attainment:.1%}",
            str(hour.inside),
            str(hour.objects),
            f"{hour.plan_p50_ms:.3f}",
            f"{hour.plan_p99_ms:.3f}",
        )
    console.print(table)
    if out is not None:
        text = {
            "policy": policy,
            "requests": len(case.trace),
            "rate": rate,
            "gpus": gpus,
            "seed": seed,
            "machine": machine_kind(),
            "hours": found,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(msgspec.json.format(msgspec.json.encode(text), indent=2) + b"\n")
