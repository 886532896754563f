"""All runs of an experiment, by as many processes as wanted, and their bounds.

Rows are on disk as they come: what was interrupted goes on with `--resume`.
"""

from __future__ import annotations

import functools
import multiprocessing
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from bench.bound import bound
from bench.sim.experiment import Experiment, RunSpec, parse_seeds, run_row
from bench.sim.workloads import generate
from hocket.clock import steady_ns
from hocket.launching.machine import machine_kind

console = Console(width=None if sys.stdout.isatty() else 150)
T = TypeVar("T")


def timed_row(spec: RunSpec) -> dict[str, Any]:
    """One run with its wall time; what a process of the pool does."""
    begin_ns = steady_ns()
    row = run_row(spec, steady_ns)
    return {**row, "wall_s": round((steady_ns() - begin_ns) / 1e9, 3)}


def upper_bound(spec: RunSpec, mip_seconds: float) -> float:
    """What no schedule of the run's trace can exceed, moving and loads for free."""
    gpus = spec.cluster.workers * spec.cluster.hosts
    trace = spec.trace or generate(spec.workload, spec.seed, spec.parameters)
    return bound(trace, spec.profile_csv, gpus, mip_seconds=mip_seconds).bound


def sweep(
    experiment: Experiment,
    seeds: str,
    names: list[str],
    jobs: int,
    out: Path,
    check: bool,
    bounding_s: float | None,
    resume: bool,
) -> None:
    """Runs what is missing; `bounding_s`: also bounds each trace, the integer bound that long."""
    specs = experiment.runs(parse_seeds(seeds or experiment.file.seeds), names, check=check)
    out.mkdir(parents=True, exist_ok=True)
    rows = _all_rows(specs, out / "runs.jsonl", jobs, experiment.name, resume)
    if bounding_s is not None:
        _bound_all(specs, rows, jobs, bounding_s)
    encoder = msgspec.json.Encoder()
    (out / "runs.jsonl").write_bytes(b"".join(encoder.encode(r) + b"\n" for r in rows))
    shutil.copyfile(experiment.path, out / "case.toml")
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    with (out / "command.txt").open("a" if resume else "w") as file:
        file.write(f"{command}\n{_commit()}\n{machine_kind()}\n")
    console.print(_table(rows))
    console.print(f"{len(rows)} runs in {out}")


def _bound_all(
    specs: list[RunSpec], rows: list[dict[str, Any]], jobs: int, mip_seconds: float
) -> None:
    """Enters each trace's bound in its rows; those that have one from before keep it."""
    known = {_key(r["cell"], "", r["seed"]): r["bound"] for r in rows if r["bound"] is not None}
    traces = {_key(s.cell, "", s.seed): s for s in specs}
    missing = {key: spec for key, spec in traces.items() if key not in known}
    if missing:
        work = functools.partial(upper_bound, mip_seconds=mip_seconds)
        found = _rows(work, list(missing.values()), jobs, "bounds")
        known.update(zip(missing, found, strict=True))
    for row in rows:
        row["bound"] = known.get(_key(row["cell"], "", row["seed"]))


def _all_rows(
    specs: list[RunSpec], path: Path, jobs: int, name: str, resume: bool
) -> list[dict[str, Any]]:
    """The rows of all specs, in their order, then what `path` holds beside them.

    Each batch is on disk before the next begins.
    """
    known: dict[tuple[str, str, int], dict[str, Any]] = {}
    if resume and path.exists():
        rows = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
        known = {_key(r["cell"], r["label"], r["seed"]): r for r in rows}
    else:
        path.write_bytes(b"")
    missing = [s for s in specs if _key(s.cell, s.policy.shown, s.seed) not in known]
    missing.sort(key=lambda s: s.seed)  # all cells of a seed, then the next seed
    size = max(len(missing) // 10, 16 * jobs)
    for at in range(0, len(missing), size):
        part = f"{name} {at + len(specs) - len(missing)}/{len(specs)}"
        if not console.is_terminal:
            console.print(part)
        for row in _rows(timed_row, missing[at : at + size], jobs, part):
            known[_key(row["cell"], row["label"], row["seed"])] = row
            with path.open("ab") as file:
                file.write(msgspec.json.encode(row) + b"\n")
    wanted = [known.pop(_key(s.cell, s.policy.shown, s.seed)) for s in specs]
    return [*wanted, *known.values()]


def _key(cell: Any, label: str, seed: int) -> tuple[str, str, int]:
    return msgspec.json.encode(cell, order="sorted").decode(), label, seed


def _rows(work: Callable[[RunSpec], T], specs: list[RunSpec], jobs: int, name: str) -> Iterator[T]:
    """Results in the order of the specs, by as many processes as wanted, with a progress bar."""
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    shown = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    if jobs == 1 or len(specs) == 1:
        with shown:
            yield from (work(spec) for spec in shown.track(specs, description=name))
        return
    # Forked before the progress bar's thread begins; children leave Ctrl-C to us.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(jobs, len(specs)), context, _ignore_interrupts)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        futures = [pool.submit(work, spec) for spec in specs]
        with shown:
            task = shown.add_task(name, total=len(futures))
            waiting: set[Future[T]] = set(futures)
            while waiting:
                over, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                shown.advance(task, len(over))
                for future in over:
                    future.result()  # a failed run ends the experiment at once
        yield from (future.result() for future in futures)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    pool.shutdown()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _commit() -> str:
    """The commit that ran, `+` where files differ from it."""
    here = Path(__file__).parent
    arguments = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(arguments, capture_output=True, text=True, cwd=here)
    return f"commit {found.stdout.strip() or 'unknown'}"


def _table(rows: list[dict[str, Any]]) -> Table:
    """Mean attainment in percent, cells down, policies across."""
    labels = list(dict.fromkeys(r["label"] for r in rows))
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        cell = ", ".join(f"{k} {v}" for k, v in row["cell"].items())
        met = found.setdefault(cell, {}).setdefault(row["label"], [])
        met.append(100 * row["summary"]["attainment"])
    table = Table("attainment, %", *labels)
    for cell, by_label in found.items():
        means = (by_label.get(label, []) for label in labels)
        table.add_row(cell, *(f"{sum(m) / len(m):.1f}" if m else "" for m in means))
    return table
