"""`python -m bench mesh`: what the mesh costs over the plain diffusers loop, on this machine.

Paired and with spread, since machines are shared: each pair is one request through the whole mesh
(gateway, control, broker, worker) and, right after it, the same request in the plain loop of
`gpuworker.reference` in another process. Ratios and invariants are the gates; milliseconds are
aims on an idle machine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from hocket import spans
from hocket.client import HocketClient
from hocket.clock import steady_ns
from hocket.launcher import MeshPlan, RunningMesh, mesh
from hocket.machine import machine_kind
from hocket.span_file import SpanRecord, read_spans
from hocket.v1.generation_pb2 import Accepted

PROMPT = "a fox on a green background"
SIDE, STEPS = 128, 20


@dataclass(frozen=True)
class Figure:
    """One measured quantity."""

    name: str
    unit: str
    values: tuple[float, ...]
    gate: tuple[str, float] | None = None  # ("p50" or "p99", at most)

    @property
    def verdict(self) -> str:
        """Whether the aim was met in this run."""
        if self.gate is None:
            return ""
        which, most = self.gate
        value = quantile(sorted(self.values), 0.5 if which == "p50" else 0.99)
        return "met" if value <= most else "missed"

    def row(self) -> dict[str, object]:
        ordered = sorted(self.values)
        return {
            "name": self.name,
            "unit": self.unit,
            "n": len(ordered),
            "p50": round(median(ordered), 4),
            "p99": round(quantile(ordered, 0.99), 4),
            "min": round(ordered[0], 4),
            "max": round(ordered[-1], 4),
            "aim": f"{self.gate[0]} <= {self.gate[1]:g}" if self.gate else "",
            "verdict": self.verdict,
        }


@dataclass
class Findings:
    """All figures of a run."""

    figures: list[Figure] = field(default_factory=list)

    def add(
        self,
        name: str,
        unit: str,
        values: Sequence[float],
        gate: tuple[str, float] | None = None,
    ) -> None:
        if not values:
            raise ValueError(f"nothing was measured for {name!r}")
        self.figures.append(Figure(name, unit, tuple(values), gate))


async def measure(pairs: int, admissions: int) -> Findings:
    """Starts a mesh of one worker with round boundaries and takes every figure."""
    found = Findings()
    with tempfile.TemporaryDirectory(prefix="hocket-bench-") as folder:
        plan = MeshPlan(state_dir=Path(folder), workers=1, policy="tetriserve", log_level="warning")
        async with mesh(plan, _quiet) as running:
            requests, plain_us = await _paired(running, pairs)
            await _admissions(running, admissions, found)
        recorded = read_spans(Path(folder) / "traces")
    _compare(recorded, requests, plain_us, found)
    await _building_blocks(found)
    return found


async def _paired(running: RunningMesh, pairs: int) -> tuple[list[str], list[list[int]]]:
    plain = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gpuworker.reference",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert plain.stdin is not None and plain.stdout is not None
    await plain.stdout.readline()
    requests: list[str] = []
    plain_us: list[list[int]] = []
    async with HocketClient(running.gateway) as client:
        for seed in range(pairs + 1):  # the first pair warms both up
            asked = {"prompt": PROMPT, "side": SIDE, "seed": seed, "steps": STEPS}
            plain.stdin.write(json.dumps(asked).encode() + b"\n")
            step_us = json.loads(await plain.stdout.readline())["step_us"]
            request = await _one(client, seed)
            if seed:
                requests.append(request)
                plain_us.append(step_us)
    plain.stdin.close()
    await plain.wait()
    return requests, plain_us


async def _one(client: HocketClient, seed: int) -> str:
    name = ""
    async for event in client.generate(PROMPT, shape=(SIDE, SIDE), steps=STEPS, seed=seed):
        if isinstance(event, Accepted):
            name = event.request_id
    return name


async def _admissions(running: RunningMesh, count: int, found: Findings) -> None:
    took_ms = []
    async with HocketClient(running.gateway) as client:
        for seed in range(count + 5):
            began_ns = steady_ns()
            events = client.generate(PROMPT, shape=(64, 64), steps=1, seed=seed)
            async for event in events:
                if isinstance(event, Accepted) and seed >= 5:
                    took_ms.append((steady_ns() - began_ns) / 1e6)
    found.add("Generate to accepted", "ms", took_ms, ("p99", 20.0))


def _compare(
    recorded: list[SpanRecord], requests: list[str], plain_us: list[list[int]], found: Findings
) -> None:
    ratios, step_ratios = [], []
    gaps_ms: list[float] = []
    inner_ms: list[float] = []
    for request, plain in zip(requests, plain_us, strict=True):
        steps = sorted(
            (
                s
                for s in recorded
                if s.name == spans.STEP
                and s.attributes.get(spans.REQUEST) == request
                and s.attributes.get(spans.NODE) == "dit"
            ),
            key=lambda s: s.start_unix_ns,
        )
        wall_us = (steps[-1].end_unix_ns - steps[0].start_unix_ns) / 1000
        ratios.append(wall_us / sum(plain))
        step_us = [(s.end_unix_ns - s.start_unix_ns) / 1000 for s in steps]
        step_ratios.append(median(step_us) / median(plain))
        for before, after in itertools.pairwise(steps):
            gap_ms = (after.start_unix_ns - before.end_unix_ns) / 1e6
            same = before.attributes[spans.SEQUENCE] == after.attributes[spans.SEQUENCE]
            (inner_ms if same else gaps_ms).append(gap_ms)
    found.add("denoise wall time, mesh / plain loop, degree 1", "x", ratios, ("p50", 1.05))
    found.add("median step, mesh / plain loop, degree 1", "x", step_ratios)
    found.add("gap between steps across a round boundary", "ms", gaps_ms, ("p99", 3.0))
    found.add("gap between steps of one assignment", "ms", inner_ms)


async def _building_blocks(found: Findings) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gpuworker.measure", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    for name, times_ms in json.loads(out).items():
        found.add(name, "ms", times_ms)


def quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    place = (len(ordered) - 1) * q
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def write(found: Findings, path: Path, command: str) -> None:
    """Stores the figures with what they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        "machine": machine_kind(),
        "figures": [figure.row() for figure in found.figures],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _quiet(_: str) -> None:
    """The benchmark prints its own progress."""
