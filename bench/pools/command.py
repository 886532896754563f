"""`python -m bench pools`: an elastic pool over simulated days, by rule."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.pools.day import PoolDay, arrivals
from bench.pools.elastic import ElasticPool, PoolRun
from bench.pools.rules import FixedRule, PoolRule, SignalRule, UtilisationRule
from bench.pools.served import PoolServer, QueueServer, ScheduledServer
from bench.reporting.statistics import mean_interval, paired_difference
from control.scaling.settings import ScalingSettings
from hocket.launching.machine import machine_kind

console = Console(width=None if sys.stdout.isatty() else 130)
DAYS = {
    "bursts of 2": PoolDay(),
    "bursts of 4": PoolDay(burst_factor=4.0),
}
FIGURES = ("attainment", "worker_hours", "best_effort_p95_s", "mean_workers", "most_workers")
TARGETS = (0.7, 0.85)
FIRST = 4  # workers at the beginning of the night


def pools_command(
    seeds: Annotated[int, typer.Option(help="Days of each kind.", min=1)] = 20,
    start_s: Annotated[float, typer.Option(help="From the wish to a worker's first step.")] = 60.0,
    policy: Annotated[
        str, typer.Option(help="Serve by the real scheduler with this policy (minutes a day).")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for figures and tables.")] = None,
) -> None:
    """An elastic pool on days with a curve and bursts: the scaling signal against other rules."""
    rows: list[dict[str, Any]] = []
    for name, day in DAYS.items():
        with console.status(name):
            rows += _rows(name, day, range(seeds), start_s, policy)
    table = Table("day", "rule", "on time", "worker-hours", "p95 best effort s", "mean", "most")
    for row in rows:
        table.add_row(row["day"], row["rule"], *(_shown(row[figure]) for figure in FIGURES))
    console.print(table)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    command = f"python -m bench pools --seeds {seeds} --start-s {start_s:g}"
    command += f" --policy {policy}" if policy else ""
    found: dict[str, Any] = {"command": command, "machine": machine_kind(), "rows": rows}
    found["days"] = {name: asdict(day) for name, day in DAYS.items()}
    found["signal"] = asdict(ScalingSettings(start_us=round(start_s * 1e6)))
    text = msgspec.json.format(msgspec.json.encode(found), indent=1).decode()
    (out / "pools.json").write_text(text + "\n", encoding="utf-8")
    console.print(f"written to {out}")


def _rows(
    name: str, day: PoolDay, seeds: Sequence[int], start_s: float, policy: str
) -> list[dict[str, Any]]:
    def days(rule: Callable[[], PoolRule], first: int = FIRST) -> dict[int, PoolRun]:
        return {seed: one_day(day, seed, rule(), first, start_s, policy) for seed in seeds}

    settings = ScalingSettings(start_us=round(start_s * 1e6))
    runs = {"signal": days(lambda: SignalRule(settings))}
    mean = sum(run.mean_workers for run in runs["signal"].values()) / len(seeds)
    same = math.ceil(mean)
    runs[f"fixed, {same} workers"] = days(lambda: FixedRule(same), same)
    for target in TARGETS:
        runs[f"utilisation {target:.0%}"] = days(partial(UtilisationRule, target))
    return [_row(name, rule, found, runs["signal"]) for rule, found in runs.items()]


def one_day(
    day: PoolDay, seed: int, rule: PoolRule, first: int, start_s: float, policy: str = ""
) -> PoolRun:
    """Runs one day; without a policy a plain queue serves."""
    coming = arrivals(day, seed)
    names = [f"w{number:04d}" for number in range(first)]
    server: PoolServer
    if policy:
        server = ScheduledServer(coming, names, policy)
    else:
        work_us = {side: round(s * 1e6) for side, s in zip(day.sides, day.work_s, strict=True)}
        server = QueueServer(coming, work_us, dict.fromkeys(names, False))
    return ElasticPool(coming, server, rule, names, start_s).run(day.length_s)


def _row(
    day: str, rule: str, runs: dict[int, PoolRun], signal: dict[int, PoolRun]
) -> dict[str, Any]:
    row: dict[str, Any] = {"day": day, "rule": rule, "seeds": len(runs)}
    for figure in FIGURES:
        found = mean_interval([float(getattr(run, figure)) for run in runs.values()])
        row[figure] = {"mean": found.mean, "half": found.half}
    for figure in ("attainment", "worker_hours"):
        ours = {seed: float(getattr(run, figure)) for seed, run in signal.items()}
        theirs = {seed: float(getattr(run, figure)) for seed, run in runs.items()}
        less = paired_difference(ours, theirs)
        assert less is not None
        row[f"signal_less_{figure}"] = {"mean": less.mean, "half": less.half}
    return row


def _shown(figure: dict[str, float | None]) -> str:
    mean, half = figure["mean"] or 0.0, figure["half"]
    digits = 4 if abs(mean) <= 1 else 1
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")
