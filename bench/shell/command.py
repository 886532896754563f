"""`python -m bench shell`: thousands of seeds of the live shell in simulated time."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.shell.awaits import courses
from bench.shell.faults import KINDS
from bench.shell.scenario import SeedResult, play
from bench.sim.experiment import parse_seeds
from bench.sim_command import explained
from hocket.clock import steady_ns

console = Console(width=None if sys.stdout.isatty() else 150)
_SHOWN_MAX = 20  # seeds with problems
_TOGETHER = 10  # seeds of one piece of work
_TOLD_EVERY = 1_000  # seeds between two lines of progress, where there is no terminal


@explained
def shell_command(
    seeds: Annotated[str, typer.Option(help="Seeds: 0-9999, or 3,5.")] = "0-999",
    jobs: Annotated[int, typer.Option(help="Processes to use.", min=1)] = 1,
    kinds: Annotated[
        str, typer.Option(help=f"Only these faults, of: {', '.join(KINDS)}; default: all.")
    ] = "",
    awaits: Annotated[
        int, typer.Option(help="Instead of seeds: a fault at every N-th await; 0: off.", min=0)
    ] = 0,
) -> None:
    """Runs control, gateways and workers in simulated time, with faults of broker and links."""
    chosen = tuple(kind.strip() for kind in kinds.split(",") if kind.strip())
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise typer.BadParameter(f"no fault is called {unknown[0]!r}")
    if sys.flags.hash_randomization:
        _again_with_fixed_hashes()
    if awaits:
        _at_awaits(awaits)
        return
    numbers = list(parse_seeds(seeds))
    began_ns, found = steady_ns(), SeedFindings()
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("seeds", total=len(numbers))
            for result in results(numbers, jobs, chosen):
                found.take(result)
                wrong = f", {found.bad} with problems" if found.bad else ""
                progress.update(task, advance=1, description=f"seeds{wrong}")
                if not console.is_terminal and found.seeds % _TOLD_EVERY == 0:
                    took_s = (steady_ns() - began_ns) / 1e9
                    console.print(f"{found.seeds} of {len(numbers)} seeds in {took_s:.0f} s{wrong}")
    finally:  # of an interrupted run, what it had found
        found.show((steady_ns() - began_ns) / 1e9)
    if found.bad:
        raise typer.Exit(1)


def _again_with_fixed_hashes() -> None:
    """Sets of names have an order of their own in each process, unless it is told not to."""
    command = [sys.executable, "-m", "bench", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})


def _at_awaits(every: int) -> None:
    began_ns, runs, wrong = steady_ns(), 0, 0
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("awaits", total=None)
        for what, result in courses(every=every):
            runs += 1
            progress.update(task, advance=1, description=f"{runs} runs, {wrong} with problems")
            wrong += bool(result.problems)
            for problem in result.problems:
                console.print(f"{what}: {problem}", style="red", markup=False, soft_wrap=True)
    took_s = (steady_ns() - began_ns) / 1e9
    console.print(f"{runs} runs in {took_s:.0f} s, {wrong} with problems", highlight=False)
    if wrong:
        raise typer.Exit(1)


class SeedFindings:
    """What all seeds came to."""

    def __init__(self) -> None:
        self.seeds = self.bad = self.requests = 0
        self.simulated_s = 0.0
        self._kinds: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._first: dict[str, int] = {}
        self._shown: list[SeedResult] = []

    def take(self, result: SeedResult) -> None:
        self.seeds += 1
        self.requests += result.requests
        self.simulated_s += result.simulated_s
        self._faults.update(result.kinds)
        if result.problems:
            self.bad += 1
            kinds = {problem.kind for problem in result.problems}
            self._kinds.update(kinds)
            for kind in kinds:
                self._first[kind] = min(result.seed, self._first.get(kind, result.seed))
            self._shown = sorted([*self._shown, result], key=lambda v: v.seed)[:_SHOWN_MAX]

    def show(self, took_s: float) -> None:
        hours = self.simulated_s / 3600
        faults = sum(self._faults.values())
        console.print(
            f"{self.seeds} seeds in {took_s:.0f} s: {hours:.1f} simulated hours, "
            f"{self.requests} requests, {faults} faults of {len(self._faults)} kinds, "
            f"{self.bad} seeds with problems",
            highlight=False,
        )
        for result in self._shown:
            console.print(
                f"[red]seed {result.seed}[/]: python -m bench shell --seeds {result.seed}"
            )
            for fault in result.faults:
                console.print(f"    {fault}", markup=False)
            for problem in result.problems:
                console.print(f"    {problem}", style="red", markup=False, soft_wrap=True)
        if self._kinds:
            table = Table("problem", "seeds", "first seed")
            for kind, count in self._kinds.most_common():
                table.add_row(kind, str(count), str(self._first[kind]))
            console.print(table)


def results(seeds: Iterable[int], jobs: int, kinds: tuple[str, ...]) -> Iterator[SeedResult]:
    """Of each seed, as they come."""
    if jobs == 1:
        for piece in _pieces(seeds):
            yield from play_all(piece, kinds)
        return
    pieces = _pieces(seeds)
    with ProcessPoolExecutor(jobs) as pool:
        running: set[Future[list[SeedResult]]] = set()
        for piece in pieces:
            running.add(pool.submit(play_all, piece, kinds))
            if len(running) > 2 * jobs:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
        for future in running:
            yield from future.result()


def play_all(seeds: list[int], kinds: tuple[str, ...]) -> list[SeedResult]:
    """Several seeds."""
    return [play(seed, kinds) for seed in seeds]


def _pieces(seeds: Iterable[int]) -> Iterator[list[int]]:
    piece: list[int] = []
    for seed in seeds:
        piece.append(seed)
        if len(piece) == _TOGETHER:
            yield piece
            piece = []
    if piece:
        yield piece
