"""Weights: how much memory each node of a model takes on a GPU kind, and how long loading takes.

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


class LoadTable:
    """Weights by (model, GPU kind, node); what is not in the table takes nothing."""

    def __init__(self, weights: dict[tuple[str, str, str], Weights]) -> None:
        self._weights = dict(sorted(weights.items()))

    @classmethod
    def from_csv(cls, *texts: str) -> LoadTable:
        """Reads one or several CSV texts. Raises: ProfileError."""
        found: dict[tuple[str, str, str], Weights] = {}
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

    def weights(self, model: str, gpu: str, node: str) -> Weights:
        return self._weights.get((model, gpu, node), NOTHING)

    def knows(self, model: str, gpu: str, node: str) -> bool:
        return (model, gpu, node) in self._weights

    def learn(self, model: str, gpu: str, node: str, weights: Weights) -> None:
        """What a worker has measured stands above what a table said."""
        self._weights[model, gpu, node] = weights

    def __bool__(self) -> bool:
        return bool(self._weights)


def _row(line: int, row: dict[str, str]) -> tuple[tuple[str, str, str], Weights]:
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
    return (row["model"], row["gpu"], node), Weights(*numbers)
