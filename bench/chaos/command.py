"""`python -m bench chaos`: a mesh under load, while its processes are killed and stopped."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.chaos import faults
from bench.chaos.checks import ends
from bench.chaos.history import by_kind
from bench.chaos.run import ChaosPlan, ChaosResult, run, wish_names
from hocket.errors import HocketError
from hocket.launching.machine import machine_kind

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
_TINY = ChaosPlan(seconds=30.0, callers=4, gap_s=(3.0, 6.0), steps=6)


def chaos_command(
    minutes: Annotated[float, typer.Option(help="Duration of faults.", min=0.1)] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of faults and calls.")] = 0,
    workers: Annotated[int, typer.Option(help="Worker processes, or emulated workers.")] = 4,
    executor: Annotated[str, typer.Option(help="torch or emulated.")] = "torch",
    controls: Annotated[int, typer.Option(help="Replicas of control.", min=1)] = 2,
    gateways: Annotated[int, typer.Option(help="Gateways.", min=1)] = 2,
    brokers: Annotated[int, typer.Option(help="nats-servers: 1, or 3 as a cluster.")] = 1,
    callers: Annotated[int, typer.Option(help="Calls in flight.", min=1)] = 8,
    exact: Annotated[
        bool, typer.Option("--exact", help="Degree 1, no batches: files must be byte-equal.")
    ] = False,
    only: Annotated[str, typer.Option(help="Targets of faults, with commas.")] = "",
    tiny: Annotated[bool, typer.Option("--tiny", help="Half a minute of faults.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("bench/results/chaos"),
) -> None:
    """Kills and stops processes at random under load; exits 1 where a promise was broken."""
    targets = tuple(only.split(",")) if only else _targets(controls)
    wrong = set(targets) - set(faults.TARGETS)
    if wrong or executor not in ("torch", "emulated") or brokers not in (1, 3, 5):
        raise typer.BadParameter(f"targets are {', '.join(faults.TARGETS)}; brokers 1, 3 or 5")
    plan = replace(
        _TINY if tiny else ChaosPlan(seconds=60 * minutes, callers=callers),
        seed=seed,
        workers=workers,
        executor=executor,
        controls=controls,
        gateways=gateways,
        brokers=brokers,
        pools=2 if executor == "torch" and workers > 1 else 1,
        targets=targets,
        exact=exact,
    )
    try:
        found = asyncio.run(run(plan, console.print))
    except HocketError as error:
        console.print(f"[red]{error}", markup=True)
        raise typer.Exit(2) from error
    report = _report(plan, found)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{executor}-{workers}-seed{seed}{'-exact' if exact else ''}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    _show(report)
    console.print(f"written to {path}")
    if found.violations:
        raise typer.Exit(1)


def _targets(controls: int) -> tuple[str, ...]:
    """All of them; nobody stands by where control is one process."""
    return tuple(t for t in faults.TARGETS if controls > 1 or t != faults.STANDBY)


def _report(plan: ChaosPlan, found: ChaosResult) -> dict[str, Any]:
    calls = found.history.calls.values()
    return {
        "command": "python -m bench chaos",
        "machine": machine_kind(),
        "plan": asdict(plan),
        "asked": wish_names(plan),
        "calls": len(calls),
        "requests_written": found.requests_written,
        "ends": ends(found.history),
        "files": _files(found),
        "broken_streams": sum(observed.breaks for observed in calls),
        "refusals_before_acceptance": sum(len(observed.refusals) for observed in calls),
        "faults": len(found.history.struck),
        "by_kind": by_kind(found.history),
        "leftovers": found.leftovers,
        "violations": found.violations,
    }


def _files(found: ChaosResult) -> dict[str, int]:
    told = [observed.picture for observed in found.history.calls.values() if observed.picture]
    return {kind: told.count(kind) for kind in sorted(set(told))}


def _show(report: dict[str, Any]) -> None:
    table = Table("fault", "n", "next progress p50", "p99", "next accepted p50", "p99")
    for row in report["by_kind"]:
        progress, accepted = row["progress_s"], row["accepted_s"]
        table.add_row(
            row["kind"],
            str(row["faults"]),
            *(_seconds(progress, q) for q in ("p50", "p99")),
            *(_seconds(accepted, q) for q in ("p50", "p99")),
        )
    console.print(table)
    left = report["leftovers"]
    grown = Table("what", "before", "after", "may grow by")
    for name in sorted(left.after):
        before, most = left.before.get(name, 0.0), left.growth_max.get(name, 0.0)
        grown.add_row(name, f"{before:g}", f"{left.after[name]:g}", f"{most:g}")
    console.print(grown)
    console.print(f"{report['calls']} calls, {report['faults']} faults; ends: {report['ends']}")
    console.print(f"files beside the undisturbed ones: {report['files']}")
    violations = report["violations"]
    for line in violations[:40]:
        console.print(f"VIOLATION {line}", markup=False)
    console.print(f"{len(violations)} violations")


def _seconds(times: dict[str, float], quantile: str) -> str:
    return f"{times[quantile]:.1f} s" if times else "-"
