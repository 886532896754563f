"""`python -m bench gpu`: everything that only a GPU can say, in one command and one folder.

Each section is a process of its own, so that what fails or runs out of memory costs that section
alone; each cell is written as it ends, so that a run may be cut off and taken up again. Without a
GPU `--tiny` runs all of it on the CPU in about a minute, to show that it would run.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.gpu.report import write_report
from bench.gpu.serving import measure_serving
from hocket.clock import steady_ns
from hocket.launching.machine import machine_kind

console = Console(width=None if sys.stdout.isatty() else 110)
_MODULE = "gpuworker.measuring"
_TAIL_LINES = 15
_OTHERS = ("groups", "layouts", "mesh")


def gpu_command(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(
        "bench/results/gpu"
    ),
    tiny: Annotated[bool, typer.Option(help="Tiny models, on the CPU too.")] = False,
    sections: Annotated[
        str, typer.Option(help="Only these, with commas: model names, groups, layouts, mesh.")
    ] = "",
    minutes: Annotated[float, typer.Option(help="Minutes after which no new cell begins.")] = 120.0,
    workers: Annotated[int, typer.Option(help="Workers of the mesh.", min=1, max=8)] = 2,
    fresh: Annotated[bool, typer.Option(help="Measure all cells again.")] = False,
) -> None:
    """Step times, compiled steps, memory, communicators, layouts and a whole mesh on this GPU."""
    failed = asyncio.run(_Run(output, tiny, minutes, workers, fresh).run(sections))
    console.print(f"written to {output / 'README.md'}")
    if failed:
        console.print(f"failed: {', '.join(failed)} (see the .log files)", style="red")
        raise typer.Exit(1)


class _Run:
    def __init__(self, output: Path, tiny: bool, minutes: float, workers: int, fresh: bool) -> None:
        self._output, self._tiny, self._workers = output, tiny, workers
        self._end_ns = steady_ns() + int(minutes * 60e9)
        output.mkdir(parents=True, exist_ok=True)
        if fresh:
            for old in (*output.glob("*.json*"), *output.glob("*.log"), *output.glob("*.csv")):
                old.unlink()

    async def run(self, asked: str) -> list[str]:
        """Runs the sections; names of those that failed."""
        told = json.loads(await _facts())
        device: dict[str, Any] = told["device"]
        if device["device"] == "cpu" and not self._tiny:
            console.print("no CUDA device here: `--tiny` runs the same on the CPU", style="red")
            raise typer.Exit(2)
        facts = {**device, "machine": machine_kind(), "command": shlex.join(sys.argv[1:])}
        (self._output / "device.json").write_text(json.dumps(facts, indent=2) + "\n")
        models: list[str] = told["tiny" if self._tiny else "models"]
        chosen = asked.split(",") if asked else [*models, *_OTHERS]
        if unknown := set(chosen) - {*models, *_OTHERS}:
            allowed = ", ".join((*models, *_OTHERS))
            raise typer.BadParameter(f"{', '.join(sorted(unknown))}; allowed: {allowed}")
        failed = []
        for number, section in enumerate(chosen):
            share = self._left_minutes() / (len(chosen) - number)
            console.rule(f"{section} ({number + 1}/{len(chosen)}, up to {share:.0f} min)")
            if not await self._section(section, section in models, share):
                failed.append(section)
            write_report(self._output)
        return failed

    async def _section(self, section: str, is_model: bool, minutes: float) -> bool:
        log = self._output / f"{section}.log"
        log.unlink(missing_ok=True)
        if section == "mesh":
            return await self._mesh(log)
        out = self._output / f"{section}.jsonl"
        arguments = ["steps", section] if is_model else [section]
        arguments += [f"--out={out}", f"--minutes={minutes:.2f}", *self._flags()]
        return await _shown(log, _MODULE, *arguments)

    async def _mesh(self, log: Path) -> bool:
        try:
            found = await measure_serving(self._tiny, self._workers, self._left_minutes(), _say)
        except Exception as error:  # the other sections' figures are worth keeping
            _write(log, f"{type(error).__name__}: {error}\n")
            return False
        _write(self._output / "mesh.json", json.dumps(found, indent=1) + "\n")
        return True

    def _flags(self) -> list[str]:
        return ["--tiny"] if self._tiny else []

    def _left_minutes(self) -> float:
        return max(0.0, (self._end_ns - steady_ns()) / 60e9)


def _say(text: str) -> None:
    console.print(f"  {text}", highlight=False)


async def _facts() -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"{_MODULE}.facts"), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise typer.Exit(process.returncode)
    return out.decode()


async def _shown(log: Path, module: str, *arguments: str) -> bool:
    """Runs a module and shows what it says; what it complained of goes to the log if it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    complaints: list[bytes] = []

    async def drain(stream: asyncio.StreamReader, kept: list[bytes] | None) -> None:
        while line := await stream.readline():
            if kept is None:
                _say(line.decode().rstrip())
            else:
                kept.append(line)

    await asyncio.gather(drain(process.stdout, None), drain(process.stderr, complaints))
    failed = await process.wait()
    if failed or b"Traceback" in b"".join(complaints):
        _write(log, b"".join(complaints).decode())
    if failed:
        _tell_tail(complaints)
    return not failed


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _tell_tail(complaints: Sequence[bytes]) -> None:
    for line in complaints[-_TAIL_LINES:]:
        _say(line.decode().rstrip())
