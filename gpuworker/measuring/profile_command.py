"""`python -m gpuworker profile MODEL`: measures a first profile on this host.

    nodes x sizes x frames x degrees x batches  ──▶  median call time  ──▶  one CSV row each

What it writes is what control reads with `--profile`. A request is split at each degree as control
splits it: the halves of guidance first, where the model has them. Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import csv
import io
import os
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpuworker.config import EMBEDDED_MODELS
from hocket.launching.machine import machine_kind

if TYPE_CHECKING:
    from gpuworker.measuring.profiling import Bench, ProfileCell
    from gpuworker.models.card import CardFacts

COLUMNS = ("model", "gpu", "node", "width", "height", "frames", "degree", "batch", "call_us")
LAYOUT = ("cfg", "ulysses", "ring")
CPU_WORKERS = 4  # processes on a host without GPUs, at most
INTERRUPTED = 130
Row = dict[str, str | int]


def profile(
    model: Annotated[
        str, typer.Argument(help="Folder, hub id, hocket-emoji or hocket-emoji-motion.")
    ] = "hocket-emoji",
    sizes: Annotated[
        str, typer.Option(help="WIDTHxHEIGHT, several with commas; default: the model's.")
    ] = "",
    frames: Annotated[
        str, typer.Option(help="Frames, several with commas; default: the model's own.")
    ] = "",
    degrees: Annotated[
        str,
        typer.Option(help="Degrees, with commas; default: the model's, up to the number of GPUs."),
    ] = "",
    batches: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1",
    steps: Annotated[int, typer.Option(help="Timed calls of each cell.", min=1)] = 8,
    busy: Annotated[
        int,
        typer.Option(
            help="Workers that compute at the same time; 0: one for each GPU or core.", min=0
        ),
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    gpu: Annotated[str, typer.Option(help="Name of the device in the profile.")] = "",
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV to write.")] = Path(
        "profile.csv"
    ),
) -> None:
    """Measures the call times of a model on this host, for control's --profile."""
    console = Console(stderr=True)
    asked = _Asked(
        _sizes(sizes),
        _numbers("frames", frames),
        _numbers("degrees", degrees),
        _numbers("batches", batches),
        steps,
        device,
        gpu,
    )
    asked = replace(asked, busy=busy or asked.devices())
    rows: list[Row] = []
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    # Remembered, too: an interrupt that falls into a destructor is swallowed there.
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        source = {one.name: str(one) for one in EMBEDDED_MODELS}.get(model, model)
        for row in _measured(source, asked, console):
            rows.append(row)
            output.write_text(as_csv(rows), encoding="utf-8")  # whatever ends this, it is there
            if interrupted:
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGINT, before)
    if rows:
        console.print(f"{len(rows)} cells written to {output}", soft_wrap=True)
    else:
        console.print("nothing was measured")
    if interrupted or not rows:
        raise typer.Exit(INTERRUPTED if interrupted else 1)


@dataclass(frozen=True)
class _Asked:
    """What is to be measured; empty: what the model says."""

    sizes: list[tuple[int, int]]
    frames: list[int]
    degrees: list[int]
    batches: list[int]
    steps: int
    device: str
    gpu: str
    busy: int = 0

    def devices(self) -> int:
        """Workers that this host has a device for."""
        import torch  # noqa: PLC0415  late: --help must not wait for it

        if self.device != "cpu" and torch.cuda.is_available():
            return torch.cuda.device_count()
        return os.cpu_count() or 1

    def workers(self) -> int:
        """Processes that the widest group and the busy ones need."""
        import torch  # noqa: PLC0415

        on_gpus = self.device != "cpu" and torch.cuda.is_available()
        most = self.devices() if on_gpus else CPU_WORKERS
        return max([*self.degrees, self.busy] if self.degrees else [most, self.busy])

    def cells(self, facts: CardFacts, workers: int) -> Iterator[ProfileCell]:
        """All cells, the cheap nodes first at each shape."""
        from gpuworker.collectives.team import GroupLayout  # noqa: PLC0415
        from gpuworker.measuring.profiling import DIT, TEXT, VAE, ProfileCell  # noqa: PLC0415

        degrees = self.degrees or [d for d in facts.degrees if d <= workers]
        guided = facts.guidance == "true_cfg" and facts.guidance_default > facts.branches_above
        for width, height in self.sizes or facts.sizes or (facts.size_default,):
            for frames in self.frames or (facts.frames_default,):
                for batch in self.batches:
                    alone = GroupLayout()
                    yield ProfileCell(TEXT, width, height, frames, alone, batch, self.steps)
                    for degree in degrees:
                        halves = 2 if guided and degree % 2 == 0 else 1
                        layout = GroupLayout(cfg=halves, ulysses=degree // halves)
                        yield ProfileCell(DIT, width, height, frames, layout, batch, self.steps)
                    yield ProfileCell(VAE, width, height, frames, alone, batch, self.steps)


def _measured(source: str, asked: _Asked, console: Console) -> Iterator[Row]:
    """A row for each cell that can be measured; says of the others why not."""
    from gpuworker.measuring.profiling import Bench, CellFailed  # noqa: PLC0415

    workers = asked.workers()
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as progress,
        Bench(source, asked.device, workers) as bench,
    ):
        task = progress.add_task("loading the model", total=None)
        try:
            facts, device = bench.ready()
        except CellFailed as error:
            console.print(f"profile: {error}", style="red", markup=False, soft_wrap=True)
            return
        cells = list(asked.cells(facts, workers))
        progress.update(task, total=len(cells))
        for cell in cells:
            name = f"{cell.node} {cell.width}x{cell.height}x{cell.frames}"
            told = f"{name} degree {cell.layout.degree} batch {cell.batch}"
            progress.update(task, description=told)
            try:
                yield _row(bench, cell, facts.name, asked.gpu or device, asked.busy)
            except CellFailed as error:
                console.print(f"{told}: {error}", style="yellow", markup=False, soft_wrap=True)
            progress.advance(task)


def _row(bench: Bench, cell: ProfileCell, model: str, gpu: str, busy: int) -> Row:
    times_us = bench.measure(cell, busy)
    layout = cell.layout
    told = f"[M] median of {len(times_us)} calls, {busy} busy workers; {machine_kind()}"
    values = (cell.node, cell.width, cell.height, cell.frames, layout.degree, cell.batch)
    named = dict(zip(COLUMNS, (model, gpu, *values, max(1, int(median(times_us)))), strict=True))
    return {**named, "source": told, **{part: getattr(layout, part) for part in LAYOUT}}


def as_csv(rows: Iterable[Row]) -> str:
    """The profile's text; the layout's columns only where one is not pure Ulysses."""
    rows = list(rows)
    plain = all(row["ulysses"] == row["degree"] for row in rows)
    columns = (*COLUMNS, "source") if plain else (*COLUMNS, "source", *LAYOUT)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _sizes(text: str) -> list[tuple[int, int]]:
    found = []
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)x(\d+)", item.strip())
        if match is None:
            raise typer.BadParameter(f"{item!r}: allowed is WIDTHxHEIGHT", param_hint="--sizes")
        found.append((int(match[1]), int(match[2])))
    return found


def _numbers(name: str, text: str) -> list[int]:
    found = []
    for item in filter(None, text.split(",")):
        if not item.strip().isdigit() or int(item) < 1:
            raise typer.BadParameter(f"{item!r}: allowed is 1 or more", param_hint=f"--{name}")
        found.append(int(item))
    return found
