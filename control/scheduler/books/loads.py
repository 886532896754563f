"""Weights: how much memory each part takes on a GPU kind, and how long loading takes.

A part is what is loaded, shared and evicted as one. Workers name theirs by content; in a table, a
part is that of one node of one model (`own_part`).

Columns (DESIGN.md section 10): model,gpu,node,load_us,weights_mib and optionally source and
peak_mib, the memory of a call at batch 1 with its weights. A node named `text-*` belongs to the
text stage: its times and weights add up there.
"""

from __future__ import annotations

import csv
import io
from typing import NamedTuple

from ..times.profile import ProfileError

REQUIRED = ("model", "gpu", "node", "load_us", "weights_mib")


class Weights(NamedTuple):
    """One node's weights."""

    load_us: int  # host to GPU
    mib: int
    peak_mib: int  # while it runs, weights included


NOTHING = Weights(0, 0, 0)


def own_part(model: str, node: str) -> str:
    """The part of a node that says of no other which it needs."""
    return f"{model}/{node}"


class LoadTable:
    """Weights by (part, GPU kind); what is not in the table takes nothing."""

    def __init__(self, weights: dict[tuple[str, str], Weights]) -> None:
        self._weights = dict(sorted(weights.items()))

    @classmethod
    def from_csv(cls, *texts: str) -> LoadTable:
        """Reads one or several CSV texts. Raises: ProfileError."""
        found: dict[tuple[str, str], Weights] = {}
        for text in texts:
            reader = csv.DictReader(io.StringIO(text, newline=""))
            missing = [n for n in REQUIRED if n not in (reader.fieldnames or [])]
            if missing:
                raise ProfileError(1, f"columns missing {missing}")
            for row in reader:
                key, weights = _row(reader.line_num, row)
                before = found.get(key, NOTHING) if row["node"].startswith("text-") else NOTHING
                found[key] = Weights(*(a + b for a, b in zip(before, weights, strict=True)))
        return cls(found)

    def weights(self, part: str, gpu: str) -> Weights:
        return self._weights.get((part, gpu), NOTHING)

    def knows(self, part: str, gpu: str) -> bool:
        return (part, gpu) in self._weights

    def learn(self, part: str, gpu: str, weights: Weights) -> None:
        """What a worker has measured stands above what a table said."""
        self._weights[part, gpu] = weights

    def __bool__(self) -> bool:
        return bool(self._weights)


def _row(line: int, row: dict[str, str]) -> tuple[tuple[str, str], Weights]:
    node = "text" if row["node"].startswith("text-") else row["node"]
    numbers = []
    for name in ("load_us", "weights_mib", "peak_mib"):
        value = row.get(name) or row["weights_mib"]
        try:
            numbers.append(int(value))
        except ValueError:
            raise ProfileError(line, f"{name} is {value!r}, not a whole number") from None
        if numbers[-1] < 0:
            raise ProfileError(line, f"{name} is {value}, negative")
    return (own_part(row["model"], node), row["gpu"]), Weights(*numbers)
