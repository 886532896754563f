"""`python -m bench admission`: bursts at the door, a steady rate, open streams."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from bench.admission import callers, pairs, streams
from bench.admission.callers import Burst, CallerStubs
from bench.admission.tree import Started, cpu_ms, emulated_mesh
from hocket.launching.machine import machine_kind

console = Console(width=None if sys.stdout.isatty() else 150)
COUNTS = (1, 10, 100, 500, 1000, 2500)
_DEADLINE_S = 20.0
_REPEATS = {1: 20, 10: 5}  # small bursts vary
_WARM, _WARM_S = 100, 5.0  # callers of a first burst, and time for the workers to serve them


def admission_command(
    tree: Annotated[Path, typer.Option(help="Source tree whose mesh is measured.")] = Path("."),
    against: Annotated[
        Path | None,
        typer.Option(help="Another tree, measured alternately with the first; prints ratios."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Repetitions; prints medians.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Emulated workers.", min=1, max=64)] = 8,
    counts: Annotated[str, typer.Option(help="Sizes of bursts, with commas.")] = ",".join(
        map(str, COUNTS)
    ),
    create: Annotated[
        bool, typer.Option("--create", help="CreateGeneration instead of a detached Generate.")
    ] = False,
    paced: Annotated[int, typer.Option(help="Callers at the steady rate; 0: none.")] = 500,
    rate: Annotated[float, typer.Option(help="Calls per second of those.")] = 1000.0,
    open_streams: Annotated[int, typer.Option(help="Streams kept open; 0: none.")] = 2000,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "bench/results/admission/after.json"
    ),
) -> None:
    """Measures admission: accepted per second, time to accepted, stalls, memory of a stream."""
    trees = [tree] if against is None else [tree, against]
    for one in trees:
        if not any((one / name).exists() for name in ("hocket/cli", "hocket/cli.py")):
            raise typer.BadParameter(f"no source tree of Hocket: {one}")
    sizes = [int(text) for text in counts.split(",") if text]
    found: list[list[dict[str, Any]]] = [[] for _ in trees]
    for turn in range(rounds):
        for number, one in enumerate(trees):
            console.print(f"round {turn + 1} of {rounds}: {one}")
            # The other tree may be of before CreateGeneration.
            measured = _measure(
                one.resolve(), workers, sizes, create and not number, (paced, rate), open_streams
            )
            found[number].append(asyncio.run(measured))
    method = "CreateGeneration" if create else "Generate, detached"
    told: dict[str, Any] = {"machine": machine_kind(), "workers": workers, "method": method}
    told["rounds"] = found[0]
    if against is not None:
        told["against"] = found[1]
        told["ratios"] = pairs.ratios(*([r["bursts"] for r in runs] for runs in found))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")
    for one, runs in zip(trees, found, strict=True):
        console.print(f"{one}{', medians' if rounds > 1 else ''}")
        console.print(_table(pairs.medians([run["bursts"] for run in runs])))
        for run in runs:
            if run["streams"] is not None:
                console.print(run["streams"])
    for name, ratio in told.get("ratios", {}).items():
        console.print(f"{name}: {ratio['median']:g} times as many a second ({ratio['each']})")
    console.print(f"written to {out}")


async def _measure(
    tree: Path,
    workers: int,
    sizes: list[int],
    create: bool,
    steady: tuple[int, float],
    open_streams: int,
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for count in sizes:
        console.print(f"{count} at once")
        async with _door(tree, workers, 50_000, create) as (mesh, at):
            await _warm(at)
            whole = Burst(count)
            async with callers.probed(_services(mesh), whole.stalls_ms):
                for _ in range(_REPEATS.get(count, 1)):
                    with _spent(mesh, whole.cpu_ms):
                        one = await callers.burst(at, count, _DEADLINE_S)
                    whole.took_ms += one.took_ms
                    whole.span_s += one.span_s
                    whole.refused += one.refused
        rows.append(_row(f"{count} at once", whole))
    if steady[0]:
        console.print(f"{steady[0]} callers, {steady[1]:g} calls a second")
        async with _door(tree, workers, 1_000, create) as (mesh, at):
            await _warm(at)
            stalls: dict[str, list[float]] = {}
            spent_ms: dict[str, float] = {}
            async with callers.probed(_services(mesh), stalls):
                with _spent(mesh, spent_ms):
                    run = await callers.paced(at, *steady, seconds=10.0)
            run.stalls_ms, run.cpu_ms = stalls, spent_ms
        rows.append(_row(f"{steady[0]} callers, {steady[1]:g}/s", run))
    stayed = None
    if open_streams:
        console.print(f"{open_streams} open streams")
        async with _door(tree, workers, 1_000_000, False) as (mesh, at):
            stayed = await streams.measure(at, mesh, open_streams, limit_s=150.0)
    return {"bursts": rows, "streams": stayed}


async def _warm(at: CallerStubs) -> None:
    """First calls are slow ones, and so is the first burst: code is loaded, connections grow."""
    await callers.burst(at, 3, _DEADLINE_S)
    await callers.burst(at, _WARM, _DEADLINE_S)
    await asyncio.sleep(_WARM_S)


@asynccontextmanager
async def _door(
    tree: Path, workers: int, step_us: int, create: bool
) -> AsyncIterator[tuple[Started, CallerStubs]]:
    async with (
        emulated_mesh(tree, workers, step_us) as mesh,
        callers.doors(mesh.gateway, create) as at,
    ):
        yield mesh, at


@contextmanager
def _spent(mesh: Started, into: dict[str, float]) -> Iterator[None]:
    """Adds the processor time of mesh and generator while the block runs."""
    pids = {**mesh.pids, "generator": os.getpid()}
    before = {name: cpu_ms(pid) for name, pid in pids.items()}
    yield
    for name, pid in pids.items():
        into[name] = into.get(name, 0.0) + cpu_ms(pid) - before[name]


def _services(mesh: Started) -> dict[str, str]:
    return {"gateway": mesh.gateway, "control": mesh.control}


def _row(name: str, run: Burst) -> dict[str, Any]:
    accepted = len(run.took_ms)
    return {
        "callers": name,
        "accepted": accepted,
        "refused": dict(_short(run.refused)),
        "accepted_a_second": round(accepted / run.span_s, 1) if run.span_s else 0.0,
        "cpu_ms_each": {name: round(spent / accepted, 3) for name, spent in run.cpu_ms.items()}
        if accepted
        else {},
        "to_accepted_ms": _quantiles(run.took_ms),
        "health_answer_ms": {name: _quantiles(run.stalls_ms[name]) for name in run.stalls_ms},
    }


def _short(refused: Counter[str]) -> Counter[str]:
    return Counter(dict(refused.most_common(5)))


def _quantiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and max, by order statistics."""
    if not values:
        return {}
    ordered = sorted(values)
    last = len(ordered) - 1
    picks = {"p50": ordered[round(0.5 * last)], "p99": ordered[round(0.99 * last)]}
    return {name: round(value, 2) for name, value in {**picks, "max": ordered[-1]}.items()}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "callers", "accepted", "refused", "a second", "p50 ms", "p99 ms", "stall p99 gateway",
        "stall p99 control", "CPU ms a request: gateway, control",
    )  # fmt: skip
    for row in rows:
        took, stalls = row["to_accepted_ms"], row["health_answer_ms"]
        table.add_row(
            row["callers"],
            str(row["accepted"]),
            "; ".join(f"{count} {why}" for why, count in row["refused"].items()) or "none",
            f"{row['accepted_a_second']:g}",
            f"{took.get('p50', 0):g}",
            f"{took.get('p99', 0):g}",
            f"{stalls.get('gateway', {}).get('p99', 0):g}",
            f"{stalls.get('control', {}).get('p99', 0):g}",
            ", ".join(f"{row['cpu_ms_each'].get(name, 0):g}" for name in ("gateway", "control")),
        )
    return table
