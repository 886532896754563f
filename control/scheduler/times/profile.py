"""Profiles: measured or published call times, as CSV text in and as frozen cells out.

Columns (DESIGN.md section 10): model,gpu,node,width,height,frames,degree,batch,call_us,source and
optionally cfg,ulysses,ring, whose product is the degree (absent or empty: ulysses = degree). For
node `dit` one call is one step. Reads text, not files: whoever has a path opens it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import NamedTuple

from ..values import Layout, Shape

Family = tuple[str, str, str]  # model, gpu, node
REQUIRED = ("model", "gpu", "node", "width", "height", "frames", "degree", "batch", "call_us")
OPTIONAL = ("source", "cfg", "ulysses", "ring")


class ProfileError(ValueError):
    """A profile cannot be read; `line` counts from 1 (the column names)."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"profile line {line}: {problem}")
        self.line = line
        self.problem = problem


class CellKey(NamedTuple):
    """What a call time depends on."""

    model: str
    gpu: str
    node: str
    shape: Shape
    layout: Layout
    batch: int


def by_degree(key: CellKey) -> CellKey:
    """The key under which a cell's times are kept: a request is split in one way at each degree."""
    layout = Layout(ulysses=key.layout.degree)
    return key if key.layout == layout else key._replace(layout=layout)


class Profile:
    """Call times in microseconds by cell; a later row wins over an earlier one of the same cell.

    Families are by degree: of several layouts of one degree, the row that was read last counts.
    """

    def __init__(self, cells: dict[CellKey, int]) -> None:
        by_family: dict[Family, dict[CellKey, int]] = {}
        for key, call_us in cells.items():
            by_family.setdefault(key[:3], {})[by_degree(key)] = call_us
        self._families = {f: dict(sorted(found.items())) for f, found in by_family.items()}
        self._cells = dict(sorted(cells.items()))

    @classmethod
    def from_csv(cls, *texts: str) -> Profile:
        """Reads one or several CSV texts; rows of later texts win. Raises: ProfileError."""
        cells: dict[CellKey, int] = {}
        for text in texts:
            for key, call_us in _rows(text):
                cells.pop(key, None)
                cells[key] = call_us  # now the last one
        return cls(cells)

    @property
    def cells(self) -> dict[CellKey, int]:
        """All cells in sorted order (a copy)."""
        return dict(self._cells)

    def call_us(self, key: CellKey) -> int | None:
        """The cell's time, None where the profile has no such cell."""
        known = self.family(key[:3]) if key == by_degree(key) else self._cells
        return known.get(key)

    def gpus(self, model: str) -> tuple[str, ...]:
        """GPU kinds on which a model was profiled, sorted."""
        return tuple(sorted({k.gpu for k in self._cells if k.model == model}))

    def family(self, family: Family) -> dict[CellKey, int]:
        """The cells of one model, GPU kind and node, by degree. To be read only."""
        return self._families.get(family, {})


def _rows(text: str) -> Iterable[tuple[CellKey, int]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    names = next(reader, [])
    missing = [n for n in REQUIRED if n not in names]
    unknown = [n for n in names if n not in REQUIRED + OPTIONAL]
    if missing or unknown or len(set(names)) != len(names):
        raise ProfileError(1, f"columns missing {missing}, unknown {unknown} or repeated")
    for fields in reader:
        line = reader.line_num
        if not fields:
            continue
        if len(fields) != len(names):
            raise ProfileError(line, f"{len(fields)} fields instead of {len(names)}")
        yield _cell(line, dict(zip(names, fields, strict=True)))


def _cell(line: int, row: dict[str, str]) -> tuple[CellKey, int]:
    for name in ("model", "gpu", "node"):
        if not row[name]:
            raise ProfileError(line, f"{name} is empty")
    degree = _positive(line, row, "degree")
    layout = Layout(ulysses=degree)
    if any(row.get(n) for n in ("cfg", "ulysses", "ring")):
        parts = {
            n: _positive(line, row, n) if row.get(n) else 1 for n in ("cfg", "ulysses", "ring")
        }
        layout = Layout(**parts)
        if layout.degree != degree:
            raise ProfileError(line, f"cfg x ulysses x ring is {layout.degree}, degree {degree}")
    shape = Shape(
        width=_positive(line, row, "width"),
        height=_positive(line, row, "height"),
        frames=_positive(line, row, "frames"),
    )
    batch = _positive(line, row, "batch")
    key = CellKey(row["model"], row["gpu"], row["node"], shape, layout, batch)
    return key, _positive(line, row, "call_us")


def _positive(line: int, row: dict[str, str], name: str) -> int:
    try:
        value = int(row[name])
    except ValueError:
        raise ProfileError(line, f"{name} is {row[name]!r}, not a whole number") from None
    if value < 1:
        raise ProfileError(line, f"{name} is {value}, not positive")
    return value
