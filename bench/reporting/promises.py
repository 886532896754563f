"""Promises kept and attainment, as a table: from the runs of a case whose newcomers are told.

python -m bench.reporting.promises DIR/runs.jsonl … > README.md

A row is one cell with one part of firm requests; intervals are 95 %, over seeds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from .statistics import Interval, mean_interval

SHOWN = ("workload", "rate", "slo_scale")


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown, cells in the order of the rows."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cell = row["cell"]
        key = (*(cell[k] for k in SHOWN), cell.get("refuse", False), cell.get("firm", 0.0))
        cells.setdefault(key, []).append(row["summary"])
    lines = [
        "| load | late ones | firm | seeds | on time, % | yes | kept, % | firm yes | kept, % |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, rate, scale, refuse, firm), found in cells.items():
        told = [s["promises"] for s in found]
        attained = mean_interval([100 * s["attainment"] for s in found])
        yes, kept = (sum(t[k] for t in told) for k in ("promised", "kept"))
        firm_yes, firm_kept = (sum(t[k] for t in told) for k in ("firm_promised", "firm_kept"))
        lines.append(
            f"| {name} {rate:g}/min {scale:g} | {'refused' if refuse else 'stay'} | {firm:.0%} "
            f"| {len(found)} | {_shown(attained)} | {yes} | {_part(kept, yes)} | {firm_yes} "
            f"| {_part(firm_kept, firm_yes)} |"
        )
    return "\n".join(lines)


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.1f}" + ("" if interval.half is None else f" ± {interval.half:.1f}")


def _part(kept: int, yes: int) -> str:
    """Percent with Wilson's 95 % interval."""
    if not yes:
        return "–"
    z, p = 1.96, kept / yes
    middle = (p + z * z / (2 * yes)) / (1 + z * z / yes)
    half = z / (1 + z * z / yes) * math.sqrt(p * (1 - p) / yes + z * z / (4 * yes * yes))
    low, high = 100 * (middle - half), min(100.0, 100 * (middle + half))
    return f"{100 * p:.2f} ({low:.1f}–{high:.1f})"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        lines = Path(path).read_bytes().splitlines()
        sys.stdout.write(table(msgspec.json.decode(line) for line in lines) + "\n\n")
