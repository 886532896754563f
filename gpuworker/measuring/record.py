"""What has been measured so far: a file of JSON lines, one a cell, written as each cell ends.

A run that is cut off loses the cell in hand; the next one goes on behind what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hocket.clock import steady_ns

Cell = Mapping[str, str | int | bool]


class MeasurementLog:
    """The cells of one section."""

    def __init__(self, path: Path, minutes: float) -> None:
        self._path = path
        self._end_ns = steady_ns() + int(minutes * 60e9)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_text().splitlines() if path.exists() else []
        self._done = {_key(json.loads(line)["cell"]) for line in kept}

    def wanted(self, cells: list[Cell]) -> Iterator[Cell]:
        """The cells that are not there yet, as long as there is time."""
        for number, cell in enumerate(cells, 1):
            if _key(cell) in self._done:
                continue
            if steady_ns() >= self._end_ns:
                left = sum(_key(other) not in self._done for other in cells)
                print(f"out of time; left for another run: {left} cells", flush=True)
                return
            print(f"{number}/{len(cells)} {' '.join(map(str, cell.values()))}", flush=True)
            yield cell

    def add(self, cell: Cell, **found: Any) -> None:
        """Writes what was found in a cell."""
        with self._path.open("a") as file:
            file.write(json.dumps({"cell": dict(cell), **found}) + "\n")
        self._done.add(_key(cell))


def _key(cell: Cell) -> str:
    return json.dumps(dict(cell), sort_keys=True)
