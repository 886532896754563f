"""Promises kept and attainment, as a table: from the runs of a case whose newcomers are told.

python -m bench.reporting.promises DIR/runs.jsonl … > README.md

A row is one cell with one part of firm requests, the last rows are all cells together; intervals of
attainment are 95 % over seeds, the difference to the same seeds with nobody's promise firm is
paired, promises kept are with Wilson's interval over all promises.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .statistics import Interval, mean_interval, paired_difference


class PromiseRow(NamedTuple):
    """A row of the table."""

    load: str
    refuse: bool
    firm: float


ALL = "all loads"
Summaries = dict[int, list[dict[str, Any]]]  # by seed: one, or one of each load


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown, cells in the order of the rows."""
    cells: dict[PromiseRow, Summaries] = {}
    for row in rows:
        cell = row["cell"]
        name = f"{cell['workload']} {cell['rate']:g}/min {cell['slo_scale']:g}"
        key = PromiseRow(name, cell.get("refuse", False), cell.get("firm", 0.0))
        cells.setdefault(key, {}).setdefault(row["seed"], []).append(row["summary"])
    lines = [
        "| load | late ones | firm | seeds | on time, % | against soft | yes | kept, % "
        "| firm yes | kept, % |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    together = _together(cells)
    for key, found in [*cells.items(), *together.items()]:
        soft = key._replace(firm=0.0)
        against = cells.get(soft) or together.get(soft) or {}
        lines.append(_line(key, found, against if key.firm else {}))
    return "\n".join(lines)


def _together(cells: Mapping[PromiseRow, Summaries]) -> dict[PromiseRow, Summaries]:
    """All loads of the seeds that ran in each of them."""
    made: dict[PromiseRow, Summaries] = {}
    for kind in dict.fromkeys(key._replace(load=ALL) for key in cells):
        found = [c for key, c in cells.items() if key._replace(load=ALL) == kind]
        seeds = sorted(set.intersection(*(set(c) for c in found)))
        if len(found) > 1 and seeds:
            made[kind] = {seed: [s for c in found for s in c[seed]] for seed in seeds}
    return made


def _line(key: PromiseRow, found: Summaries, soft: Summaries) -> str:
    told = [s["promises"] for summaries in found.values() for s in summaries]
    yes, kept, firm_yes, firm_kept = (
        sum(t[k] for t in told) for k in ("promised", "kept", "firm_promised", "firm_kept")
    )
    mine, before = _attained(found), _attained(soft)
    return (
        f"| {key.load} | {'refused' if key.refuse else 'stay'} | {key.firm:.0%} | {len(found)} "
        f"| {_shown(mean_interval(list(mine.values())))} "
        f"| {_shown(paired_difference(mine, before), sign='+')} | {yes} | {_part(kept, yes)} "
        f"| {firm_yes} | {_part(firm_kept, firm_yes)} |"
    )


def _attained(found: Summaries) -> dict[int, float]:
    """Percent by seed; of several loads their mean."""
    return {
        seed: 100 * math.fsum(s["attainment"] for s in summaries) / len(summaries)
        for seed, summaries in found.items()
    }


def _shown(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "–"
    half = "" if interval.half is None else f" ± {interval.half:.1f}"
    return f"{interval.mean:{sign}.1f}{half}"


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
