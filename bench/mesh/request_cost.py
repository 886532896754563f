"""`python -m bench mesh`: what the mesh costs over the plain diffusers loop, on this machine.

Paired and with spread, since machines are shared (`pairs.py`): both shipped models, every size,
end to end and the denoising alone. Ratios and invariants are the gates; milliseconds are
aims on an idle machine.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.mesh.pairs import PairComparison, Told, paired
from hocket.client import HocketClient
from hocket.clock import steady_ns
from hocket.launching.launcher import MeshPlan, mesh
from hocket.launching.machine import machine_kind
from hocket.tracing.span_file import read_spans
from hocket.v1.generation_pb2 import Accepted

PROMPT = "a fox on a green background"
_RATIO = ("p50", 1.05)


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
        # The 95 % interval of the median by order statistics, normal approximation of the binomial.
        rank = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))))
        return {
            "name": self.name,
            "unit": self.unit,
            "n": len(ordered),
            "p50": round(median(ordered), 4),
            "p50_from": round(ordered[rank], 4),
            "p50_to": round(ordered[-1 - rank], 4),
            "p99": round(quantile(ordered, 0.99), 4),
            "min": round(ordered[0], 4),
            "max": round(ordered[-1], 4),
            "aim": f"{self.gate[0]} <= {self.gate[1]:g}" if self.gate else "",
            "verdict": self.verdict,
        }


@dataclass
class MeshFindings:
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


@dataclass(frozen=True)
class MeshBenchPlan:
    """How much is measured."""

    policy: str = "hocket"
    rounds: int = 3  # mesh and plain loop begin anew: one process may be faster by mere luck
    pairs: int = 4  # of each size in a round, at least
    seconds: float = 10.0  # and so long
    admissions: int = 200


async def measure(plan: MeshBenchPlan, told: Told) -> MeshFindings:
    """Starts a mesh of one worker, round by round, and takes every figure."""
    found = MeshFindings()
    compared: list[PairComparison] = []
    for number in range(plan.rounds):
        told(f"round {number + 1} of {plan.rounds}")
        with tempfile.TemporaryDirectory(prefix="hocket-bench-") as folder:
            started = MeshPlan(
                state_dir=Path(folder), workers=1, policy=plan.policy, log_level="warning"
            )
            async with mesh(started, _quiet) as running, HocketClient(running.gateway) as client:
                cells = await paired(client, plan.pairs, plan.seconds, told)
                if number == 0:
                    await _admissions(client, plan.admissions, found)
            recorded = read_spans(Path(folder) / "traces")
        compared = compared or [PairComparison(cell.name) for cell in cells]
        for cell, so_far in zip(cells, compared, strict=True):
            so_far.add(cell, recorded)
    for c in compared:
        _add(found, c)
    await _building_blocks(found)
    return found


def _add(found: MeshFindings, c: PairComparison) -> None:
    cell = c.name
    found.add(f"end to end, mesh / plain, {cell}", "x", c.whole, _RATIO)
    found.add(f"end to end, mesh - plain, {cell}", "ms", c.whole_more_ms)
    found.add(f"denoising, mesh / plain, {cell}", "x", c.denoise, _RATIO)
    found.add(f"median step, mesh / plain, {cell}", "x", c.step)
    if c.gaps_ms:
        found.add(f"gap between assignments, {cell}", "ms", c.gaps_ms, ("p99", 3.0))
    if c.inner_ms:
        found.add(f"gap between steps of one, {cell}", "ms", c.inner_ms)


async def _admissions(client: HocketClient, count: int, found: MeshFindings) -> None:
    took_ms = []
    for seed in range(count + 5):
        began_ns = steady_ns()
        async for event in client.generate(PROMPT, shape=(64, 64), steps=1, seed=seed):
            if isinstance(event, Accepted) and seed >= 5:
                took_ms.append((steady_ns() - began_ns) / 1e6)
    found.add("Generate to accepted", "ms", took_ms, ("p99", 20.0))


async def _building_blocks(found: MeshFindings) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gpuworker.measuring.blocks", stdout=asyncio.subprocess.PIPE
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


def write(found: MeshFindings, path: Path, command: str) -> None:
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
