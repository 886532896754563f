"""Promises kept and attainment, as a table: from the runs of a case whose newcomers are told.

python -m bench.reporting.promises DIR/runs.jsonl … > README.md

A row is one cell with one part of firm requests; intervals are 95 %, over seeds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

# Student's t, 97.5 %, by degrees of freedom; beyond these, the normal one.
T_95 = (0.0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)
T_FAR = 2.09
SHOWN = ("workload", "rate", "slo_scale")


def interval(values: Sequence[float]) -> str:
    """Mean and half width of its 95 % interval; no width for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    t = T_95[len(values) - 1] if len(values) <= len(T_95) else T_FAR
    return f"{mean:.1f} ± {t * spread / math.sqrt(len(values)):.1f}"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown, cells in the order of the rows."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cell = row["cell"]
        key = (*(cell[k] for k in SHOWN), cell.get("refuse", False), cell.get("firm", 0.0))
        cells.setdefault(key, []).append(row["summary"])
    lines = [
        "| load | late ones | firm | seeds | on time, % | told yes | kept, % | firm yes | firm kept, % |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, rate, scale, refuse, firm), found in cells.items():
        told = [s["promises"] for s in found]
        attained = interval([100 * s["attainment"] for s in found])
        yes, kept = (sum(t[k] for t in told) for k in ("promised", "kept"))
        firm_yes, firm_kept = (sum(t[k] for t in told) for k in ("firm_promised", "firm_kept"))
        lines.append(
            f"| {name} {rate:g}/min {scale:g} | {'refused' if refuse else 'stay'} | {firm:.0%} "
            f"| {len(found)} | {attained} | {yes} | {_part(kept, yes)} | {firm_yes} "
            f"| {_part(firm_kept, firm_yes)} |"
        )
    return "\n".join(lines)


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
