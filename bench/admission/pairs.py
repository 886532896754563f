"""Rounds of the same bursts: their medians, and of two trees measured in turns the ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]  # as bench.admission.command writes them


def medians(rounds: Sequence[Sequence[Row]]) -> list[Row]:
    """One row for each burst: medians of its figures, sums of what was refused."""
    return [_median(rows) for rows in zip(*rounds, strict=True)]


def ratios(new: Sequence[Sequence[Row]], old: Sequence[Sequence[Row]]) -> dict[str, Row]:
    """By burst: accepted a second of the new over the old, of each round, and their median."""
    found: dict[str, Row] = {}
    for ours, theirs in zip(zip(*new, strict=True), zip(*old, strict=True), strict=True):
        each = [
            round(a["accepted_a_second"] / b["accepted_a_second"], 2)
            for a, b in zip(ours, theirs, strict=True)
            if b["accepted_a_second"]
        ]
        if each:
            found[ours[0]["callers"]] = {"median": median(each), "each": each}
    return found


def _median(rows: Sequence[Row]) -> Row:
    refused: Counter[str] = Counter()
    for row in rows:
        refused.update(row["refused"])
    return {
        "callers": rows[0]["callers"],
        "accepted": round(median(row["accepted"] for row in rows)),
        "refused": dict(refused),
        "accepted_a_second": median(row["accepted_a_second"] for row in rows),
        "cpu_ms_each": _each([row["cpu_ms_each"] for row in rows]),
        "to_accepted_ms": _each([row["to_accepted_ms"] for row in rows]),
        "health_answer_ms": {
            name: _each([row["health_answer_ms"][name] for row in rows])
            for name in rows[0]["health_answer_ms"]
        },
    }


def _each(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    names = set.intersection(*(set(figure) for figure in figures))
    return {name: median(figure[name] for figure in figures) for name in sorted(names)}
