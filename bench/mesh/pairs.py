"""Requests through the whole mesh, each paired with the same one in the plain loop beside it.

    whole    mesh: the client's call until it has the file   plain: prompt until the file is made
    denoise  mesh: first step's start to the last one's end  plain: the sum of its steps

Gateway, control, broker and one worker stand in between; the plain loop
(`gpuworker.measuring.reference`) has a process of its own, which is loaded and idle meanwhile. Who
goes first changes from pair to pair.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from gpuworker.config import EMBEDDED_MODELS
from hocket.client import HocketClient
from hocket.clock import steady_ns
from hocket.errors import MeshStopped
from hocket.tracing import spans
from hocket.tracing.interruptions import DENOISER
from hocket.tracing.span_file import SpanRecord
from hocket.v1.generation_pb2 import Accepted, ModelInfo

Told = Callable[[str], None]
_PAIRS_MAX = 60


@dataclass(frozen=True)
class Pair:
    """One request in both; times in microseconds."""

    request: str
    whole_us: int
    plain_whole_us: int
    plain_step_us: Sequence[int]


@dataclass
class PairedCell:
    """Pairs of one model and size."""

    name: str
    pairs: list[Pair] = field(default_factory=list)


async def paired(client: HocketClient, pairs: int, seconds: float, told: Told) -> list[PairedCell]:
    """All sizes of the shipped models, with their default number of steps.

    Each size takes so many pairs at least, and goes on until so many seconds went by: short
    requests differ more from one to the next, and cost little.
    """
    cells: list[PairedCell] = []
    infos = {info.name: info for info in await client.models(wait_for_ready=True)}
    for folder in EMBEDDED_MODELS:
        async with _plain(folder) as plain:
            for shape in infos[folder.name].shapes:
                side = shape.width
                video = f", {shape.frames} frames" if shape.frames > 1 else ""
                cell = PairedCell(f"{folder.name} {side} px{video}")
                told(cell.name)
                await _pairs(client, plain, infos[folder.name], side, (pairs, seconds), cell)
                cells.append(cell)
    return cells


async def _pairs(
    client: HocketClient,
    plain: asyncio.subprocess.Process,
    model: ModelInfo,
    side: int,
    least: tuple[int, float],
    cell: PairedCell,
) -> None:
    prompt = model.examples[0] if model.examples else "a fox on a green background"
    pairs, seconds = least
    began_ns = steady_ns()
    for seed in itertools.count():  # the first pair warms both up
        if seed > pairs and (seed > _PAIRS_MAX or steady_ns() - began_ns > seconds * 1e9):
            break
        asked = {"prompt": prompt, "side": side, "seed": seed, "steps": model.steps_default}
        answer: dict[str, Any] = {}
        request, whole_us = "", 0
        for turn in range(2):
            if (seed + turn) % 2:
                answer = await _alone(plain, asked)
            else:
                request, whole_us = await _through(client, model, side, seed, prompt)
        if seed:
            cell.pairs.append(Pair(request, whole_us, answer["whole_us"], answer["step_us"]))


async def _alone(plain: asyncio.subprocess.Process, asked: dict[str, Any]) -> dict[str, Any]:
    assert plain.stdin is not None and plain.stdout is not None
    plain.stdin.write(json.dumps(asked).encode() + b"\n")
    answer: dict[str, Any] = json.loads(await plain.stdout.readline())
    return answer


async def _through(
    client: HocketClient, model: ModelInfo, side: int, seed: int, prompt: str
) -> tuple[str, int]:
    name, began_ns = "", steady_ns()
    async for event in client.generate(
        prompt,
        model=model.name,
        shape=(side, side),
        steps=model.steps_default,
        seed=seed,
    ):
        if isinstance(event, Accepted):
            name = event.request_id
    if not name:
        raise MeshStopped(f"a request for {model.name} at {side} px was never accepted")
    return name, (steady_ns() - began_ns) // 1000


@asynccontextmanager
async def _plain(folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gpuworker.measuring.reference", str(folder)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    await process.stdout.readline()  # it is ready
    try:
        yield process
    finally:
        process.stdin.close()
        await process.wait()


@dataclass
class PairComparison:
    """What the pairs of a cell say; ratios are mesh over plain."""

    name: str
    whole: list[float] = field(default_factory=list)
    whole_more_ms: list[float] = field(default_factory=list)
    denoise: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)  # between assignments
    inner_ms: list[float] = field(default_factory=list)  # between steps of one

    def add(self, cell: PairedCell, recorded: Sequence[SpanRecord]) -> None:
        """Takes a cell's requests in, as their traces tell of them, beside the plain loop's."""
        by_request: dict[str, list[SpanRecord]] = {}
        for s in recorded:
            if s.name == spans.STEP and s.attributes.get(spans.NODE) == DENOISER:
                by_request.setdefault(str(s.attributes.get(spans.REQUEST)), []).append(s)
        for pair in cell.pairs:
            steps = sorted(by_request[pair.request], key=lambda s: s.start_unix_ns)
            wall_us = (steps[-1].end_unix_ns - steps[0].start_unix_ns) / 1000
            step_us = [(s.end_unix_ns - s.start_unix_ns) / 1000 for s in steps]
            self.whole.append(pair.whole_us / pair.plain_whole_us)
            self.whole_more_ms.append((pair.whole_us - pair.plain_whole_us) / 1000)
            self.denoise.append(wall_us / sum(pair.plain_step_us))
            self.step.append(median(step_us) / median(pair.plain_step_us))
            for before, after in itertools.pairwise(steps):
                gap_ms = (after.start_unix_ns - before.end_unix_ns) / 1e6
                same = before.attributes[spans.SEQUENCE] == after.attributes[spans.SEQUENCE]
                (self.inner_ms if same else self.gaps_ms).append(gap_ms)
